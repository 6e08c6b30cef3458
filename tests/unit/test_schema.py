"""JSON Schemas: every fault by path, no reference out of the schema."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import fastjsonschema
import pytest

from external_agents.domain.catalog import BUILT_IN
from external_agents.domain.errors import FAULTS_MAX, Fault
from external_agents.domain.schema import Schema


@pytest.fixture
def sockets_that_give_up() -> Iterator[None]:
    """So that a connection that must not be, to a server that never answers, fails the test and does not hang it."""
    socket.setdefaulttimeout(2)
    yield
    socket.setdefaulttimeout(None)


@pytest.mark.parametrize(
    "reference",
    [
        "http://{server}/schema.json",
        "https://{server}/schema.json#/definitions/x",
        "HTTP://{server}/",
        "ftp://{server}/",
        "//{server}/schema",
        "file:///etc/hostname",
        "gopher://{server}/",
        "data:application/json,{{}}",
        "schema.json",
        "unheard-of:x",
    ],
)
def test_a_reference_out_of_the_schema_is_refused_and_reaches_no_server(
    reference: str, sockets_that_give_up: None
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        where = reference.format(server=f"127.0.0.1:{server.getsockname()[1]}")
        for definition in ({"$ref": where}, {"properties": {"a": {"items": {"$ref": where}}}}):
            with pytest.raises(fastjsonschema.JsonSchemaDefinitionException):
                Schema(definition)
        with pytest.raises(BlockingIOError):
            server.accept()


def test_a_reference_in_a_document_is_data() -> None:
    BUILT_IN.create_schema.faults({"platform_config": {"$ref": "http://127.0.0.1:1/"}})
    assert Schema({"type": "object"}).faults({"$ref": "http://127.0.0.1:1/", "$id": "x", "$schema": 5}) == []


def test_a_reference_within_the_schema_works() -> None:
    schema = Schema({"definitions": {"text": {"type": "string"}}, "properties": {"a": {"$ref": "#/definitions/text"}}})
    assert schema.faults({"a": 1}, "base") == [Fault("base.a", "must be a string")]


@pytest.mark.parametrize(
    ("definition", "value", "faults"),
    [
        ({"type": ["string", "null"]}, 1, [Fault("", "must be a string or null")]),
        ({"required": ["b", "a"]}, {}, [Fault("a", "is required"), Fault("b", "is required")]),
        (
            {"additionalProperties": False, "properties": {"a": {}}},
            {"a": 1, "c.d": 1, "{b}": 1, "": 1},
            [Fault("", "is not a known field"), Fault("c.d", "is not a known field"),
             Fault("{b}", "is not a known field")],
        ),
        ({"items": {"minLength": 1}}, ["", "x", ""], [Fault("[0]", "must not be empty"),
                                                       Fault("[2]", "must not be empty")]),
        ({"propertyNames": {"pattern": "^x"}}, {"a": 1}, [Fault("a", "has a name that is not valid")]),
        ({"pattern": "^[a-z]$"}, "a\n", [Fault("", "must match ^[a-z]$")]),
        ({"not": {}}, 1, [Fault("", "is not valid")]),
        ({"minimum": 1, "maximum": 2, "type": "integer"}, 0, [Fault("", "must be at least 1")]),
        ({"maxItems": 1, "uniqueItems": True}, [1, 1], [Fault("", "must have at most 1 items"),
                                                         Fault("", "must not repeat an item")]),
    ],
)  # fmt: skip
def test_faults(definition: dict[str, Any], value: Any, faults: list[Fault]) -> None:
    assert Schema(definition).faults(value) == faults


@pytest.mark.parametrize(
    "definition", [{"type": "integer"}, {"type": ["integer", "null"]}, {"anyOf": [{"type": "integer"}]}]
)
def test_an_integer_may_be_written_with_a_fraction_of_zero(definition: dict[str, Any]) -> None:
    schema = Schema({"properties": {"count": {**definition, "maximum": 100}, "any": True}})
    assert schema.faults({"count": Decimal("1.0"), "any": Decimal("1.0")}) == []
    assert schema.faults({"count": Decimal("1e2")}) == []
    assert [fault.path for fault in schema.faults({"count": Decimal("1.5")})] == ["count"]
    assert [fault.path for fault in schema.faults({"count": Decimal("1e3")})] == ["count"]


def test_faults_are_bounded() -> None:
    assert len(Schema({"items": {"type": "string"}}).faults([1] * (FAULTS_MAX + 5))) == FAULTS_MAX
    assert len(Schema({"additionalProperties": False}).faults(dict.fromkeys(map(str, range(5000)), 1))) == FAULTS_MAX


def test_a_value_is_not_in_the_message() -> None:
    schema = Schema({"properties": {"a": {"type": "integer", "enum": [1], "const": 1, "maxLength": 1}}})
    assert "s3cret" not in "".join(map(str, schema.faults({"a": "s3cret"})))


def test_a_schema_that_is_wrong_is_refused_when_it_is_made() -> None:
    with pytest.raises(fastjsonschema.JsonSchemaDefinitionException):
        Schema({"type": "strange"})
