"""
Proving the books: every account equals the sums over its invocations.

It proves every month that there is an account of. Whoever drops the invocations of a month drops its accounts with
them, or is told here.
"""

from __future__ import annotations

from datetime import date
from uuid import UUID

import attrs
from sqlalchemy import RowMapping, text
from sqlalchemy.ext.asyncio import AsyncEngine

from external_agents.adapters.postgres.errors import translate_errors
from external_agents.domain.budget import BudgetAccount

NAMED_MAX = 20

# It may take as long as it takes, and one core. Our connections do without sequential scans, because every other
# statement has its index; this one reads the whole table, once.
_PATIENTLY = text(
    """
    SELECT set_config('statement_timeout', '0', true), set_config('enable_seqscan', 'on', true),
        set_config('max_parallel_workers_per_gather', '0', true)
    """
)

# A charge and a reservation are in two columns, and may be in two currencies. Zero is like no account. A row that
# nothing matches is of an account that is missing, or of invocations that are.
_COMPARE = text(
    """
    WITH booked AS (
        SELECT invocation.org_id, invocation.external_agent_id AS agent_id, booking.currency,
            date_trunc('month', invocation.created_at AT TIME ZONE 'UTC')::date AS month,
            sum(booking.charge) AS spent, sum(booking.reservation) AS reserved, count(*) AS bookings
        FROM external_agent_invocations AS invocation
        CROSS JOIN LATERAL (
            VALUES (cost_currency, cost_amount, 0), (
                reservation_currency, 0,
                CASE WHEN status IN ('pending', 'running') THEN reservation_amount END
            )
        ) AS booking (currency, charge, reservation)
        WHERE booking.charge <> 0 OR booking.reservation <> 0
        GROUP BY 1, 2, 3, 4
    ), compared AS (
        SELECT org_id, agent_id, currency, month, account.spent, account.reserved,
            coalesce(booked.spent, 0) AS booked_spent, coalesce(booked.reserved, 0) AS booked_reserved, bookings,
            coalesce(account.spent, 0) <> coalesce(booked.spent, 0)
                OR coalesce(account.reserved, 0) <> coalesce(booked.reserved, 0) AS is_off
        FROM external_agent_budgets AS account FULL JOIN booked USING (org_id, agent_id, currency, month)
    ), total AS (
        SELECT count(spent) AS accounts, coalesce(sum(bookings), 0)::bigint AS bookings,
            count(*) FILTER (WHERE is_off) AS number_off
        FROM compared
    )
    SELECT total.*, off.*
    FROM total LEFT JOIN (
        SELECT org_id, agent_id, currency, month, spent, reserved, booked_spent, booked_reserved
        FROM compared WHERE is_off ORDER BY org_id, agent_id, currency, month LIMIT :named_max
    ) AS off ON true
    """
)


@attrs.frozen(kw_only=True)
class FalseAccount:
    """
    An account that does not equal the sums over its invocations.

    Attributes:
        currency: None: of invocations with an amount and no currency.
        account: As it is kept; None where there is none.
        booked: As its invocations have it.
    """

    org_id: str
    agent_id: UUID
    currency: str | None
    month: date
    account: BudgetAccount | None
    booked: BudgetAccount


@attrs.frozen(kw_only=True)
class BudgetAudit:
    """
    Attributes:
        accounts: How many there are.
        bookings: How many charges and reservations were added up, each of an invocation.
        number_off: How many accounts are false.
        named: The first NAMED_MAX of them.
    """

    accounts: int
    bookings: int
    number_off: int
    named: tuple[FalseAccount, ...]


async def audit_budgets(engine: AsyncEngine) -> BudgetAudit:
    """
    Compare every account with its invocations, as they were at one moment: admissions and settlements go on meanwhile.

    Raises:
        Unavailable: The database cannot be reached.
    """
    with translate_errors():
        async with engine.connect() as connection:
            await connection.execution_options(postgresql_readonly=True)
            async with connection.begin():
                # One statement sees one moment, so nothing that is written meanwhile can put the figures apart.
                await connection.execute(_PATIENTLY)
                rows = (await connection.execute(_COMPARE, {"named_max": NAMED_MAX})).mappings().all()
    total = rows[0]
    return BudgetAudit(
        accounts=total["accounts"],
        bookings=total["bookings"],
        number_off=total["number_off"],
        named=tuple(_false_account_of(row) for row in rows if row["number_off"]),
    )


def _false_account_of(row: RowMapping) -> FalseAccount:
    exists = row["spent"] is not None
    return FalseAccount(
        org_id=row["org_id"],
        agent_id=row["agent_id"],
        currency=row["currency"],
        month=row["month"],
        account=BudgetAccount(spent=row["spent"], reserved=row["reserved"]) if exists else None,
        booked=BudgetAccount(spent=row["booked_spent"], reserved=row["booked_reserved"]),
    )
