"""The ledger in PostgreSQL, with group commit."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from uuid import UUID

import attrs
from sqlalchemy.ext.asyncio import AsyncEngine

from external_agents.adapters.postgres import settlement
from external_agents.adapters.postgres.columns import storable
from external_agents.adapters.postgres.engine import ANSWER_S, reading, reading_of, transaction
from external_agents.adapters.postgres.forecast import forecast
from external_agents.adapters.postgres.grouped.batch import Earlier
from external_agents.adapters.postgres.grouped.committer import GroupCommitter
from external_agents.adapters.postgres.grouped.shards import ShardGroups
from external_agents.adapters.postgres.instances import Instance, LeaseLost
from external_agents.adapters.postgres.invocations import PostgresInvocations
from external_agents.adapters.postgres.recovery import Recovery
from external_agents.domain.errors import AdmissionInDoubt
from external_agents.domain.invocation import ExternalAgentInvocation
from external_agents.ports.ledger import HEARTBEAT_S, LEASE_S, Admission, AdmissionRequest, Forecast, InvocationLedger
from external_agents.ports.observability import BatchRecord


class PostgresLedger(InvocationLedger):
    """
    Args:
        engine: The ledger does not own it.
        instance_id: Of this process since its start; a new one for each start.
        endings: Other connections, for all that is written, so that it does not wait behind what is read; `engine` by
            default.
        shard_groups: 1 on a single PostgreSQL; the shard count where the tables are distributed by organisation. Each
            group of organisations has a queue of its own.
        observe: Told of every batch.
        lease_s: How long an instance that is not heard of is taken to live: the same for all that share a database.
        heartbeat_s: How often `heartbeat` and `recover` are to be called; a lease is several of it.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        instance_id: UUID,
        *,
        endings: AsyncEngine | None = None,
        shard_groups: int = 1,
        observe: Callable[[BatchRecord], None] = lambda record: None,
        lease_s: float = LEASE_S,
        heartbeat_s: float = HEARTBEAT_S,
    ) -> None:
        self.heartbeat_s = heartbeat_s
        self._endings = endings or engine
        self._reading = reading(engine)
        self._invocations = PostgresInvocations(engine)
        self._instance = Instance(self._endings, instance_id, lease_s=lease_s, heartbeat_s=heartbeat_s)
        self._recovery = Recovery(self._endings, self._instance)
        self._shards = ShardGroups(engine, shard_groups)
        self._committers = [
            GroupCommitter(
                self._endings,
                instance_id,
                in_flight=self._instance.in_flight,
                doubt=lambda request: self._recovery.doubt(request.org_id, request.invocation_id),
                observe=observe,
            )
            for _ in range(shard_groups)
        ]

    async def admit(self, request: AdmissionRequest) -> Admission:
        try:
            return await self._admit(request)
        except LeaseLost:
            # It slept, or admits for the first time in a long while, without a heartbeat beside it.
            self._instance.doubt_lease()
            return await self._admit(request)

    async def _admit(self, request: AdmissionRequest) -> Admission:
        invocation_id = request.invocation_id
        try:
            await self._instance.enter(invocation_id)
            admitted = await (await self._committer_of(request.org_id)).admit(request)
        except AdmissionInDoubt:
            raise
        except asyncio.CancelledError:
            self._recovery.doubt(request.org_id, invocation_id)
            raise
        except Exception:
            self._instance.leave(invocation_id)
            raise
        if isinstance(admitted, Earlier):
            self._instance.leave(invocation_id)
            earlier = await self._invocations.read(request.org_id, request.agent_id, admitted.invocation_id)
            return Admission(invocation=earlier, quotas=admitted.quotas, replayed=True)
        return admitted

    async def settle(self, finished: ExternalAgentInvocation) -> ExternalAgentInvocation:
        if await (await self._committer_of(finished.org_id)).settle(finished):
            stored = finished
            if finished.error_message is not None:
                stored = attrs.evolve(finished, error_message=storable(finished.error_message))
        else:
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
        End this instance in good order, after the last settlement, so that nobody has to wait for its lease, and
        nothing is left that uses the engines.

        What is left running all the same, the next recovery ends.

        Raises:
            Unavailable: The lease runs out by itself.
        """
        await asyncio.gather(*(committer.end() for committer in self._committers))
        await self._instance.retire()

    async def _committer_of(self, org_id: str) -> GroupCommitter:
        return self._committers[await self._shards.group_of(org_id)]
