"""Clearing idempotency keys that have expired. Until then they are overwritten in place by admissions."""

from __future__ import annotations

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from external_agents.adapters.postgres.engine import transaction

CLEARED_AT_ONCE = 1_000
CLEARING_LOCK = 7_205_113_803
LOCK_WAIT_MS = 500
"""Less than deadlock_timeout: in a knot with live admissions it is the clearing that gives way."""

_CLEAR = text("SELECT external_agents_clear_idempotency_keys(:at_once)")


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
    while True:
        async with transaction(engine) as connection:
            if not await _is_mine(connection):
                return cleared
            batch: int = (await connection.execute(_CLEAR, {"at_once": at_once})).scalar_one()
        cleared += batch
        if batch < at_once:
            return cleared


async def _is_mine(connection: AsyncConnection) -> bool:
    # LOCAL: the setting goes with the transaction, as the lock does.
    await connection.execute(text(f"SET LOCAL lock_timeout = '{LOCK_WAIT_MS}ms'"))
    return bool(await connection.scalar(text("SELECT pg_try_advisory_xact_lock(:number)"), {"number": CLEARING_LOCK}))
