"""GET …/usage: right under use, and after everything that must not change it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from external_agents.testing.builders import costing
from external_agents.testing.fakes import FakeClock, Gate
from rest_api import AGENTS, REFUSED, TIMED_OUT, Api, is_problem

NOTHING = {"rate_limit": {"minute": None, "hour": None, "day": None}, "budget": None}


@pytest.fixture
async def api() -> AsyncIterator[Api]:
    async with Api() as api:
        yield api


async def usage(api: Api, agent: dict[str, Any]) -> Any:
    answer = await api.call("GET", f"{AGENTS}/{agent['id']}/usage")
    assert answer.status_code == 200
    assert answer.headers["cache-control"] == "no-store"
    assert "ratelimit" not in answer.headers
    return answer.json()


async def test_without_limits(api: Api) -> None:
    agent = await api.create()
    await api.invoke(agent)
    assert await usage(api, agent) == NOTHING


async def test_before_any_use(api: Api) -> None:
    agent = await api.create(
        rate_limit_config={"requests_per_minute": 5, "requests_per_day": 9},
        budget_config={"max_monthly_cost": "10.50", "currency": "EUR"},
    )
    now = "2026-03-10T12:00:00.000000Z"
    assert await usage(api, agent) == {
        "rate_limit": {
            "minute": {"limit": 5, "used": 0, "remaining": 5, "resets_at": now},
            "hour": None,
            "day": {"limit": 9, "used": 0, "remaining": 9, "resets_at": now},
        },
        "budget": {
            "currency": "EUR",
            "month": "2026-03",
            "cap": "10.5",
            "spent": "0",
            "reserved": "0",
            "remaining": "10.5",
        },
    }


async def test_looking_takes_nothing(api: Api) -> None:
    agent = await api.create(
        rate_limit_config={"requests_per_minute": 1},
        budget_config={"max_cost_per_invocation": 1, "max_monthly_cost": 1},
    )
    assert len({str(await usage(api, agent)) for _ in range(10)}) == 1
    assert (await api.invoke(agent)).status_code == 200


async def test_windows_under_use(api: Api) -> None:
    agent = await api.create(rate_limit_config={"requests_per_minute": 4, "requests_per_hour": 100})
    begun = api.clock.now()
    for used in (1, 2, 3, 4):
        await api.invoke(agent)
        windows = (await usage(api, agent))["rate_limit"]
        assert (windows["minute"]["used"], windows["minute"]["remaining"]) == (used, 4 - used)
        assert (windows["hour"]["used"], windows["hour"]["remaining"]) == (used, 100 - used)
        assert windows["day"] is None
        for window, seconds in (("minute", 60), ("hour", 3600)):
            resets_at = datetime.fromisoformat(windows[window]["resets_at"])
            assert timedelta(seconds=seconds) <= resets_at - begun <= timedelta(seconds=seconds * 1.02)
        api.clock.advance(5)
    full = (await usage(api, agent))["rate_limit"]["minute"]
    resets_at = datetime.fromisoformat(full["resets_at"])
    api.clock.advance((resets_at - api.clock.now()).total_seconds())
    windows = (await usage(api, agent))["rate_limit"]
    assert (windows["minute"]["used"], windows["hour"]["used"]) == (3, 4)
    assert (await api.invoke(agent)).status_code == 200


async def test_a_limit_of_none_and_one_below_what_was_used(api: Api) -> None:
    agent = await api.create(rate_limit_config={"requests_per_minute": 3})
    for _ in range(3):
        await api.invoke(agent)
    limits = {"requests_per_minute": 1, "requests_per_hour": 0}
    await api.call("PATCH", f"{AGENTS}/{agent['id']}", json={"rate_limit_config": limits})
    windows = (await usage(api, agent))["rate_limit"]
    shown = [[windows[name][part] for part in ("limit", "used", "remaining")] for name in ("minute", "hour")]
    assert shown == [[1, 3, 0], [0, 3, 0]]
    assert datetime.fromisoformat(windows["hour"]["resets_at"]) == api.clock.now() + timedelta(hours=1)


async def test_a_budget_while_it_runs_and_after(api: Api) -> None:
    agent = await api.create(budget_config={"max_cost_per_invocation": "0.30", "max_monthly_cost": 1})
    gate = Gate(costing("0.05"))
    api.transport.script.append(gate)
    running = asyncio.create_task(api.invoke(agent))
    await gate.entered.wait()
    budget = (await usage(api, agent))["budget"]
    assert (budget["spent"], budget["reserved"], budget["remaining"]) == ("0", "0.3", "0.7")
    gate.opened.set()
    await running
    budget = (await usage(api, agent))["budget"]
    assert budget == {
        "currency": "USD",
        "month": "2026-03",
        "cap": "1",
        "spent": "0.05",
        "reserved": "0",
        "remaining": "0.95",
    }
    api.transport.script.append(costing("0.000000001"))
    await api.invoke(agent)
    assert (await usage(api, agent))["budget"]["spent"] == "0.050000001"
    api.transport.script.append(REFUSED)
    await api.invoke(agent)
    assert (await usage(api, agent))["budget"]["spent"] == "0.050000001", "a failure is released"
    api.transport.script.append(costing("5"))
    await api.invoke(agent)
    budget = (await usage(api, agent))["budget"]
    assert (budget["spent"], budget["remaining"]) == ("5.050000001", "0"), "an overrun leaves nothing, not less"


async def test_a_budget_without_a_cap(api: Api) -> None:
    agent = await api.create(budget_config={})
    api.transport.script.append(costing("2"))
    await api.invoke(agent)
    budget = (await usage(api, agent))["budget"]
    assert (budget["cap"], budget["remaining"], budget["spent"]) == (None, None, "2")


async def test_currencies_are_accounts_of_their_own(api: Api) -> None:
    agent = await api.create(budget_config={"max_cost_per_invocation": 1, "max_monthly_cost": 5, "currency": "EUR"})
    await api.invoke(agent)
    for currency, spent in (("USD", "0"), ("EUR", "1")):
        patch = {"budget_config": {"max_monthly_cost": 5, "currency": currency}}
        await api.call("PATCH", f"{AGENTS}/{agent['id']}", json=patch)
        budget = (await usage(api, agent))["budget"]
        assert (budget["currency"], budget["spent"]) == (currency, spent)


async def test_a_month_ends(api: Api) -> None:
    api.clock.advance((datetime(2026, 3, 31, 23, 59, 59, tzinfo=UTC) - FakeClock().now()).total_seconds())
    agent = await api.create(budget_config={"max_cost_per_invocation": 1, "max_monthly_cost": 5})
    await api.invoke(agent)
    assert (await usage(api, agent))["budget"]["spent"] == "1"
    api.clock.advance(1)
    budget = (await usage(api, agent))["budget"]
    assert (budget["month"], budget["spent"], budget["remaining"]) == ("2026-04", "0", "5")


async def test_only_what_is_admitted_counts(api: Api) -> None:
    """402, 403, 409, 422, 429 and a replay leave everything as it was; 502 and 504 took a place."""
    agent = await api.create(
        max_attempts=1,
        rate_limit_config={"requests_per_minute": 3},
        budget_config={"max_cost_per_invocation": "0.4", "max_monthly_cost": "1"},
    )
    path, key = f"{AGENTS}/{agent['id']}", {"Idempotency-Key": "k"}
    for outcome in (REFUSED, TIMED_OUT):
        api.transport.script.append(outcome)
        await api.invoke(agent)
    await api.invoke(agent, headers=key)
    before = await usage(api, agent)
    assert before["rate_limit"]["minute"]["used"] == 3
    assert (before["budget"]["spent"], before["budget"]["remaining"]) == ("0.8", "0.2")
    assert is_problem(await api.invoke(agent), 429, "rate-limited")
    assert (await api.invoke(agent, headers=key)).headers["idempotent-replayed"] == "true"
    assert is_problem(await api.invoke(agent, headers=key, json=0), 422, "idempotency-key-reused")
    assert is_problem(await api.invoke(agent, key=api.key_for("acme", [])), 403, "not-permitted")
    await api.call("PATCH", path, json={"status": "inactive"})
    assert is_problem(await api.invoke(agent), 409, "agent-inactive")
    assert await usage(api, agent) == before
    wider = {"status": "active", "rate_limit_config": {"requests_per_minute": 30}}
    await api.call("PATCH", path, json=wider)
    assert is_problem(await api.invoke(agent), 402, "budget-exceeded")
    after = await usage(api, agent)
    assert after["budget"] == before["budget"]
    assert after["rate_limit"]["minute"]["used"] == 3
