"""After a case: is everything that was acknowledged there, once, and do the budgets add up?"""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from uuid import UUID

import attrs
import psycopg
from psycopg.rows import dict_row

ACKNOWLEDGED = ("200", "502", "504")
"""The answers that carry an invocation."""
FIRST_ID = UUID(int=0)

_ROWS = """
    SELECT count(*) AS rows,
        count(*) FILTER (WHERE status IN ('running', 'pending')) AS unfinished,
        coalesce(sum(json_array_length(attempts)), 0)::bigint AS attempts,
        coalesce(sum(cost_amount), 0) AS cost
    FROM external_agent_invocations WHERE id >= %s
"""
_ACCOUNTS = """
    WITH costs AS (
        SELECT org_id, external_agent_id AS agent_id, cost_currency AS currency,
            date_trunc('month', created_at AT TIME ZONE 'UTC')::date AS month, sum(cost_amount) AS cost
        FROM external_agent_invocations WHERE cost_amount IS NOT NULL GROUP BY 1, 2, 3, 4
    )
    SELECT coalesce(sum(reserved), 0) AS reserved,
        count(*) FILTER (WHERE coalesce(cost, 0) <> coalesce(spent, 0)) AS off
    FROM costs FULL JOIN external_agent_budgets USING (org_id, agent_id, currency, month)
"""


@attrs.frozen(kw_only=True)
class Expected:
    """What the load generator and the agent saw."""

    acknowledged: int
    agent_requests: int


@attrs.frozen(kw_only=True)
class Counted:
    """What the database has: of the invocations since some id; of the budgets, all of it."""

    rows: int
    unfinished: int
    attempts: int
    reserved: Decimal
    accounts_off: int

    def mismatches(self, expected: Expected) -> Iterator[str]:
        if self.rows != expected.acknowledged:
            yield f"{expected.acknowledged} invocations were acknowledged, {self.rows} rows are there"
        if self.attempts != expected.agent_requests:
            yield f"the agent received {expected.agent_requests} requests, the rows tell of {self.attempts} attempts"
        if self.unfinished:
            yield f"{self.unfinished} invocations are running or pending"
        if self.reserved:
            yield f"{self.reserved} is still reserved"
        if self.accounts_off:
            yield f"{self.accounts_off} budgets differ from the sum of their rows"


def count(dsn: str, since: UUID = FIRST_ID) -> Counted:
    with psycopg.connect(dsn, row_factory=dict_row) as connection:
        rows = connection.execute(_ROWS, [since]).fetchone()
        accounts = connection.execute(_ACCOUNTS).fetchone()
    assert rows is not None
    assert accounts is not None
    return Counted(
        rows=rows["rows"],
        unfinished=rows["unfinished"],
        attempts=rows["attempts"],
        reserved=accounts["reserved"],
        accounts_off=accounts["off"],
    )
