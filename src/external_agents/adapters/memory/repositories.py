"""Agents and invocations in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from uuid import UUID

import attrs

from external_agents.adapters.memory.store import MemoryStore
from external_agents.domain.agent import ExternalAgent
from external_agents.domain.errors import InvocationNotFound, StaleVersion
from external_agents.domain.ids import first_id_at
from external_agents.domain.invocation import ExternalAgentInvocation
from external_agents.ports.repositories import (
    AgentQuery,
    AgentReader,
    AgentWriter,
    InvocationQuery,
    InvocationReader,
)


class MemoryAgentReader(AgentReader):
    def __init__(self, store: MemoryStore) -> None:
        self._store = store

    async def read(self, org_id: str, agent_id: UUID) -> ExternalAgent:
        return self._store.agent(org_id, agent_id)

    async def list(self, query: AgentQuery, *, offset: int, limit: int) -> Sequence[ExternalAgent]:
        return self._matching(query, "")[offset : offset + limit]

    async def count(self, query: AgentQuery, *, text: str | None = None) -> int:
        return len(self._matching(query, text or ""))

    async def exists(self, org_id: str, agent_id: UUID) -> bool:
        return (org_id, agent_id) in self._store.agents

    async def search(self, query: AgentQuery, text: str, *, offset: int, limit: int) -> Sequence[ExternalAgent]:
        return self._matching(query, text)[offset : offset + limit]

    def _matching(self, query: AgentQuery, text: str) -> Sequence[ExternalAgent]:
        wanted = text.casefold()
        found = (
            agent
            for agent in self._store.agents.values()
            if agent.org_id == query.org_id
            and (agent.status is query.status if query.status else not agent.is_deleted)
            and query.provider in {None, agent.provider}
            and (query.tag is None or query.tag in agent.tags)
            and (wanted in agent.name.casefold() or wanted in agent.description.casefold())
        )
        return sorted(found, key=lambda agent: agent.id, reverse=True)


class MemoryAgentWriter(AgentWriter):
    """Creating an agent whose id is taken in its organisation raises StaleVersion."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store

    async def create(self, agent: ExternalAgent) -> None:
        self._add([agent])

    async def update(self, agent: ExternalAgent) -> None:
        if self._store.agent(agent.org_id, agent.id).version != agent.version - 1:
            raise StaleVersion
        self._store.agents[agent.org_id, agent.id] = agent

    async def delete(self, agent: ExternalAgent) -> None:
        await self.update(attrs.evolve(agent, sealed={}))

    async def bulk(self, agents: Sequence[ExternalAgent]) -> None:
        self._add(agents)

    def _add(self, agents: Sequence[ExternalAgent]) -> None:
        new = {(agent.org_id, agent.id): agent for agent in agents}
        if len(new) < len(agents) or new.keys() & self._store.agents.keys():
            raise StaleVersion
        self._store.agents.update(new)


class MemoryInvocationReader(InvocationReader):
    def __init__(self, store: MemoryStore) -> None:
        self._store = store

    async def read(self, org_id: str, agent_id: UUID, invocation_id: UUID) -> ExternalAgentInvocation:
        invocation = self._store.invocations_of(org_id).get(invocation_id)
        if invocation is None or invocation.external_agent_id != agent_id:
            raise InvocationNotFound
        return invocation

    async def list(self, query: InvocationQuery, *, limit: int) -> Sequence[ExternalAgentInvocation]:
        return [*islice(self._matching(query), limit)]

    async def count(self, query: InvocationQuery) -> int:
        return sum(1 for _ in self._matching(query))

    async def exists(self, org_id: str, invocation_id: UUID) -> bool:
        return invocation_id in self._store.invocations_of(org_id)

    async def search(self, query: InvocationQuery, trace_id: str, *, limit: int) -> Sequence[ExternalAgentInvocation]:
        traced = (invocation for invocation in self._matching(query) if invocation.trace_id == trace_id)
        return [*islice(traced, limit)]

    def _matching(self, query: InvocationQuery) -> Iterator[ExternalAgentInvocation]:
        since = first_id_at(query.since) if query.since else None
        ends = [first_id_at(query.until)] if query.until else []
        ends += [query.before_id] if query.before_id else []
        end = min(ends, default=None)
        stored = self._store.invocations_of(query.org_id)
        for invocation_id in sorted(stored, reverse=True):
            invocation = stored[invocation_id]
            if (
                (since is None or invocation_id >= since)
                and (end is None or invocation_id < end)
                and (query.agent_ids is None or invocation.external_agent_id in query.agent_ids)
                and query.status in {None, invocation.status}
            ):
                yield invocation
