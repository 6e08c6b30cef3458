"""Ending what dead instances left running, and what an admission may have left behind whose answer was lost."""

from __future__ import annotations

import time
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from external_agents.adapters.postgres import settlement
from external_agents.adapters.postgres.engine import STATEMENT_TIMEOUT_S, transaction
from external_agents.adapters.postgres.instances import Instance, dead_instances
from external_agents.adapters.postgres.tables import invocations

DOUBT_S = 4.0 * STATEMENT_TIMEOUT_S
"""By then the server has ended every transaction that a client lost sight of."""


class Recovery:
    """On behalf of one instance, which may judge others while its own heartbeats are unbroken."""

    def __init__(self, engine: AsyncEngine, instance: Instance) -> None:
        self._engine = engine
        self._instance = instance
        self._doubtful: dict[UUID, tuple[str, float]] = {}

    def doubt(self, org_id: str, invocation_id: UUID) -> None:
        """It may have been admitted, and nobody is going to carry it out: the next `recover` looks."""
        self._doubtful[invocation_id] = org_id, time.monotonic() + DOUBT_S

    async def recover(self) -> int:
        """End as `unknown`, charged. Returns how many were ended."""
        ended = await self._end_doubtful()
        async with transaction(self._engine) as connection:
            dead = await dead_instances(connection, self._instance.id, self._instance.lease)
        for instance_id, now in dead:
            while True:
                async with transaction(self._engine) as connection:
                    batch = await settlement.recover_instance(connection, instance_id, now)
                ended += batch
                if batch < settlement.RECOVERED_AT_ONCE:
                    break
        return ended

    async def _end_doubtful(self) -> int:
        ended = 0
        for invocation_id, (org_id, until_s) in list(self._doubtful.items()):
            async with transaction(self._engine, org_id) as connection:
                now = (await connection.execute(text("SELECT clock_timestamp()"))).scalar_one()
                found = await settlement.interrupt(
                    connection,
                    now,
                    invocations.c.org_id == org_id,
                    invocations.c.id == invocation_id,
                    invocations.c.instance_id == self._instance.id,
                )
            if found or time.monotonic() > until_s:
                del self._doubtful[invocation_id]
                self._instance.leave(invocation_id)
            ended += found
        return ended
