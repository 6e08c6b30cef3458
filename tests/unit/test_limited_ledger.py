"""A ledger with a limiter in front of it: who is asked when, and what becomes of a place that comes to nothing."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import attrs
import pytest

from external_agents.adapters.memory import (
    MemoryAgentWriter,
    MemoryLedger,
    MemoryRateLimiter,
    MemoryStore,
)
from external_agents.application.limited_ledger import LimitedLedger
from external_agents.domain.agent import AgentStatus, ExternalAgent
from external_agents.domain.errors import (
    AdmissionInDoubt,
    AgentInactive,
    AgentNotFound,
    ExternalAgentsError,
    StaleVersion,
    Unavailable,
)
from external_agents.domain.rate_limit import Window
from external_agents.domain.refusals import (
    BudgetExceeded,
    IdempotencyKeyInFlight,
    IdempotencyKeyReused,
    RateLimited,
)
from external_agents.ports.ledger import Admission, AdmissionRequest
from external_agents.ports.rate_limiter import Place
from external_agents.testing.builders import id_at, make_agent, make_request, new_id, next_version
from external_agents.testing.fakes import FakeClock


class TroubledLedger(MemoryLedger):
    """Comes to `trouble` where idempotency keys have their turn: after the agent's state, before the limits."""

    trouble: BaseException | Admission | None = None

    async def admit(self, request: AdmissionRequest) -> Admission:
        self._admissible(request)
        if isinstance(self.trouble, Admission):
            return self.trouble
        if self.trouble is not None:
            raise self.trouble
        return await super().admit(request)


class BrokenLimiter(MemoryRateLimiter):
    """Cannot be reached once it `is_out`."""

    is_out = False

    async def acquire(self, *args: Any) -> Place:
        self._require()
        return await super().acquire(*args)

    async def release(self, place: Place) -> None:
        self._require()
        await super().release(place)

    def _require(self) -> None:
        if self.is_out:
            raise Unavailable("The rate limiter")


class Setting:
    """An agent with room for 3, a ledger, a limiter, and the two together."""

    def __init__(self) -> None:
        self.clock = clock = FakeClock()
        self.store = MemoryStore()
        self.writer = MemoryAgentWriter(self.store)
        self.inner = TroubledLedger(self.store, clock)
        self.limiter = BrokenLimiter(clock)
        self.ledger = LimitedLedger(self.inner, self.limiter)
        self.agent = make_agent(
            rate_limit_config={"requests_per_minute": 3},
            budget_config={"max_cost_per_invocation": 1, "max_monthly_cost": 2},
        )

    async def used(self, agent: ExternalAgent | None = None) -> int:
        agent = agent or self.agent
        standing = await self.limiter.peek(agent.org_id, agent.id, {Window.MINUTE: 3})
        return standing.quotas.quotas[0].used

    async def fill(self) -> None:
        while not (await self.limiter.peek(self.agent.org_id, self.agent.id, self.agent.limits)).rate_limited:
            await self.limiter.acquire(self.agent.org_id, self.agent.id, self.agent.limits)

    async def update(self, **fields: Any) -> ExternalAgent:
        self.agent = next_version(self.agent, **fields)
        await self.writer.update(self.agent)
        return self.agent


@pytest.fixture
async def setting() -> Setting:
    setting = Setting()
    await setting.writer.create(setting.agent)
    return setting


async def test_an_admission_takes_one_place_from_the_limiter_and_none_of_the_ledgers(setting: Setting) -> None:
    admission = await setting.ledger.admit(make_request(setting.agent))
    assert [(quota.used, quota.remaining) for quota in admission.quotas.quotas] == [(1, 2)]
    assert await setting.used() == 1
    assert setting.store.windows == {}
    assert list(setting.store.invocations_of(setting.agent.org_id).values()) == [admission.invocation]


TROUBLES: list[Exception] = [
    IdempotencyKeyReused(),
    IdempotencyKeyInFlight(),
    Unavailable("The database"),
]


@pytest.mark.parametrize("trouble", TROUBLES, ids=lambda trouble: type(trouble).__name__)
async def test_a_definite_refusal_gives_the_place_back(setting: Setting, trouble: Exception) -> None:
    setting.inner.trouble = trouble
    with pytest.raises(type(trouble)) as error:
        await setting.ledger.admit(make_request(setting.agent))
    assert error.value is trouble
    assert await setting.used() == 0


async def test_an_agent_that_cannot_be_invoked_takes_no_place(setting: Setting) -> None:
    first = setting.agent
    current = await setting.update(description="changed")
    inactive = await setting.update(status=AgentStatus.INACTIVE)
    unknown = attrs.evolve(current, id=new_id())
    cases: list[tuple[ExternalAgent, type[ExternalAgentsError]]] = [
        (first, StaleVersion),
        (inactive, AgentInactive),
        (unknown, AgentNotFound),
    ]
    for agent, error in cases:
        with pytest.raises(error):
            await setting.ledger.admit(make_request(agent))
        assert await setting.used(agent) == 0


@pytest.mark.parametrize("trouble", TROUBLES, ids=lambda trouble: type(trouble).__name__)
async def test_what_stands_before_a_full_window_is_told_first(setting: Setting, trouble: Exception) -> None:
    await setting.fill()
    setting.inner.trouble = trouble
    with pytest.raises(type(trouble)):
        await setting.ledger.admit(make_request(setting.agent))
    setting.inner.trouble = None
    await setting.update(status=AgentStatus.INACTIVE)
    with pytest.raises(AgentInactive):
        await setting.ledger.admit(make_request(setting.agent))


async def test_a_full_window_is_told_before_an_empty_budget(setting: Setting) -> None:
    await setting.fill()
    await setting.update(budget_config={"max_cost_per_invocation": 1, "max_monthly_cost": 0})
    with pytest.raises(RateLimited) as refusal:
        await setting.ledger.admit(make_request(setting.agent))
    assert refusal.value.quotas.quotas[0].used == 3
    assert not setting.store.invocations_of(setting.agent.org_id)


async def test_an_exceeded_budget_tells_the_quotas_without_the_place(setting: Setting) -> None:
    for _ in range(2):
        await setting.ledger.admit(make_request(setting.agent))
    for _ in range(3):
        with pytest.raises(BudgetExceeded) as refusal:
            await setting.ledger.admit(make_request(setting.agent))
        assert refusal.value.quotas == (await setting.ledger.forecast(setting.agent.org_id, setting.agent.id)).quotas
        assert [quota.used for quota in refusal.value.quotas.quotas] == [2]


@pytest.mark.parametrize("is_full", [False, True])
async def test_a_replay_takes_no_place(setting: Setting, is_full: bool) -> None:
    first = await setting.ledger.admit(make_request(setting.agent))
    if is_full:
        await setting.fill()
    used = await setting.used()
    setting.inner.trouble = attrs.evolve(first, replayed=True)
    replay = await setting.ledger.admit(make_request(setting.agent))
    assert (replay.replayed, replay.invocation) == (True, first.invocation)
    assert [quota.used for quota in replay.quotas.quotas] == [used]
    assert await setting.used() == used


@pytest.mark.parametrize("doubt", [AdmissionInDoubt("The database"), asyncio.CancelledError(), ZeroDivisionError()])
async def test_a_place_whose_admission_is_in_doubt_stays_taken(setting: Setting, doubt: BaseException) -> None:
    setting.inner.trouble = doubt
    with pytest.raises(type(doubt)):
        await setting.ledger.admit(make_request(setting.agent))
    assert await setting.used() == 1


async def test_without_the_limiter_nothing_is_admitted(setting: Setting) -> None:
    setting.limiter.is_out = True
    with pytest.raises(Unavailable):
        await setting.ledger.admit(make_request(setting.agent))
    assert not setting.store.invocations_of(setting.agent.org_id)


async def test_a_place_that_cannot_be_given_back_changes_no_answer(
    setting: Setting, caplog: pytest.LogCaptureFixture
) -> None:
    class Outage(TroubledLedger):
        async def admit(self, request: AdmissionRequest) -> Admission:
            setting.limiter.is_out = True
            raise StaleVersion

    ledger = LimitedLedger(Outage(setting.store, FakeClock()), setting.limiter)
    with pytest.raises(StaleVersion):
        await ledger.admit(make_request(setting.agent))
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert await setting.used() == 1


async def test_a_forecast_knows_the_limits_as_they_are_now(setting: Setting) -> None:
    await setting.ledger.admit(make_request(setting.agent, invocation_id=id_at(setting.clock.now())))
    await setting.update(rate_limit_config={"requests_per_hour": 1, "requests_per_day": 9})
    forecast = await setting.ledger.forecast(setting.agent.org_id, setting.agent.id)
    assert [(quota.window, quota.limit, quota.used) for quota in forecast.quotas.quotas] == [
        (Window.HOUR, 1, 1),
        (Window.DAY, 9, 1),
    ]
    assert forecast.rate_limited
    assert forecast.account.reserved == 1
