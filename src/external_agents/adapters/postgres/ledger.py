"""
The ledger in PostgreSQL: one transaction of a few statements for every step.

Locks are taken in one order everywhere: an instance, an agent's windows, an invocation, accounts by their keys.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import UUID

import attrs
from sqlalchemy import insert, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from external_agents.adapters.postgres import admission, settlement
from external_agents.adapters.postgres.engine import STATEMENT_TIMEOUT_S, reading
from external_agents.adapters.postgres.errors import translate_errors
from external_agents.adapters.postgres.instances import Instance, LeaseLost, dead_instances
from external_agents.adapters.postgres.rows import invocation_values
from external_agents.adapters.postgres.tables import invocations
from external_agents.adapters.postgres.turnstile import Turnstile
from external_agents.domain.ids import created_at_of
from external_agents.domain.invocation import ExternalAgentInvocation
from external_agents.ports.ledger import Admission, AdmissionRequest, Forecast, InvocationLedger

DOUBT_S = 4.0 * STATEMENT_TIMEOUT_S
"""By then the server has ended every transaction that a client lost sight of."""


class PostgresLedger(InvocationLedger):
    """
    Args:
        engine: The ledger does not own it.
        instance_id: Of this process since its start; a new one for each start.
        endings: Other connections, for settlements, heartbeats and recovery, so that what has begun does not wait
            behind what wants to begin; `engine` by default.
    """

    def __init__(self, engine: AsyncEngine, instance_id: UUID, *, endings: AsyncEngine | None = None) -> None:
        self._engine = engine
        self._endings = endings or engine
        self._reading = reading(engine)
        self._instance = Instance(self._endings, instance_id)
        self._turnstile = Turnstile()
        self._doubtful: dict[UUID, tuple[str, float]] = {}

    async def admit(self, request: AdmissionRequest) -> Admission:
        try:
            return await self._admit(request)
        except LeaseLost:
            # It slept, or admits for the first time in a long while, without a heartbeat beside it.
            self._instance.doubt_lease()
            return await self._admit(request)

    async def _admit(self, request: AdmissionRequest) -> Admission:
        invocation_id = request.invocation_id
        admitted = None
        try:
            await self._instance.enter(invocation_id)
            turn = self._turnstile.turn((request.org_id, request.agent_id))
            async with turn, _transaction(self._engine) as connection:
                admitted = await admission.admit(connection, request, self._instance.id)
        except BaseException:
            if admitted is None:
                self._instance.leave(invocation_id)
            else:
                # The commit was on its way when the connection broke or the caller went away: did it arrive?
                self._doubtful[invocation_id] = request.org_id, time.monotonic() + DOUBT_S
            raise
        return admitted

    async def settle(self, finished: ExternalAgentInvocation) -> ExternalAgentInvocation:
        async with _transaction(self._endings) as connection:
            stored = await settlement.settle(connection, finished)
        self._instance.leave(finished.id)
        return stored

    async def record(self, finished: ExternalAgentInvocation) -> None:
        values = invocation_values(attrs.evolve(finished, created_at=created_at_of(finished.id)))
        async with _transaction(self._endings) as connection:
            await connection.execute(insert(invocations).values(values))

    async def forecast(self, org_id: str, agent_id: UUID) -> Forecast:
        with translate_errors():
            async with self._reading.connect() as connection:
                return await admission.forecast(connection, org_id, agent_id)

    async def heartbeat(self) -> None:
        await self._instance.beat()

    async def recover(self) -> int:
        ended = await self._end_doubtful()
        async with _transaction(self._endings) as connection:
            dead = await dead_instances(connection, self._instance.id)
        for instance_id, now in dead:
            while True:
                async with _transaction(self._endings) as connection:
                    batch = await settlement.recover_instance(connection, instance_id, now)
                ended += batch
                if batch < settlement.RECOVERED_AT_ONCE:
                    break
        return ended

    async def retire(self) -> None:
        """
        End this instance in good order, after the last settlement, so that nobody has to wait for its lease.

        What is left running all the same, the next recovery ends.

        Raises:
            Unavailable: The lease runs out by itself.
        """
        await self._instance.retire()

    async def _end_doubtful(self) -> int:
        """End what `admit` may have recorded although it did not return; nobody is going to carry it out."""
        ended = 0
        for invocation_id, (org_id, until_s) in list(self._doubtful.items()):
            async with _transaction(self._endings) as connection:
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


@asynccontextmanager
async def _transaction(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    with translate_errors():
        async with engine.begin() as connection:
            yield connection
