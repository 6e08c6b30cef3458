"""The state that the repositories and ledgers of one process share."""

from __future__ import annotations

from datetime import date
from typing import TypeAlias
from uuid import UUID

import attrs

from external_agents.domain.agent import ExternalAgent
from external_agents.domain.budget import BudgetAccount
from external_agents.domain.errors import AgentNotFound
from external_agents.domain.invocation import ExternalAgentInvocation
from external_agents.domain.rate_limit import RateWindows

AgentKey: TypeAlias = tuple[str, UUID]
"""org_id and agent id."""

AccountKey: TypeAlias = tuple[AgentKey, str, date]
"""Agent, currency, and the first day of the month."""


@attrs.frozen
class KeyEntry:
    """What is kept of an idempotency key: the fingerprint that it came with, what was admitted, and when."""

    request_hash: bytes
    invocation_id: UUID
    admitted_at_s: float


class MemoryStore:
    """
    Agents, invocations, limits and budgets of one process; gone with it.

    The adapters read and change it without awaiting anything in between, so on one event loop every one of their
    operations is atomic. It is not for several threads.
    """

    def __init__(self) -> None:
        self.agents: dict[AgentKey, ExternalAgent] = {}
        self.invocations: dict[str, dict[UUID, ExternalAgentInvocation]] = {}
        self.windows: dict[AgentKey, RateWindows] = {}
        self.accounts: dict[AccountKey, BudgetAccount] = {}
        self.idempotency_keys: dict[tuple[AgentKey, str], KeyEntry] = {}
        self.running: dict[tuple[str, UUID], UUID] = {}
        """The instance that runs an invocation, by the invocation's org_id and id."""
        self.heard_of_s: dict[UUID, float] = {}
        """When an instance sent its last heartbeat."""

    def agent(self, org_id: str, agent_id: UUID) -> ExternalAgent:
        """
        Raises:
            AgentNotFound: The organisation has no such agent.
        """
        try:
            return self.agents[org_id, agent_id]
        except KeyError:
            raise AgentNotFound from None

    def invocations_of(self, org_id: str) -> dict[UUID, ExternalAgentInvocation]:
        return self.invocations.setdefault(org_id, {})
