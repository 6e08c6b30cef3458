"""How much of an agent's limits is used up."""

from __future__ import annotations

from datetime import date, datetime, timedelta
from decimal import Decimal

import attrs

from external_agents.domain.rate_limit import Window
from external_agents.ports.ledger import Forecast


@attrs.frozen(kw_only=True)
class WindowUsage:
    """
    One window of the rate limits.

    Attributes:
        used: Invocations that were admitted within the window.
        remaining: How many more are admitted now; never negative, though a lowered limit may be below `used`.
        resets_at: When the next place comes free, aware, in UTC; with nothing used, now.
    """

    limit: int
    used: int
    remaining: int
    resets_at: datetime


@attrs.frozen(kw_only=True)
class RateLimitUsage:
    """Each window as far as it is limited; None where it is not."""

    minute: WindowUsage | None = None
    hour: WindowUsage | None = None
    day: WindowUsage | None = None


@attrs.frozen(kw_only=True)
class BudgetUsage:
    """
    The account of one month in the budget's currency.

    Attributes:
        month: Its first day; months are UTC.
        cap: The most that spent and reserved may come to at an admission; None: without a bound.
        spent: Charged for invocations that have ended.
        reserved: Held for those that run.
        remaining: What is left of the cap; never negative, though a cost may overrun its reservation. None without cap.
    """

    currency: str
    month: date
    cap: Decimal | None
    spent: Decimal
    reserved: Decimal
    remaining: Decimal | None


@attrs.frozen(kw_only=True)
class Usage:
    """An agent's limits as they stood at one moment of the store's; `budget` is None where the agent has none."""

    rate_limit: RateLimitUsage
    budget: BudgetUsage | None


def usage_of(forecast: Forecast) -> Usage:
    windows = {
        quota.window: WindowUsage(
            limit=quota.limit,
            used=quota.used,
            remaining=quota.remaining,
            resets_at=forecast.at + timedelta(seconds=quota.resets_in_s),
        )
        for quota in forecast.quotas.quotas
    }
    return Usage(
        rate_limit=RateLimitUsage(**{window.value: windows.get(window) for window in Window}),
        budget=_budget(forecast),
    )


def _budget(forecast: Forecast) -> BudgetUsage | None:
    budget, account = forecast.budget, forecast.account
    if budget is None:
        return None
    cap = budget.monthly_cap
    return BudgetUsage(
        currency=budget.currency,
        month=forecast.month,
        cap=cap,
        spent=account.spent,
        reserved=account.reserved,
        remaining=None if cap is None else max(Decimal(0), cap - account.spent - account.reserved),
    )
