"""Reading and changing agents, reading invocations. Everything stays within one organisation."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from datetime import datetime
from typing import Protocol
from uuid import UUID

import attrs

from external_agents.domain.agent import AgentStatus, ExternalAgent
from external_agents.domain.invocation import ExternalAgentInvocation, InvocationStatus


@attrs.frozen(kw_only=True)
class AgentQuery:
    """
    Which agents of an organisation.

    Attributes:
        status: None: all but the deleted ones.
        tag: Agents that carry this tag.
    """

    org_id: str
    status: AgentStatus | None = None
    provider: str | None = None
    tag: str | None = None


class AgentReader(Protocol):
    """
    Agents by organisation, deleted ones included; newest first (by id).

    Raises:
        Unavailable: The store cannot be reached; try again later. From every method.
    """

    @abstractmethod
    async def read(self, org_id: str, agent_id: UUID) -> ExternalAgent:
        """
        Raises:
            AgentNotFound: The organisation has no such agent.
        """
        ...

    @abstractmethod
    async def list(self, query: AgentQuery, *, offset: int, limit: int) -> Sequence[ExternalAgent]: ...

    @abstractmethod
    async def count(self, query: AgentQuery, *, text: str | None = None) -> int:
        """How many `list` (or, with `text`, `search`) would go through."""
        ...

    @abstractmethod
    async def exists(self, org_id: str, agent_id: UUID) -> bool: ...

    @abstractmethod
    async def search(self, query: AgentQuery, text: str, *, offset: int, limit: int) -> Sequence[ExternalAgent]:
        """Those whose name or description holds `text`, literally, whatever the case."""
        ...


class AgentWriter(Protocol):
    """
    Changes of agents, each durable when it returns.

    Raises:
        Unavailable: The store cannot be reached; whether the change happened is unknown. From every method.
    """

    @abstractmethod
    async def create(self, agent: ExternalAgent) -> None: ...

    @abstractmethod
    async def update(self, agent: ExternalAgent) -> None:
        """
        Store the next version of an agent.

        Raises:
            AgentNotFound: The organisation has no such agent.
            StaleVersion: The stored version is not `agent.version` - 1; read it again.
        """
        ...

    @abstractmethod
    async def delete(self, agent: ExternalAgent) -> None:
        """Store the version that marks the agent as deleted, and forget its secrets. Raises as `update` does."""
        ...

    @abstractmethod
    async def bulk(self, agents: Sequence[ExternalAgent]) -> None:
        """Create all of them, or none."""
        ...


@attrs.frozen(kw_only=True)
class InvocationQuery:
    """
    Which invocations of an organisation, newest first (by id).

    Attributes:
        agent_ids: None: of all agents.
        since: Inclusive.
        until: Exclusive.
        before_id: Only those whose id is smaller: where the page before ended.
    """

    org_id: str
    agent_ids: frozenset[UUID] | None = None
    status: InvocationStatus | None = None
    since: datetime | None = None
    until: datetime | None = None
    before_id: UUID | None = None


class InvocationReader(Protocol):
    """
    The record of invocations; the ledger alone writes it.

    Raises:
        Unavailable: The store cannot be reached; try again later. From every method.
    """

    @abstractmethod
    async def read(self, org_id: str, agent_id: UUID, invocation_id: UUID) -> ExternalAgentInvocation:
        """
        Raises:
            InvocationNotFound: The agent has no such invocation in this organisation.
        """
        ...

    @abstractmethod
    async def list(self, query: InvocationQuery, *, limit: int) -> Sequence[ExternalAgentInvocation]: ...

    @abstractmethod
    async def count(self, query: InvocationQuery) -> int: ...

    @abstractmethod
    async def exists(self, org_id: str, invocation_id: UUID) -> bool: ...

    @abstractmethod
    async def search(self, query: InvocationQuery, trace_id: str, *, limit: int) -> Sequence[ExternalAgentInvocation]:
        """Those that belong to one trace."""
        ...
