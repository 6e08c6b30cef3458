"""What is packed as an array, PostgreSQL reads as the same array."""

from __future__ import annotations

import math
import struct
from collections.abc import AsyncIterator
from datetime import UTC, date, datetime, timedelta, timezone
from typing import Any

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from external_agents.adapters.postgres.grouped.arrays import (
    Array,
    Booleans,
    Bytes,
    Dates,
    Integers,
    Moments,
    Shorts,
    Texts,
    Uuids,
    register_arrays,
)
from external_agents.testing.strategies import texts
from postgres_server import dsn

ZONES = st.integers(-14 * 60, 14 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes)))
MOMENTS = st.datetimes(timezones=ZONES) | st.sampled_from(
    [datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC), datetime(2000, 1, 1, tzinfo=UTC)]
)
DATES = st.dates() | st.sampled_from([date.min, date.max, date(2000, 1, 1), date(1999, 12, 31), date(2000, 2, 29)])

ELEMENTS: dict[type[Array], st.SearchStrategy[Any]] = {
    Texts: st.none() | texts() | st.sampled_from(["", "NULL", '{"a",b}', "\\", "\U0010ffff", "ü" * 100]),
    Bytes: st.none() | st.binary(max_size=100) | st.just(b"\0"),
    Uuids: st.integers(0, 2**128 - 1),
    Shorts: st.integers(-(2**15), 2**15 - 1),
    Integers: st.none() | st.integers(-(2**31), 2**31 - 1),
    Booleans: st.booleans(),
    Dates: DATES,
    Moments: st.none() | MOMENTS,
}
NAMES = {
    Texts: "text",
    Bytes: "bytea",
    Uuids: "uuid",
    Shorts: "smallint",
    Integers: "integer",
    Booleans: "boolean",
    Dates: "date",
    Moments: "timestamptz",
}


@pytest.fixture(scope="module")
async def connection(postgres_server: Any, postgres_url_template: str) -> AsyncIterator[psycopg.AsyncConnection]:
    with postgres_server.database() as name:
        async with await psycopg.AsyncConnection.connect(
            dsn(postgres_server.url(name)), autocommit=True, options="-c TimeZone=UTC"
        ) as connected:
            register_arrays(connected.adapters)
            yield connected


@pytest.mark.parametrize("kind", ELEMENTS, ids=lambda kind: kind.__name__)
@given(data=st.data())
async def test_an_array_arrives_as_it_was(
    connection: psycopg.AsyncConnection, kind: type[Array], data: st.DataObject
) -> None:
    values = data.draw(st.lists(ELEMENTS[kind], max_size=200) | st.lists(ELEMENTS[kind], min_size=1, max_size=3))
    rows = await connection.execute(
        f"SELECT n, e, pg_typeof(%s)::text FROM unnest(%s::{NAMES[kind]}[]) WITH ORDINALITY AS u (e, n) ORDER BY n",
        [kind(values), kind(values)],
        binary=True,
    )
    found = await rows.fetchall()
    assert [row[1].int if kind is Uuids else row[1] for row in found] == values
    assert {row[2] for row in found} <= {NAMES[kind].replace("timestamptz", "timestamp with time zone") + "[]"}


@pytest.mark.parametrize("kind", ELEMENTS, ids=lambda kind: kind.__name__)
async def test_an_empty_array_is_empty_and_not_null(connection: psycopg.AsyncConnection, kind: type[Array]) -> None:
    for empty in (kind(), kind([])):
        row = await (await connection.execute("SELECT %s IS NULL, cardinality(%s)", [empty, empty])).fetchone()
        assert row == (False, 0)


@pytest.mark.parametrize(
    ("kind", "misfit"),
    [
        (Texts, "\ud800"),
        (Texts, 7),
        (Bytes, "text"),
        (Uuids, None),
        (Shorts, 2**15),
        (Integers, 2**31),
        (Integers, -(2**31) - 1),
        (Integers, math.pi),
        (Dates, "2026-01-01"),
        (Moments, datetime(2026, 1, 1)),  # noqa: DTZ001 - naive on purpose
    ],
)
def test_what_does_not_fit_is_told_as_it_is_packed(kind: type[Array], misfit: object) -> None:
    """Not when the call is under way, where nobody could tell whether it was sent."""
    with pytest.raises((AttributeError, TypeError, ValueError, struct.error)):
        kind([misfit])


async def test_text_with_nul_is_the_servers_to_refuse(connection: psycopg.AsyncConnection) -> None:
    with pytest.raises(psycopg.errors.CharacterNotInRepertoire):
        await connection.execute("SELECT %s", [Texts(["a\0b"])])
