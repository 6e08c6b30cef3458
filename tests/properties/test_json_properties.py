"""JSON in and out: nothing is lost, nothing unstorable gets through, no bytes break anything."""

from __future__ import annotations

import json
import math
from decimal import Decimal
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from external_agents.domain.errors import MalformedJson, ValidationError
from external_agents.domain.json_values import JsonText, decode, dumps, merge_patch, plain_value
from external_agents.testing.strategies import field_values, payloads


def written(value: Any) -> str:
    """A form that tells 1 from 1.0, and 0.10 from 0.1."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{name!r}:{written(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(written, value)) + "]"
    return repr(value)


@given(field_values())
def test_decoding_what_was_written_gives_the_same_to_the_digit(value: Any) -> None:
    assert written(decode(dumps(value).encode())) == written(value)
    assert written(plain_value(value)) == written(value)


@given(payloads())
def test_a_payload_is_kept(value: Any) -> None:
    text = JsonText.of(value)
    assert written(text.value) == written(value)
    assert JsonText.parse(text.text.encode()) == text


hostile = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(10**300, 10**320)
    | st.floats()
    | st.decimals()
    | st.text(st.characters())
    | st.binary(max_size=3),
    lambda values: (
        st.lists(values, max_size=4)
        | st.dictionaries(st.text(st.characters(), max_size=5) | st.integers(), values, max_size=4)
        | st.tuples(values, st.integers(55, 70)).map(lambda pair: _nested(*pair))
    ),
    max_leaves=10,
)


def _nested(value: Any, levels: int) -> Any:
    for _ in range(levels):
        value = [value]
    return value


def storable(value: Any, depth: int = 0) -> bool:
    """What jsonb holds and other readers can take."""
    if depth > 64:
        return False
    if isinstance(value, str):
        return "\0" not in value and value == value.encode("utf-8", "ignore").decode()
    if isinstance(value, bool) or value is None:
        return True
    if isinstance(value, int | Decimal):
        return math.isfinite(float(value)) and (not value or float(value) != 0)
    if isinstance(value, list):
        return all(storable(item, depth + isinstance(item, list | dict)) for item in value)
    return isinstance(value, dict) and all(
        isinstance(name, str) and storable(name) and storable(item, depth + isinstance(item, list | dict))
        for name, item in value.items()
    )


@settings(max_examples=300)
@given(hostile)
@example(Decimal("1E-99999999999"))
@example(Decimal("-0"))
@example({"a": 5e-324})
def test_nothing_unstorable_gets_through(value: Any) -> None:
    try:
        plain = plain_value(value)
    except ValidationError as invalid:
        str(invalid).encode()
        return
    assert storable(plain, 1)
    dumps(plain).encode()


@settings(max_examples=300)
@given(
    st.binary(max_size=60)
    | st.text('[]{}"\\:,0123456789.eE+-ntrufalsNI \u00fc\ud800', max_size=40).map(
        lambda text: text.encode("utf-8", "surrogatepass")
    )
)
def test_no_bytes_break_anything(raw: bytes) -> None:
    """Whatever both readers take, the standard library takes as well, and the other way round."""
    try:
        text = JsonText.parse(raw)
    except MalformedJson:
        text = None
    try:
        decode(raw)
        assert text is not None
    except MalformedJson:
        assert text is None
    try:
        json.loads(raw.decode(), parse_constant=lambda _: 1 / 0)
        assert text is not None
    except (ValueError, ZeroDivisionError):
        assert text is None
    if text is not None:
        text.exact()


@given(field_values(), field_values())
def test_a_merge_patch_makes_its_members_so(target: Any, patch: Any) -> None:
    before = written(target)
    merged = merge_patch(target, patch)
    assert written(target) == before
    assert written(merge_patch(merged, patch)) == written(merged)
    if isinstance(patch, dict):
        for name, value in patch.items():
            assert (name in merged) == (value is not None)
            if not isinstance(value, dict) and value is not None:
                assert written(merged[name]) == written(value)
        if isinstance(target, dict):
            assert {name: merged[name] for name in target.keys() - patch.keys()} == {
                name: target[name] for name in target.keys() - patch.keys()
            }
