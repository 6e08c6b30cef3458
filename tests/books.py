"""Whether the figures of the accounts are those of the rows."""

from __future__ import annotations

import psycopg

from postgres_server import dsn


async def assert_books_balance(url: str) -> None:
    """Every account equals the sums over the rows of its agent, currency and month."""
    rows = "FROM external_agent_invocations GROUP BY org_id, external_agent_id, currency, month"
    month = "date_trunc('month', created_at AT TIME ZONE 'UTC')::date AS month"
    async with await psycopg.AsyncConnection.connect(dsn(url)) as connection:
        differences = await connection.execute(
            f"""
            SELECT * FROM external_agent_budgets
            FULL JOIN (
                SELECT org_id, external_agent_id AS agent_id, cost_currency AS currency, {month},
                    sum(cost_amount) AS spent {rows}
            ) AS charged USING (org_id, agent_id, currency, month)
            FULL JOIN (
                SELECT org_id, external_agent_id AS agent_id, reservation_currency AS currency, {month},
                    sum(reservation_amount) FILTER (WHERE status = 'running') AS reserved {rows}
            ) AS held USING (org_id, agent_id, currency, month)
            WHERE currency IS NOT NULL
                AND (external_agent_budgets.spent IS DISTINCT FROM coalesce(charged.spent, 0)
                OR external_agent_budgets.reserved IS DISTINCT FROM coalesce(held.reserved, 0))
            """
        )
        assert await differences.fetchall() == []
