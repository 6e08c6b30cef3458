"""Asking the policies, and telling what they said."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from external_agents.domain.access import AccessRequest, Action, Decision, Principal
from external_agents.domain.agent import ExternalAgent
from external_agents.domain.errors import PermissionDenied
from external_agents.ports.observability import DecisionRecord, ObservabilityManager, Record
from external_agents.ports.policy import PolicyDecisionPoint
from external_agents.ports.system import Clock

_log = logging.getLogger(__name__)


class Witness:
    """Hands records to the host's ObservabilityManager; what that raises must not undo what has happened."""

    def __init__(self, manager: ObservabilityManager) -> None:
        self._manager = manager

    def __call__(self, record: Record) -> None:
        try:
            self._manager(record)
        except Exception:
            _log.exception("the ObservabilityManager failed on a %s", type(record).__name__)


class AccessControl:
    """Every decision of the application goes through here and leaves a record."""

    def __init__(self, policy: PolicyDecisionPoint, clock: Clock, witness: Witness) -> None:
        self._policy = policy
        self._clock = clock
        self._witness = witness

    @property
    def judges_lists_by_agent(self) -> bool:
        return self._policy.judges_lists_by_agent

    async def require(self, principal: Principal, action: Action, agent: ExternalAgent | None = None) -> None:
        """
        Raises:
            PermissionDenied: The policies do not allow it, or could not be asked.
        """
        request = AccessRequest(principal, action, agent, self._clock.now())
        [decision] = await self._policy.decide([request])
        self._tell(request, decision)
        if not decision.allowed:
            raise PermissionDenied(f"{principal.subject} is not permitted to {action} this.")

    async def allows(self, principal: Principal, action: Action, agent: ExternalAgent) -> bool:
        """Whether it is allowed on an agent that may have changed since. A no is not final, so it leaves no record."""
        request = AccessRequest(principal, action, agent, self._clock.now())
        [decision] = await self._policy.decide([request])
        if decision.allowed:
            self._tell(request, decision)
        return decision.allowed

    async def permitted(
        self, principal: Principal, action: Action, agents: Sequence[ExternalAgent]
    ) -> list[ExternalAgent]:
        """Those of `agents` that the principal may do `action` on."""
        now = self._clock.now()
        requests = [AccessRequest(principal, action, agent, now) for agent in agents]
        decisions = await self._policy.decide(requests)
        for request, decision in zip(requests, decisions, strict=True):
            self._tell(request, decision, filters=True)
        return [agent for agent, decision in zip(agents, decisions, strict=True) if decision.allowed]

    def _tell(self, request: AccessRequest, decision: Decision, *, filters: bool = False) -> None:
        self._witness(
            DecisionRecord(
                at=request.now,
                principal=request.principal,
                action=request.action,
                agent_id=request.agent.id if request.agent else None,
                allowed=decision.allowed,
                policy_ids=decision.policy_ids,
                errors=decision.errors,
                filters=filters,
            )
        )
