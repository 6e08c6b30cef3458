"""
Monthly partitions of the invocations that have ended, made ahead of time.

No insert ever fails for want of a partition: there is a default one. What strays into it is moved when its month gets a
partition, because PostgreSQL refuses to attach one whose rows lie in the default.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

import psycopg
from sqlalchemy import Connection, inspect, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine

from external_agents.adapters.postgres.errors import translate_errors
from external_agents.adapters.postgres.tables import invocations
from external_agents.domain.ids import first_id_at

PARTITION_PREFIX = f"{invocations.name}_"
DEFAULT_PARTITION = f"{PARTITION_PREFIX}default"
MONTHS_AHEAD = 3
UPKEEP_LOCK = 7_205_113_802
LOCK_WAIT_MS = 500
"""Less than deadlock_timeout: in a knot with live invocations it is upkeep that gives way."""


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
    for start, end in _months(now):
        with connection.begin():
            if _add_partition(connection, start, end):
                made.append(_name(start))
    return made


def is_lock_timeout(error: DBAPIError) -> bool:
    return isinstance(error.orig, psycopg.errors.LockNotAvailable)


def _add_partition(connection: Connection, start: datetime, end: datetime) -> bool:
    name = _name(start)
    if _exists(connection, name):
        return False
    connection.execute(text("SELECT pg_advisory_xact_lock(:number)"), {"number": UPKEEP_LOCK})
    if _exists(connection, name):
        return False
    # LOCAL: the setting goes with the transaction, the connection may be used for other things afterwards.
    connection.execute(text(f"SET LOCAL lock_timeout = '{LOCK_WAIT_MS}ms'"))
    columns = ", ".join(column.name for column in invocations.columns)
    bounds = {"first": first_id_at(start), "end": first_id_at(end)}
    connection.execute(text(f"CREATE TABLE {name} (LIKE {invocations.name} INCLUDING DEFAULTS)"))
    # Nothing may stray in between the move and the attachment.
    connection.execute(text(f"LOCK TABLE {DEFAULT_PARTITION} IN ACCESS EXCLUSIVE MODE"))
    connection.execute(
        text(
            f"WITH strays AS (DELETE FROM {DEFAULT_PARTITION} WHERE id >= :first AND id < :end RETURNING {columns}) "  # noqa: S608
            f"INSERT INTO {name} ({columns}) SELECT {columns} FROM strays"
        ),
        bounds,
    )
    connection.execute(
        text(
            f"ALTER TABLE {invocations.name} ATTACH PARTITION {name} "
            f"FOR VALUES FROM (true, '{bounds['first']}') TO (true, '{bounds['end']}')"
        )
    )
    return True


def _exists(connection: Connection, name: str) -> bool:
    # From the catalog itself: to_regclass() may answer from a cache that has not seen what we waited for.
    return inspect(connection).has_table(name)


def _name(start: datetime) -> str:
    return f"{PARTITION_PREFIX}{start:%Y_%m}"


def _months(now: datetime) -> Iterator[tuple[datetime, datetime]]:
    """This month and the next ones: first moment, first moment of the following one."""
    start = datetime(now.year, now.month, 1, tzinfo=UTC)
    for _ in range(MONTHS_AHEAD + 1):
        end = datetime(start.year + start.month // 12, start.month % 12 + 1, 1, tzinfo=UTC)
        yield start, end
        start = end
