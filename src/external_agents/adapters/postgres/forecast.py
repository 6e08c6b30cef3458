"""How an agent's limits stand, read in one statement without a lock."""

from __future__ import annotations

from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from external_agents.adapters.postgres.columns import config_of
from external_agents.adapters.postgres.rows import account_of, windows_of
from external_agents.domain.budget import DEFAULT_CURRENCY, BudgetConfig, budget_month
from external_agents.domain.errors import AgentNotFound
from external_agents.domain.rate_limit import limits_of
from external_agents.ports.ledger import Forecast

_FORECAST = text(
    """
    SELECT agent.rate_limit_config::text, agent.budget_config::text, windows.*, account.spent, account.reserved, now
    FROM external_agents AS agent
    JOIN external_agent_rate_windows AS windows ON windows.org_id = agent.org_id AND windows.agent_id = agent.id
    CROSS JOIN (SELECT clock_timestamp() AS now) AS clock
    LEFT JOIN external_agent_budgets AS account ON account.org_id = agent.org_id AND account.agent_id = agent.id
        AND account.currency = coalesce(agent.budget_config ->> 'currency', :default_currency)
        AND account.month = date_trunc('month', now AT TIME ZONE 'UTC')::date
    WHERE agent.org_id = :org_id AND agent.id = :agent_id
    """
)


async def forecast(connection: AsyncConnection, org_id: str, agent_id: UUID) -> Forecast:
    """
    Raises:
        AgentNotFound: The organisation has no such agent.
    """
    values = {"org_id": org_id, "agent_id": agent_id, "default_currency": DEFAULT_CURRENCY}
    row = (await connection.execute(_FORECAST, values)).mappings().one_or_none()
    if row is None:
        raise AgentNotFound
    now = row["now"]
    windows, limits = windows_of(row).advanced(now.timestamp()), limits_of(config_of(row["rate_limit_config"]))
    config, account = config_of(row["budget_config"]), account_of(row)
    budget = BudgetConfig.of(config)
    return Forecast(
        at=now,
        quotas=windows.quotas(limits, now.timestamp()),
        rate_limited=windows.refusal(limits, now.timestamp()) is not None,
        month=budget_month(now),
        budget=None if config is None else budget,
        account=account,
        over_budget=not account.admits(budget),
    )
