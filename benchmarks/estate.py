"""Organisations, their keys and their agents, made as a host makes them: through the library."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from external_agents.bootstrap import open_installation
from external_agents.domain.access import PERMISSIONS, Principal
from external_agents.settings import Settings

LIMITS = {"requests_per_minute": 10**9, "requests_per_hour": 10**9, "requests_per_day": 10**9}
SHUT = dict.fromkeys(LIMITS, 0)
BUDGET = {"max_cost_per_invocation": "0.05", "max_monthly_cost": "999999999", "currency": "USD"}
"""With LIMITS all three windows and both budgets are kept, and none of them is ever full."""


@attrs.frozen(kw_only=True)
class KnownAgent:
    """`shut`: its windows take no call at all."""

    id: str
    org_id: str
    shut: bool
    key: str = attrs.field(repr=False)


@attrs.frozen
class Estate:
    """Agents of one organisation stand together."""

    agents: Sequence[KnownAgent]

    @property
    def org_ids(self) -> list[str]:
        return list(dict.fromkeys(agent.org_id for agent in self.agents))


async def furnish(
    settings: Settings,
    database_url: str,
    agent_url: str,
    *,
    orgs: int,
    agents_each: int,
    shut_each: int = 0,
) -> Estate:
    """`orgs` organisations, each with a key, open agents, and shut ones behind them; all live at `agent_url`."""
    agents = []
    async with open_installation(settings, database_url) as installation:
        for org_number in range(orgs):
            org_id = f"org-{org_number}"
            key, _ = await installation.api_keys.issue(org_id, "benchmark")
            principal = Principal(org_id, "benchmark", PERMISSIONS)
            for agent_number in range(agents_each + shut_each):
                shut = agent_number >= agents_each
                document = {
                    "name": f"Agent {agent_number}",
                    "provider": "custom",
                    "webhook_url": agent_url,
                    "auth_type": "bearer",
                    "auth_config": {"token": "a-token-of-the-benchmark"},
                    "rate_limit_config": SHUT if shut else LIMITS,
                    "budget_config": BUDGET,
                }
                agent = await installation.service.create_agent(principal, document)
                agents.append(KnownAgent(id=str(agent.id), org_id=org_id, shut=shut, key=key))
    return Estate(agents)
