"""Clearing idempotency keys that have expired. Until then they are overwritten in place by admissions."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import delete, select, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from external_agents.adapters.postgres.engine import transaction
from external_agents.adapters.postgres.tables import idempotency_keys
from external_agents.domain.idempotency import KEPT_FOR

CLEARED_AT_ONCE = 1_000
CLEARING_LOCK = 7_205_113_803
LOCK_WAIT_MS = 500
"""Less than deadlock_timeout: in a knot with live admissions it is the clearing that gives way."""

_expires = idempotency_keys.c.created_at


async def clear_expired(engine: AsyncEngine, *, at_once: int = CLEARED_AT_ONCE) -> int:
    """
    Delete keys that have expired, in transactions of `at_once` (some more where several are of one moment).

    Any number of processes may call it: while one clears, the others leave it to that one.

    Returns:
        How many were deleted.

    Raises:
        Unavailable: The database cannot be reached, or an admission held a key for too long; try again later.
    """
    cleared = 0
    async with transaction(engine) as connection:
        expired_at = await connection.scalar(text("SELECT clock_timestamp()")) - KEPT_FOR
    while True:
        async with transaction(engine) as connection:
            if not await _is_mine(connection):
                return cleared
            until = await _end_of_batch(connection, expired_at, at_once)
            deleted = await connection.execute(delete(idempotency_keys).where(_expires <= (until or expired_at)))
        cleared += deleted.rowcount
        if until is None:
            return cleared


async def _is_mine(connection: AsyncConnection) -> bool:
    # LOCAL: the setting goes with the transaction, as the lock does.
    await connection.execute(text(f"SET LOCAL lock_timeout = '{LOCK_WAIT_MS}ms'"))
    return bool(await connection.scalar(text("SELECT pg_try_advisory_xact_lock(:number)"), {"number": CLEARING_LOCK}))


async def _end_of_batch(connection: AsyncConnection, expired_at: datetime, at_once: int) -> datetime | None:
    """
    The time of the last key of a batch; None where what is left is less than one.

    A time, not the keys themselves: a DELETE by nothing but a bound of created_at runs wherever the rows lie.
    """
    last = select(_expires).where(_expires <= expired_at).order_by(_expires).limit(1).offset(at_once - 1)
    until: datetime | None = await connection.scalar(last)
    return until
