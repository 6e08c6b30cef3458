"""Monthly accounts, one row for each agent, currency and month."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import date
from decimal import Decimal
from typing import TypeAlias
from uuid import UUID

import attrs
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from external_agents.domain.budget import Money, budget_month
from external_agents.domain.invocation import ExternalAgentInvocation

# On conflict it is subtracted what the row to be inserted says is reserved: PostgreSQL checks that row's constraints
# before it looks for the conflict, so it cannot carry a negative amount.
_BOOK = text(
    """
    INSERT INTO external_agent_budgets AS account (org_id, agent_id, currency, month, spent, reserved)
    VALUES (:org_id, :agent_id, :currency, :month, :charged, :released)
    ON CONFLICT (org_id, agent_id, currency, month) DO UPDATE SET
        spent = account.spent + excluded.spent, reserved = account.reserved - excluded.reserved
    """
)


_LOCK = text(
    """
    SELECT FROM external_agent_budgets
    WHERE org_id = :org_id AND agent_id = :agent_id AND currency = :currency AND month = :month FOR UPDATE
    """
)

_Account: TypeAlias = tuple[str, UUID, str, date]


@attrs.frozen
class _Booking:
    charged: Decimal = Decimal(0)
    released: Decimal = Decimal(0)


async def lock_accounts(connection: AsyncConnection, running: Iterable[ExternalAgentInvocation]) -> None:
    """Lock what ends the reservations of running invocations, in the order of the accounts' keys."""
    keys = {_account_of(invocation, invocation.reservation) for invocation in running if invocation.reservation}
    for org_id, agent_id, currency, month in sorted(keys):
        values = {"org_id": org_id, "agent_id": agent_id, "currency": currency, "month": month}
        await connection.execute(_LOCK, values)


async def book(connection: AsyncConnection, ended: Iterable[tuple[ExternalAgentInvocation, Money | None]]) -> None:
    """
    Charge ended invocations, and release what was reserved for each.

    Accounts are locked in the order of their keys: two transactions that book several of them cannot deadlock.
    """
    bookings: dict[_Account, _Booking] = {}
    for invocation, reservation in ended:
        for money, is_charge in ((invocation.cost, True), (reservation, False)):
            if money is None:
                continue
            key = _account_of(invocation, money)
            before = bookings.get(key, _Booking())
            bookings[key] = (
                attrs.evolve(before, charged=before.charged + money.amount)
                if is_charge
                else attrs.evolve(before, released=before.released + money.amount)
            )
    for key in sorted(bookings):
        org_id, agent_id, currency, month = key
        await connection.execute(
            _BOOK,
            {
                "org_id": org_id,
                "agent_id": agent_id,
                "currency": currency,
                "month": month,
                "charged": bookings[key].charged,
                "released": bookings[key].released,
            },
        )


def _account_of(invocation: ExternalAgentInvocation, money: Money) -> _Account:
    return invocation.org_id, invocation.external_agent_id, money.currency, budget_month(invocation.created_at)
