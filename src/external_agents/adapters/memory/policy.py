"""The guardrails, without further policies."""

from __future__ import annotations

from collections.abc import Sequence

from external_agents.domain.access import AccessRequest, Decision
from external_agents.ports.policy import PolicyDecisionPoint


class PermissionPolicy(PolicyDecisionPoint):
    """Allows what the principal holds the permission for, on agents of its own organisation."""

    @property
    def judges_lists_by_agent(self) -> bool:
        return False

    async def decide(self, requests: Sequence[AccessRequest]) -> Sequence[Decision]:
        return [_decide(request) for request in requests]


def _decide(request: AccessRequest) -> Decision:
    principal, agent = request.principal, request.agent
    own = agent is None or agent.org_id == principal.org_id
    return Decision(own and request.action.permission in principal.permissions, policy_ids=("permissions",))
