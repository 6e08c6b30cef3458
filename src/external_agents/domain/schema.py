"""JSON Schemas (draft-07) compiled once; every fault of a value in one answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from itertools import islice
from typing import Any, NoReturn, TypeAlias

import fastjsonschema

from external_agents.domain.errors import FAULTS_MAX, Fault, ValidationError
from external_agents.domain.json_values import JsonValue, join_path

JsonSchema: TypeAlias = Mapping[str, Any]

DRAFT_07 = "http://json-schema.org/draft-07/schema#"

FORMATS: dict[str, tuple[Callable[[str], bool], str]] = {}
"""The `format`s that our schemas use beyond the standard ones: the check, and what to tell when it fails."""


def register_format(name: str, check: Callable[[str], bool], message: str) -> None:
    """Make `{"format": name}` an assertion in every schema compiled from now on."""
    FORMATS[name] = (check, message)


class Schema:
    """
    A compiled schema.

    Raises:
        fastjsonschema.JsonSchemaDefinitionException: When made, of a schema that is itself wrong or refers to the
            network: `$ref` reaches nothing but the schema's own parts.
    """

    def __init__(self, definition: JsonSchema) -> None:
        self.definition = definition
        self._validate = fastjsonschema.compile(
            {"$schema": DRAFT_07, **definition},
            handlers=_NoHandlers(),
            formats={name: check for name, (check, _) in FORMATS.items()},
            use_default=False,
            fast_fail=False,
        )

    def faults(self, value: JsonValue, path: str = "") -> list[Fault]:
        """Every fault of `value`, with paths that begin with `path`."""
        try:
            self._validate(_with_integers(value, self.definition))
        except fastjsonschema.JsonSchemaValuesException as failure:
            found = (fault for error in failure.errors for fault in _translate(error, path))
            return sorted(set(islice(found, FAULTS_MAX)))
        return []

    def check(self, value: JsonValue, path: str = "") -> None:
        """
        Raises:
            ValidationError: The value does not fit; all its faults.
        """
        if faults := self.faults(value, path):
            raise ValidationError(faults)


def _with_integers(value: JsonValue, definition: JsonSchema | bool) -> JsonValue:
    """For JSON Schema 1.0 and 1e2 are integers, too; for the compiler a Decimal is none."""
    if isinstance(definition, bool):
        return value
    if isinstance(value, Mapping):
        properties = definition.get("properties", {})
        return {name: _with_integers(item, properties.get(name, {})) for name, item in value.items()}
    if isinstance(value, Decimal) and _may_be_integer(definition) and value == value.to_integral_value():
        return int(value)
    return value


def _may_be_integer(definition: JsonSchema) -> bool:
    kinds = (definition, *definition.get("anyOf", ()))
    return any(isinstance(kind, Mapping) and "integer" in kind.get("type", ()) for kind in kinds)


class _NoHandlers(dict[str, Any]):
    """Stands for every URI scheme, so that the compiler's own handlers, which open URLs, are never used."""

    def __contains__(self, scheme: object) -> bool:
        return True

    def __missing__(self, scheme: str) -> Callable[[str], NoReturn]:
        return _refuse_reference


def _refuse_reference(uri: str) -> NoReturn:
    raise fastjsonschema.JsonSchemaDefinitionException(f"$ref to {uri!r}: a schema refers to its own parts only")


_MESSAGES: dict[str, Callable[[Any], str]] = {
    "type": lambda types: f"must be {_types(types)}",
    "enum": lambda values: "must be one of " + ", ".join(map(str, values)),
    "const": lambda value: f"must be {value}",
    "minLength": lambda length: "must not be empty" if length == 1 else f"must have at least {length} characters",
    "maxLength": lambda length: f"must have at most {length} characters",
    "minimum": lambda bound: f"must be at least {bound}",
    "maximum": lambda bound: f"must be at most {bound}",
    "exclusiveMaximum": lambda bound: f"must be less than {bound}",
    "minItems": lambda count: f"must have at least {count} items",
    "maxItems": lambda count: f"must have at most {count} items",
    "uniqueItems": lambda _: "must not repeat an item",
    "minProperties": lambda count: f"must have at least {count} members",
    "format": lambda name: FORMATS[name][1] if name in FORMATS else f"must be a {name}",
    "pattern": lambda pattern: f"must match {pattern}",
}

_TYPE_NAMES = {
    "string": "a string",
    "integer": "an integer",
    "number": "a number",
    "object": "an object",
    "array": "an array",
    "boolean": "a boolean",
    "null": "null",
}


def _types(types: str | list[str]) -> str:
    names = [types] if isinstance(types, str) else types
    return " or ".join(_TYPE_NAMES[name] for name in names)


def _translate(error: fastjsonschema.JsonSchemaValueException, base: str) -> Iterator[Fault]:
    """The library's messages name its variables and can quote the value, which may be a secret; ours do neither."""
    path = _path(error.name or "", base)
    definition = error.definition if isinstance(error.definition, Mapping) else {}
    if error.rule == "required":
        for name in definition["required"]:
            if name not in error.value:
                yield Fault(join_path(path, name), "is required")
    elif error.rule == "additionalProperties" and isinstance(error.value, Mapping):
        for name in error.value.keys() - definition.get("properties", {}).keys():
            yield Fault(join_path(path, name), "is not a known field")
    elif error.rule == "propertyNames":
        is_valid, message = FORMATS.get(definition["propertyNames"].get("format"), (lambda _: False, "is not valid"))
        for name in error.value:
            if not is_valid(name):
                yield Fault(join_path(path, name), f"has a name that {message}")
    elif error.rule in {"anyOf", "oneOf"}:
        wanted = [alternative.get("description", "") for alternative in definition[error.rule]]
        yield Fault(path, "must be " + " or ".join(filter(None, wanted)))
    else:
        tell = _MESSAGES.get(error.rule or "", lambda _: "is not valid")
        yield Fault(path, tell(error.rule_definition))


def _path(name: str, base: str) -> str:
    """fastjsonschema names the value `data`, its members `data.member`, its items `data[0]`."""
    tail = name.removeprefix("data")
    if not base:
        return tail.removeprefix(".")
    return base + tail
