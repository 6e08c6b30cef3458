"""
JSON as this library takes it in: text without loss, values without surprises.

Two rules, for two uses. The *fields of an agent* are decoded, checked and merged: `decode` keeps repeated members
visible, `plain_value` names everything that PostgreSQL's jsonb or an HTTP header could not hold. *Payloads and answers*
are never looked into: `JsonText` is their text as it came, known to be JSON.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from decimal import Decimal, InvalidOperation
from typing import Any, NoReturn, TypeAlias

import attrs

from external_agents.domain.errors import FAULTS_MAX, Fault, MalformedJson, ValidationError

JsonValue: TypeAlias = Any
"""dict, list, str, int, float, Decimal, bool or None, nested."""

FIELD_DEPTH_MAX = 64
PAYLOAD_DEPTH_MAX = 512

_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
"""Possessive, and an unterminated string reaches to the end: anything else is quadratic in hostile text."""
_BRACKET = re.compile(r"[\[\]{}]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_PATH_NAME_MAX = 100
_PATH_MAX = 500
_NUMBER_DIGITS_MAX = 400
"""More digits than any double's integer part; int() is quadratic in them, so they are counted first."""


@attrs.frozen
class JsonText:
    """The text of one JSON value, exactly as it was received."""

    text: str = attrs.field(repr=lambda text: f"<{len(text)} characters>")

    @classmethod
    def parse(cls, raw: bytes) -> JsonText:
        """
        Raises:
            MalformedJson: Not one JSON value in UTF-8, or nested over 512 levels.
        """
        text = _utf8(raw)
        if not _shallow(text, PAYLOAD_DEPTH_MAX):
            raise MalformedJson(f"The JSON is nested over {PAYLOAD_DEPTH_MAX} levels.")
        _decoded(text, _GRAMMAR)
        return cls(text)

    @classmethod
    def of(cls, value: JsonValue) -> JsonText:
        """
        The text of a Python value.

        Raises:
            ValidationError: It has no JSON form (NaN, an object that is no JSON value, a key that is no string).
        """
        try:
            text = dumps(value)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValidationError([Fault("", f"is not a JSON value: {error}")]) from None
        if not _shallow(text, PAYLOAD_DEPTH_MAX):
            raise ValidationError([Fault("", f"is nested over {PAYLOAD_DEPTH_MAX} levels")])
        return cls(text)

    @property
    def value(self) -> JsonValue:
        """The value for Python: whole numbers exact, others as floats; take `text` where every digit counts."""
        return _PLAIN.decode(self.text)

    def exact(self) -> JsonValue:
        """The value with numbers as int and Decimal, without loss; numbers of absurd length as None."""
        return _EXACT.decode(self.text)


class RepeatedMembers(dict[str, JsonValue]):
    """An object whose text named a member more than once."""

    names: frozenset[str] = frozenset()


def decode(raw: bytes) -> JsonValue:
    """
    A JSON document of fields; non-whole numbers as Decimal, repeated members kept as `RepeatedMembers`.

    Raises:
        MalformedJson: Not one JSON value in UTF-8.
    """
    text = _utf8(raw)
    if not _shallow(text, PAYLOAD_DEPTH_MAX):
        raise MalformedJson(f"The JSON is nested over {PAYLOAD_DEPTH_MAX} levels.")
    return _decoded(text, _FIELDS)


def plain_value(value: JsonValue, path: str = "") -> JsonValue:
    """
    The same value with floats as Decimal and only plain dicts and lists, fit for jsonb.

    Raises:
        ValidationError: NUL, lone surrogates, NaN, Infinity, numbers beyond a double, repeated members, nesting over 64
            levels, or Python objects that have no JSON form; every one of them, by path.
    """
    result, faults = judged_value(value, path)
    if faults:
        raise ValidationError(faults)
    return result


def judged_value(value: JsonValue, path: str = "") -> tuple[JsonValue, list[Fault]]:
    """`plain_value` with its faults beside the result, in which something harmless stands where a fault was."""
    faults: list[Fault] = []
    return _plain(value, path, 1, faults), faults


def dumps(value: JsonValue) -> str:
    """Compact JSON text; int and Decimal keep their digits (the standard encoder would round a Decimal to a float)."""
    return "".join(_tokens(value))


def merge_patch(target: JsonValue, patch: JsonValue) -> JsonValue:
    """`target` changed by a JSON merge patch (RFC 7396)."""
    if not isinstance(patch, Mapping):
        return patch
    result = dict(target) if isinstance(target, Mapping) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = merge_patch(result.get(name), value)
    return result


def join_path(path: str, member: str | int) -> str:
    """`auth_config` + `key` → `auth_config.key`; `tags` + 2 → `tags[2]`; what is too long to be read ends in `…`."""
    if len(path) > _PATH_MAX:
        return path if path.endswith("…") else f"{path}…"
    if isinstance(member, int):
        return f"{path}[{member}]"
    if len(member) > _PATH_NAME_MAX:
        member = f"{member[:_PATH_NAME_MAX]}…"
    printable = member.encode("utf-8", "backslashreplace").decode().replace("\0", "\\u0000")
    return f"{path}.{printable}" if path else printable


def _utf8(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise MalformedJson("The body is not UTF-8.") from None


def _decoded(text: str, decoder: json.JSONDecoder) -> JsonValue:
    try:
        return decoder.decode(text)
    except (ValueError, RecursionError) as error:
        where = f" (line {error.lineno}, column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
        raise MalformedJson(f"The body is not JSON{where}.") from None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _shallow(text: str, depth_max: int) -> bool:
    if text.count("[") + text.count("{") <= depth_max:
        return True
    depth = 0
    for bracket in _BRACKET.finditer(_STRING.sub("", text)):
        depth += 1 if bracket.group() in "[{" else -1
        if depth > depth_max:
            return False
    return True


def _bounded_int(digits: str) -> int | Decimal:
    return int(digits) if len(digits) <= _NUMBER_DIGITS_MAX else Decimal("Infinity")


def _bounded_decimal(digits: str) -> Decimal:
    try:
        return Decimal(digits)
    except InvalidOperation:  # An exponent of 19 digits or more.
        return Decimal("Infinity")


def _int_or_float(digits: str) -> int | float:
    return int(digits) if len(digits) <= _NUMBER_DIGITS_MAX else float(digits)


def _exact_int(digits: str) -> int | None:
    return int(digits) if len(digits) <= _NUMBER_DIGITS_MAX else None


def _exact_decimal(digits: str) -> Decimal | None:
    number = _bounded_decimal(digits) if len(digits) <= _NUMBER_DIGITS_MAX else Decimal("Infinity")
    return number if number.is_finite() else None


def _members(pairs: list[tuple[str, JsonValue]]) -> dict[str, JsonValue]:
    members = dict(pairs)
    if len(members) == len(pairs):
        return members
    repeated = RepeatedMembers(members)
    seen: set[str] = set()
    repeated.names = frozenset(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
    return repeated


def _plain(value: JsonValue, path: str, depth: int, faults: list[Fault]) -> JsonValue:
    if len(faults) >= FAULTS_MAX:
        return None
    if isinstance(value, str):
        faults.extend(_text_faults(value, path))
        return str(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float | Decimal):
        return _plain_number(value, path, faults)
    if not isinstance(value, Mapping | list | tuple):
        faults.append(Fault(path, f"is no JSON value but a Python {type(value).__name__}"))
        return None
    if depth > FIELD_DEPTH_MAX:
        faults.append(Fault("", f"nests over {FIELD_DEPTH_MAX} levels"))
        return None
    if isinstance(value, Mapping):
        return _plain_object(value, path, depth, faults)
    return [_plain(item, join_path(path, index), depth + 1, faults) for index, item in enumerate(value)]


def _plain_object(value: Mapping[Any, JsonValue], path: str, depth: int, faults: list[Fault]) -> dict[str, JsonValue]:
    repeated = value.names if isinstance(value, RepeatedMembers) else frozenset()
    faults.extend(Fault(join_path(path, name), "is given more than once") for name in repeated)
    result = {}
    for name, item in value.items():
        if not isinstance(name, str):
            faults.append(Fault(path, f"has a member whose name is no string but a {type(name).__name__}"))
            continue
        member = join_path(path, name)
        faults.extend(Fault(member, f"has a name that {fault.message}") for fault in _text_faults(name, member))
        result[name] = _plain(item, member, depth + 1, faults)
    return result


def _plain_number(value: float | Decimal, path: str, faults: list[Fault]) -> int | Decimal:
    """PostgreSQL's jsonb holds more than a double, other readers do not; so a double is the bound."""
    if isinstance(value, int):
        try:
            float(value)
        except OverflowError:
            faults.append(Fault(path, "is a number beyond the range of a double"))
        return int(value)
    number = Decimal(repr(float(value))) if isinstance(value, float) else value
    if not number.is_finite() or math.isinf(float(number)):
        faults.append(Fault(path, "is not a finite number in the range of a double"))
        return Decimal(0)
    if number and not float(number):
        faults.append(Fault(path, "is a number too small for a double"))
    if len(number.as_tuple().digits) > _NUMBER_DIGITS_MAX:
        faults.append(Fault(path, f"is a number of over {_NUMBER_DIGITS_MAX} digits"))
    return number


def _text_faults(text: str, path: str) -> Iterator[Fault]:
    if "\0" in text:
        yield Fault(path, "contains NUL, which cannot be stored")
    if _SURROGATE.search(text):
        yield Fault(path, "contains a lone surrogate, which has no UTF-8 form")


def _tokens(value: JsonValue) -> Iterator[str]:
    if isinstance(value, Mapping):
        yield "{"
        for index, (name, item) in enumerate(value.items()):
            if not isinstance(name, str):
                raise TypeError(f"a member's name is a {type(name).__name__}")
            yield ("," if index else "") + _encode_text(name) + ":"
            yield from _tokens(item)
        yield "}"
    elif isinstance(value, list | tuple):
        yield "["
        for index, item in enumerate(value):
            if index:
                yield ","
            yield from _tokens(item)
        yield "]"
    elif isinstance(value, str):
        yield _encode_text(value)
    elif isinstance(value, Decimal):
        if not value.is_finite():
            raise ValueError(f"{value} is not JSON")
        yield str(value)
    else:
        yield json.dumps(value, allow_nan=False)


def _encode_text(text: str) -> str:
    # A lone surrogate has no UTF-8 form; its escape is JSON all the same.
    return json.dumps(text, ensure_ascii=_SURROGATE.search(text) is not None)


# Made once: to make one takes as long as to decode a small value.
_GRAMMAR = json.JSONDecoder(parse_int=len, parse_float=len, parse_constant=_no_constant)
"""Numbers are not converted: only their grammar matters, and int() of a megabyte of digits takes seconds."""
_FIELDS = json.JSONDecoder(
    parse_int=_bounded_int,
    parse_float=_bounded_decimal,
    parse_constant=_no_constant,
    object_pairs_hook=_members,
)
_PLAIN = json.JSONDecoder(parse_int=_int_or_float)
_EXACT = json.JSONDecoder(parse_int=_exact_int, parse_float=_exact_decimal)
