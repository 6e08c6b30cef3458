"""This process among the others: its lease, and what it has running."""

from __future__ import annotations

import asyncio
import time
from datetime import datetime, timedelta
from math import inf
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from external_agents.adapters.postgres.engine import ANSWER_S, connected, reading, transaction
from external_agents.domain.errors import Unavailable
from external_agents.ports.ledger import HEARTBEAT_S, LEASE_S

STALE_AFTER_HEARTBEATS = 2
"""Whoever admits renews a lease of this age itself: a host need not run a heartbeat for single calls."""

# A heartbeat after a failed one, or after the lease had run out, begins a new unbroken row of them.
_BEAT = text(
    """
    INSERT INTO instances AS known (id, started_at, beating_since, lease_until, running_from)
    SELECT :id, now, now, now + :lease, :running_from FROM (SELECT clock_timestamp() AS now) AS clock
    ON CONFLICT (id) DO UPDATE SET
        lease_until = excluded.lease_until,
        running_from = excluded.running_from,
        beating_since = CASE
            WHEN :unbroken AND known.lease_until > excluded.beating_since THEN known.beating_since
            ELSE excluded.beating_since
        END
    """
)

# Only who has itself been heard of for a full lease without a break may take others for dead, and only when the server
# has been up for as long: during an outage nobody can send heartbeats, and after it everybody needs time to be heard.
_DEAD = text(
    """
    SELECT other.id, now
    FROM (SELECT clock_timestamp() AS now) AS clock, instances AS judge, instances AS other
    WHERE judge.id = :judge AND judge.lease_until > now AND judge.beating_since + :lease <= now
        AND pg_postmaster_start_time() + :lease <= now
        AND other.lease_until < now
    ORDER BY other.id LIMIT :limit
    """
)
DEAD_AT_ONCE = 100

_LOCK = text("SELECT FROM instances WHERE id = :id FOR UPDATE")
_FORGET = text("SELECT external_agents_forget_instance(:id)")
_GIVE_UP_LEASE = text("UPDATE instances SET lease_until = started_at WHERE id = :id")


class LeaseLost(Unavailable):
    """This process has not been heard of for too long; a heartbeat begins a new lease."""

    def __init__(self) -> None:
        super().__init__("This process's lease", retry_after_s=1)


class Instance:
    """
    Heartbeats, each of which says from which id on this process may have something running.

    That mark spares recovery millions of ended invocations. It holds because an id enters before its admission begins,
    and one below the stored mark only by lowering the mark first.
    """

    def __init__(
        self, engine: AsyncEngine, instance_id: UUID, *, lease_s: float = LEASE_S, heartbeat_s: float = HEARTBEAT_S
    ) -> None:
        self.id = instance_id
        self.lease = timedelta(seconds=lease_s)
        self.heartbeat_s = heartbeat_s
        self._engine = engine
        self._single = reading(engine)
        self._beating = asyncio.Lock()
        self._in_flight: set[UUID] = set()
        self._newest = UUID(int=0)
        self._stored_mark: UUID | None = None
        self._beaten_at_s = -inf
        self._unbroken = False

    async def enter(self, invocation_id: UUID) -> None:
        """Before an admission begins."""
        self._in_flight.add(invocation_id)
        self._newest = max(self._newest, invocation_id)
        if self._must_beat_for(invocation_id):
            async with self._beating:
                if self._must_beat_for(invocation_id):
                    await self._beat()

    def leave(self, invocation_id: UUID) -> None:
        """When it is certain that the invocation does not run."""
        self._in_flight.discard(invocation_id)

    def in_flight(self) -> int:
        """How many invocations may be running."""
        return len(self._in_flight)

    async def beat(self) -> None:
        async with self._beating:
            await self._beat()

    def holds_lease(self) -> bool:
        return time.monotonic() < self._beaten_at_s + self.lease.total_seconds()

    def doubt_lease(self) -> None:
        """The next admission begins with a heartbeat."""
        self._stored_mark = None

    async def retire(self) -> None:
        """End for good. What is left running, recovery need not wait for."""
        async with transaction(self._engine, within_s=ANSWER_S) as connection:
            await connection.execute(_LOCK, {"id": self.id})
            await forget(connection, self.id)
            await connection.execute(_GIVE_UP_LEASE, {"id": self.id})

    def _must_beat_for(self, invocation_id: UUID) -> bool:
        return (
            self._stored_mark is None
            or invocation_id < self._stored_mark
            or time.monotonic() - self._beaten_at_s > STALE_AFTER_HEARTBEATS * self.heartbeat_s
        )

    async def _beat(self) -> None:
        mark = min(self._in_flight, default=self._newest)
        unbroken = self._unbroken
        # Whatever interrupts this, cancellation too, leaves it unknown which mark is stored.
        self._unbroken, self._stored_mark = False, None
        began_s = time.monotonic()
        values = {"id": self.id, "lease": self.lease, "running_from": mark, "unbroken": unbroken}
        async with connected(self._single) as connection:
            await connection.execute(_BEAT, values)
        self._unbroken, self._stored_mark, self._beaten_at_s = True, mark, began_s


async def dead_instances(connection: AsyncConnection, judge: UUID, lease: timedelta) -> list[tuple[UUID, datetime]]:
    """Those whose lease had run out at that time; none when `judge` may not judge."""
    found = await connection.execute(_DEAD, {"judge": judge, "lease": lease, "limit": DEAD_AT_ONCE})
    return [(row.id, row.now) for row in found]


async def forget(connection: AsyncConnection, instance_id: UUID) -> None:
    """
    Remove an instance under which nothing runs.

    Its row must be locked FOR UPDATE before: an admission that is under way holds a lock on it, and what it admits must
    be seen here.
    """
    await connection.execute(_FORGET, {"id": instance_id})
