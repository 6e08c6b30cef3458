"""
Monthly partitions of the invocations that have ended, made ahead of time.

No insert ever fails for want of a partition: there is a default one. What strays into it is moved when its month gets a
partition, because PostgreSQL refuses to attach one whose rows lie in the default.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, date, datetime

import psycopg
from sqlalchemy import Connection, inspect, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine

from external_agents.adapters.postgres.errors import translate_errors
from external_agents.adapters.postgres.tables import invocations

PARTITION_PREFIX = f"{invocations.name}_"
MONTHS_AHEAD = 3
UPKEEP_LOCK = 7_205_113_802
LOCK_WAIT_MS = 500
"""Less than deadlock_timeout: in a knot with live invocations it is upkeep that gives way."""

_ADD = text("SELECT external_agents_add_partition(:month)")
"""Partitions belong to the owner of the table, whoever sees to them."""


async def keep_partitions(engine: AsyncEngine) -> list[str]:
    """
    Make the partitions of this month and the next three, where they are missing. Any number of processes may call it.

    Returns:
        The names of those that were made.

    Raises:
        Unavailable: The database cannot be reached, or is too busy to give the locks; try again later.
    """
    with translate_errors():
        async with engine.connect() as connection:
            return await connection.run_sync(add_missing_partitions, datetime.now(UTC))


def add_missing_partitions(connection: Connection, now: datetime) -> list[str]:
    """The same on a connection without a transaction; each partition is made in one of its own."""
    made = []
    for start in _months(now):
        with connection.begin():
            if _add_partition(connection, start):
                made.append(_name(start))
    return made


def is_lock_timeout(error: DBAPIError) -> bool:
    return isinstance(error.orig, psycopg.errors.LockNotAvailable)


def _add_partition(connection: Connection, start: date) -> bool:
    name = _name(start)
    if _exists(connection, name):
        return False
    connection.execute(text("SELECT pg_advisory_xact_lock(:number)"), {"number": UPKEEP_LOCK})
    if _exists(connection, name):
        return False
    # LOCAL: the setting goes with the transaction, the connection may be used for other things afterwards.
    connection.execute(text(f"SET LOCAL lock_timeout = '{LOCK_WAIT_MS}ms'"))
    connection.execute(_ADD, {"month": start})
    return True


def _exists(connection: Connection, name: str) -> bool:
    # From the catalog itself: to_regclass() may answer from a cache that has not seen what we waited for.
    return inspect(connection).has_table(name)


def _name(start: date) -> str:
    return f"{PARTITION_PREFIX}{start:%Y_%m}"


def _months(now: datetime) -> Iterator[date]:
    """The first days of this month and of the next ones."""
    for month in range(now.month - 1, now.month + MONTHS_AHEAD):
        yield date(now.year + month // 12, month % 12 + 1, 1)
