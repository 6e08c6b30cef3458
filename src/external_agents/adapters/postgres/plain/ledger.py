"""Locks are taken in one order: an instance, an agent's windows, an invocation, accounts, an idempotency key."""

from __future__ import annotations

from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncEngine

from external_agents.adapters.postgres import settlement
from external_agents.adapters.postgres.engine import ANSWER_S, reading, reading_of, transaction
from external_agents.adapters.postgres.forecast import forecast
from external_agents.adapters.postgres.instances import Instance, LeaseLost
from external_agents.adapters.postgres.plain import admission
from external_agents.adapters.postgres.plain.turnstile import Turnstile
from external_agents.adapters.postgres.recovery import Recovery
from external_agents.domain.invocation import ExternalAgentInvocation
from external_agents.ports.ledger import HEARTBEAT_S, LEASE_S, Admission, AdmissionRequest, Forecast, InvocationLedger


class PlainPostgresLedger(InvocationLedger):
    """
    Args:
        engine: The ledger does not own it.
        instance_id: Of this process since its start; a new one for each start.
        endings: Other connections, for settlements, heartbeats and recovery, so that what has begun does not wait
            behind what wants to begin; `engine` by default.
        lease_s: How long an instance that is not heard of is taken to live: the same for all that share a database.
        heartbeat_s: How often `heartbeat` and `recover` are to be called; a lease is several of it.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        instance_id: UUID,
        *,
        endings: AsyncEngine | None = None,
        lease_s: float = LEASE_S,
        heartbeat_s: float = HEARTBEAT_S,
    ) -> None:
        self.heartbeat_s = heartbeat_s
        self._engine = engine
        self._endings = endings or engine
        self._reading = reading(engine)
        self._instance = Instance(self._endings, instance_id, lease_s=lease_s, heartbeat_s=heartbeat_s)
        self._recovery = Recovery(self._endings, self._instance)
        self._turnstile = Turnstile()

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
        if request.idempotency_key is not None:
            _ = request.request_hash  # Taken now, it does not take time while the agent is locked.
        try:
            await self._instance.enter(invocation_id)
            turn = self._turnstile.turn((request.org_id, request.agent_id))
            async with turn, transaction(self._engine, request.org_id) as connection:
                admitted = await admission.admit(connection, request, self._instance.id)
        except BaseException:
            if admitted is None or admitted.replayed:
                self._instance.leave(invocation_id)
            else:
                # The commit was on its way when the connection broke or the caller went away: did it arrive?
                self._recovery.doubt(request.org_id, invocation_id)
            raise
        if admitted.replayed:
            self._instance.leave(invocation_id)
        return admitted

    async def settle(self, finished: ExternalAgentInvocation) -> ExternalAgentInvocation:
        async with transaction(self._endings, finished.org_id) as connection:
            stored = await settlement.settle(connection, finished)
        self._instance.leave(finished.id)
        return stored

    async def record(self, finished: ExternalAgentInvocation) -> None:
        async with transaction(self._endings, finished.org_id, within_s=ANSWER_S) as connection:
            await settlement.record(connection, finished)

    async def forecast(self, org_id: str, agent_id: UUID) -> Forecast:
        async with reading_of(self._reading, org_id) as connection:
            return await forecast(connection, org_id, agent_id)

    async def heartbeat(self) -> None:
        await self._instance.beat()

    def holds_lease(self) -> bool:
        return self._instance.holds_lease()

    async def recover(self) -> int:
        return await self._recovery.recover()

    async def retire(self) -> None:
        """
        End this instance in good order, after the last settlement, so that nobody has to wait for its lease.

        What is left running all the same, the next recovery ends.

        Raises:
            Unavailable: The lease runs out by itself.
        """
        await self._instance.retire()
