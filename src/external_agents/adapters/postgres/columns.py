"""How values lie in columns, where SQLAlchemy's own types would change them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from sqlalchemy import ColumnElement, Text, cast
from sqlalchemy.types import UserDefinedType

from external_agents.domain.json_values import JsonValue, dumps


class StoredJson(UserDefinedType[str]):
    """`json` or `jsonb`, as text on both ways: a decoder between would make floats of numbers and lose their digits."""

    cache_ok = True

    def __init__(self, name: str) -> None:
        self.name = name

    def get_col_spec(self, **_: Any) -> str:
        return self.name

    def bind_expression(self, bindvalue: Any) -> ColumnElement[str]:
        return cast(bindvalue, self)

    def column_expression(self, colexpr: Any) -> ColumnElement[str]:
        return cast(colexpr, Text)


JSON_TEXT = StoredJson("JSON")
"""What is kept as it came and never searched: jsonb would refuse `\\u0000` and reorder members."""

JSONB_TEXT = StoredJson("JSONB")


def config_text(config: Mapping[str, JsonValue] | None) -> str | None:
    return None if config is None else dumps(config)


def config_of(text: str | None) -> JsonValue:
    """Whole numbers as int, all others as Decimal, so that a config is shown as it was sent."""
    return None if text is None else json.loads(text, parse_float=Decimal)


def storable(text: str | None) -> str | None:
    """
    The text without the characters that PostgreSQL's text cannot hold: NUL and lone surrogates.

    For what an agent or a header brought along: the end of an invocation must never fail to be stored.
    """
    if text is None:
        return None
    return text.replace("\0", "\ufffd").encode("utf-8", "replace").decode("utf-8")
