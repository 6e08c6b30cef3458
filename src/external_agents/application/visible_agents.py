"""The agents of an organisation, as far as a principal may do something with them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from uuid import UUID

from external_agents.application.access import AccessControl
from external_agents.domain.access import Action, Principal
from external_agents.domain.agent import AgentStatus, ExternalAgent
from external_agents.domain.errors import AgentNotFound
from external_agents.ports.repositories import AgentQuery, AgentReader

_JUDGED_AT_ONCE = 500


class VisibleAgents:
    """Existence is checked before permission: another organisation's agent does not exist."""

    def __init__(self, reader: AgentReader, access: AccessControl) -> None:
        self._reader = reader
        self._access = access

    async def one(self, principal: Principal, action: Action, agent_id: UUID | str) -> ExternalAgent:
        """
        Raises:
            AgentNotFound: There is none, or it is deleted.
            PermissionDenied: The policies do not allow the action on it.
        """
        agent = await self._reader.read(principal.org_id, id_of(agent_id))
        if agent.is_deleted:
            raise AgentNotFound
        await self._access.require(principal, action, agent)
        return agent

    async def one_with_history(self, agent_id: UUID | str, org_id: str) -> ExternalAgent:
        """The agent, deleted or not; whether the principal may read it, is still to be asked."""
        return await self._reader.read(org_id, id_of(agent_id))

    async def page(
        self, principal: Principal, query: AgentQuery, text: str | None, *, offset: int, limit: int
    ) -> tuple[Sequence[ExternalAgent], int]:
        """One page of those that the principal may read, and how many there are in all."""
        if self._access.judges_lists_by_agent:
            readable = await self._readable(principal, query, text)
            return readable[offset : offset + limit], len(readable)
        found = await self._matching(query, text, offset=offset, limit=limit)
        return found, await self._reader.count(query, text=text)

    async def readable_ids(self, principal: Principal) -> frozenset[UUID] | None:
        """Of all agents that the principal may read, deleted ones too; None where that is all of them."""
        if not self._access.judges_lists_by_agent:
            return None
        queries = (AgentQuery(org_id=principal.org_id, status=status) for status in (None, AgentStatus.DELETED))
        return frozenset({agent.id for query in queries for agent in await self._readable(principal, query, None)})

    async def _readable(self, principal: Principal, query: AgentQuery, text: str | None) -> list[ExternalAgent]:
        readable: list[ExternalAgent] = []
        for offset in count(0, _JUDGED_AT_ONCE):
            agents = await self._matching(query, text, offset=offset, limit=_JUDGED_AT_ONCE)
            readable += await self._access.permitted(principal, Action.READ, agents)
            if len(agents) < _JUDGED_AT_ONCE:
                break
        return readable

    async def _matching(
        self, query: AgentQuery, text: str | None, *, offset: int, limit: int
    ) -> Sequence[ExternalAgent]:
        if text:
            return await self._reader.search(query, text, offset=offset, limit=limit)
        return await self._reader.list(query, offset=offset, limit=limit)


def id_of(agent_id: UUID | str) -> UUID:
    """
    Raises:
        AgentNotFound: It is no id at all.
    """
    try:
        return agent_id if isinstance(agent_id, UUID) else UUID(agent_id)
    except (AttributeError, TypeError, ValueError):
        raise AgentNotFound from None
