"""What `get_usage` makes of a forecast, for whom."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest

from external_agents import (
    AgentNotFound,
    BudgetConfig,
    BudgetUsage,
    PermissionDenied,
    Principal,
    Quota,
    RateLimitUsage,
    RateQuotas,
    Usage,
    Window,
    WindowUsage,
)
from external_agents.adapters.memory import memory_service
from external_agents.application.usage import usage_of
from external_agents.domain.budget import BudgetAccount
from external_agents.ports.ledger import Forecast
from external_agents.testing.builders import ALL_PERMISSIONS
from external_agents.testing.fakes import FakeClock, ScriptedTransport

AT = datetime(2026, 11, 30, 23, 59, 59, 500000, tzinfo=UTC)
ALICE = Principal("acme", "alice", ALL_PERMISSIONS)


def forecast(**changes: Any) -> Forecast:
    fields: dict[str, Any] = {
        "at": AT,
        "quotas": RateQuotas(),
        "rate_limited": False,
        "month": date(2026, 11, 1),
        "budget": None,
        "account": BudgetAccount(),
        "over_budget": False,
    }
    return Forecast(**{**fields, **changes})


def test_nothing_is_limited() -> None:
    account = BudgetAccount(spent=Decimal(3))
    assert usage_of(forecast(account=account)) == Usage(rate_limit=RateLimitUsage(), budget=None)


def test_windows() -> None:
    quotas = RateQuotas((Quota(Window.MINUTE, 5, 2, 30.25), Quota(Window.DAY, 3, 7, 86_400)))
    assert usage_of(forecast(quotas=quotas)).rate_limit == RateLimitUsage(
        minute=WindowUsage(limit=5, used=2, remaining=3, resets_at=AT + timedelta(seconds=30.25)),
        day=WindowUsage(limit=3, used=7, remaining=0, resets_at=AT + timedelta(days=1)),
    )


@pytest.mark.parametrize(
    ("cap", "spent", "reserved", "remaining"),
    [
        ("10", "0", "0", "10"),
        ("10", "2.5", "0.000000001", "7.499999999"),
        ("10", "8", "2", "0"),
        ("10", "9", "2", "0"),
        ("0", "0", "0", "0"),
        ("999999999999.999999999", "0.000000001", "0", "999999999999.999999998"),
        (None, "5", "1", None),
    ],
)
def test_budgets(cap: str | None, spent: str, reserved: str, remaining: str | None) -> None:
    budget = BudgetConfig(monthly_cap=None if cap is None else Decimal(cap), currency="EUR")
    account = BudgetAccount(spent=Decimal(spent), reserved=Decimal(reserved))
    assert usage_of(forecast(budget=budget, account=account)).budget == BudgetUsage(
        currency="EUR",
        month=date(2026, 11, 1),
        cap=budget.monthly_cap,
        spent=account.spent,
        reserved=account.reserved,
        remaining=None if remaining is None else Decimal(remaining),
    )


async def test_who_may_see_it() -> None:
    service = memory_service(ScriptedTransport(), clock=FakeClock())
    document = {"name": "A", "provider": "custom", "webhook_url": "https://agent.example.com/", "auth_type": "none"}
    agent = await service.create_agent(ALICE, document)
    reader = Principal("acme", "bob", {"read:external_agent"})
    assert await service.get_usage(reader, str(agent.id)) == Usage(rate_limit=RateLimitUsage(), budget=None)
    with pytest.raises(PermissionDenied):
        await service.get_usage(Principal("acme", "eve", {"invoke:external_agent"}), agent.id)
    with pytest.raises(AgentNotFound):
        await service.get_usage(Principal("other", "mallory", ALL_PERMISSIONS), agent.id)
    await service.delete_agent(ALICE, agent.id)
    with pytest.raises(AgentNotFound):
        await service.get_usage(ALICE, agent.id)
