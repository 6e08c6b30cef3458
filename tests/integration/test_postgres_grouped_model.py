"""Group commit beside the ledger in memory, which does everything one by one: the same answers, the same state."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from decimal import Decimal
from itertools import count
from typing import Any, TypeAlias
from uuid import UUID

import attrs
import psycopg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy.ext.asyncio import AsyncEngine

from external_agents.adapters.memory.ledger import MemoryLedger
from external_agents.adapters.memory.store import MemoryStore
from external_agents.adapters.memory.system import SystemClock
from external_agents.adapters.postgres.agents import PostgresAgents
from external_agents.adapters.postgres.engine import create_engine
from external_agents.adapters.postgres.invocations import PostgresInvocations
from external_agents.domain.agent import AgentStatus
from external_agents.domain.errors import AgentInactive, StaleVersion
from external_agents.domain.invocation import ExternalAgentInvocation, Outcome
from external_agents.domain.rate_limit import Quota, RateQuotas, RateWindows, Window
from external_agents.domain.refusals import AdmissionRefused, BudgetExceeded, RateLimited
from external_agents.ports.ledger import Admission, AdmissionRequest
from external_agents.ports.rate_limiter import Place
from external_agents.ports.repositories import InvocationQuery
from external_agents.testing.builders import (
    conclude,
    costing,
    id_at,
    make_agent,
    make_request,
    new_id,
    new_org,
    next_version,
    refused,
    timed_out,
)
from grouped import LAST_MONTH, THIS_MONTH, Watched, watched
from postgres_server import PostgresServer, dsn

AGENTS = 3

amounts = st.sampled_from(["0", "0.000000001", "0.1", "1", "2.5", "999999999999.999999999", "333333333333.333333333"])
caps = amounts | st.sampled_from(["0.3", "7", "10.000000001", "999999999999.999999998"])
limit_configs = st.none() | st.fixed_dictionaries(
    {}, optional={f"requests_per_{window}": st.integers(0, 8) for window in ("minute", "hour", "day")}
)
currencies = st.sampled_from(["EUR", "USD"])
budget_configs = (
    st.none()
    | st.fixed_dictionaries(
        {}, optional={"max_cost_per_invocation": amounts, "max_monthly_cost": caps, "currency": currencies}
    )
    | st.fixed_dictionaries({"max_cost_per_invocation": st.just("1"), "max_monthly_cost": caps})
)
outcomes = st.sampled_from([costing(None), costing("0"), costing("0.05"), costing("900000000000"), refused()]) | (
    st.builds(timed_out)
)
outside = st.sampled_from(
    [
        Place(RateQuotas((Quota(Window.HOUR, 9, 4, 1.5),)), token="t"),
        RateLimited("hour", 17, RateQuotas((Quota(Window.HOUR, 9, 9, 17.0),))),
    ]
)


@attrs.frozen
class Admit:
    """`lag`: how many versions the caller is behind; -1: ahead."""

    agent: int
    lag: int = 0
    verdict: Place | RateLimited | None = None
    unknown: bool = False


@attrs.frozen
class Settle:
    """One of those that were admitted before: which, counted from the newest; again: one that has ended."""

    which: int
    outcome: Outcome
    currency: str


@attrs.frozen
class Change:
    agent: int
    rate_limit_config: Any
    budget_config: Any
    status: AgentStatus


admits = st.builds(
    Admit,
    st.integers(0, AGENTS - 1),
    st.sampled_from([0] * 8 + [1, -1]),
    st.none() | outside,
    st.sampled_from([False] * 9 + [True]),
)
settles = st.builds(Settle, st.integers(0, 30), outcomes, st.sampled_from(["EUR", "USD", "JPY"]))
changes = st.builds(
    Change,
    st.integers(0, AGENTS - 1),
    limit_configs,
    budget_configs,
    st.sampled_from([AgentStatus.ACTIVE] * 5 + [AgentStatus.INACTIVE]),
)
months = st.sampled_from([LAST_MONTH, THIS_MONTH])
batches = st.tuples(months, st.lists(admits | admits | settles, min_size=5, max_size=30))
Step: TypeAlias = "Change | tuple[Any, Sequence[Admit | Settle]]"


class OneByOne:
    """The ledger in memory, which knows nothing of verdicts from outside: they are added here."""

    def __init__(self) -> None:
        self.store = MemoryStore()
        self.ledger = MemoryLedger(self.store, SystemClock())

    async def admit(self, request: AdmissionRequest) -> Admission:
        verdict = request.verdict
        if verdict is None:
            return await self.ledger.admit(request)
        key = (request.org_id, request.agent_id)
        agent = self.store.agent(*key)
        windows = self.store.windows.get(key, RateWindows())
        self.store.agents[key] = attrs.evolve(agent, rate_limit_config=None)
        try:
            if isinstance(verdict, RateLimited):
                if agent.version != request.agent.version:
                    raise StaleVersion
                if agent.status is AgentStatus.INACTIVE:
                    raise AgentInactive
                raise verdict
            return attrs.evolve(await self.ledger.admit(request), quotas=verdict.quotas)
        except BudgetExceeded:
            raise BudgetExceeded(verdict.quotas) from None
        finally:
            self.store.agents[key] = agent
            self.store.windows[key] = windows


def comparable(answer: object) -> object:
    """Without what depends on the moment: in how many seconds a place comes free."""
    if isinstance(answer, Admission):
        return "admitted", answer.invocation, _used(answer.quotas)
    if isinstance(answer, AdmissionRefused):
        return type(answer), str(answer), _used(answer.quotas)
    return type(answer) if isinstance(answer, BaseException) else answer


def _used(quotas: RateQuotas) -> list[tuple[Window, int, int]]:
    return [(quota.window, quota.limit, quota.used) for quota in quotas.quotas]


class Twins:
    """Both ledgers, their agents, and what runs."""

    def __init__(self, scene: Watched, agents: PostgresAgents) -> None:
        self.scene = scene
        self.repository = agents
        self.reference = OneByOne()
        self.agents = [make_agent(org_id=org_id) for org_id in (new_org(), new_org())]
        self.agents.append(make_agent(org_id=self.agents[0].org_id))
        self.running: dict[UUID, ExternalAgentInvocation] = {}
        self.admitted: list[ExternalAgentInvocation] = []

    async def begin(self) -> None:
        await self.repository.bulk(self.agents)
        for agent in self.agents:
            self.reference.store.agents[agent.org_id, agent.id] = agent

    async def change(self, change: Change) -> None:
        agent = next_version(
            self.agents[change.agent],
            rate_limit_config=change.rate_limit_config,
            budget_config=change.budget_config,
            status=change.status,
        )
        await self.repository.update(agent)
        self.agents[change.agent] = self.reference.store.agents[agent.org_id, agent.id] = agent

    async def together(self, month: Any, asked: Sequence[Admit | Settle]) -> None:
        settlements = self.settlements([item for item in asked if isinstance(item, Settle)])
        requests = [self.request(item, month) for item in asked if isinstance(item, Admit)]
        grouped = await asyncio.gather(
            *(self.scene.ledger.settle(finished) for finished in settlements),
            *(self.scene.ledger.admit(request) for request in requests),
            return_exceptions=True,
        )
        expected = [await answer(self.reference.ledger.settle(finished)) for finished in settlements]
        admissions = dict.fromkeys(request.invocation_id for request in requests)
        for request in in_order(requests):
            admissions[request.invocation_id] = await answer(self.reference.admit(request))
        expected += admissions.values()
        assert [comparable(given) for given in grouped] == [comparable(wanted) for wanted in expected]
        self.admitted += [given.invocation for given in grouped if isinstance(given, Admission)]

    def settlements(self, asked: list[Settle]) -> list[ExternalAgentInvocation]:
        """Of each invocation one: which of two comes first in a batch, nobody promises."""
        chosen = {}
        for item in asked:
            if self.admitted:
                invocation = self.admitted[-1 - item.which % len(self.admitted)]
                chosen.setdefault(invocation.id, conclude(invocation, item.outcome, currency=item.currency))
        return [*chosen.values()]

    def request(self, item: Admit, month: Any) -> AdmissionRequest:
        agent = self.agents[item.agent]
        if item.unknown:
            agent = attrs.evolve(agent, id=new_id())
        version = max(1, agent.version - item.lag)
        invocation_id = id_at(month)
        return make_request(attrs.evolve(agent, version=version), invocation_id=invocation_id, verdict=item.verdict)

    async def assert_alike(self, reader: PostgresInvocations, url: str) -> None:
        store = self.reference.store
        for agent in self.agents:
            query = InvocationQuery(org_id=agent.org_id)
            rows = await reader.list(query, limit=1000)
            assert {row.id: row for row in rows} == store.invocations_of(agent.org_id)
            forecast = await self.scene.ledger.forecast(agent.org_id, agent.id)
            wanted = await self.reference.ledger.forecast(agent.org_id, agent.id)
            assert _used(forecast.quotas) == _used(wanted.quotas)
            assert forecast.rate_limited == wanted.rate_limited
        async with await psycopg.AsyncConnection.connect(dsn(url)) as connection:
            found = await connection.execute(
                "SELECT org_id, agent_id, currency, month, spent, reserved FROM external_agent_budgets "
                "WHERE org_id = ANY (%s) AND (spent > 0 OR reserved > 0)",
                [[agent.org_id for agent in self.agents]],
            )
            accounts = {((row[0], row[1]), row[2], row[3]): (row[4], row[5]) for row in await found.fetchall()}
        assert accounts == {
            key: (account.spent, account.reserved)
            for key, account in store.accounts.items()
            if account.spent or account.reserved
        }


def in_order(requests: Sequence[AdmissionRequest]) -> list[AdmissionRequest]:
    """As batches take them: of an agent, those with places from elsewhere apart from those without."""
    first: dict[tuple[UUID, int], bool] = {}
    for request in requests:
        if not isinstance(request.verdict, RateLimited):
            first.setdefault((request.agent_id, request.agent.version), request.verdict is None)
    return sorted(
        requests,
        key=lambda request: (
            not isinstance(request.verdict, RateLimited)
            and first[request.agent_id, request.agent.version] is not (request.verdict is None)
        ),
    )


async def answer(work: Any) -> Any:
    try:
        return await work
    except Exception as error:
        return error


@pytest.fixture(scope="module")
async def database(
    postgres_server: PostgresServer, postgres_url_template: str
) -> AsyncIterator[tuple[str, AsyncEngine, Watched]]:
    with postgres_server.database(postgres_url_template) as name:
        engine = create_engine(postgres_server.url(name))
        yield postgres_server.url(name), engine, await watched(engine)
        await engine.dispose()


@settings(max_examples=60)
@given(first=st.tuples(changes, changes, changes), steps=st.lists(changes | batches | batches, max_size=8))
async def test_batches_are_as_if_one_by_one(
    database: tuple[str, AsyncEngine, Watched], first: tuple[Change, ...], steps: list[Any]
) -> None:
    url, engine, scene = database
    twins = Twins(scene, PostgresAgents(engine, key_id_of=lambda envelope: "k1"))
    await twins.begin()
    for number, change in zip(count(), first, strict=False):
        await twins.change(attrs.evolve(change, agent=number))
    for step in steps:
        if isinstance(step, Change):
            await twins.change(step)
        else:
            await twins.together(*step)
    await twins.assert_alike(PostgresInvocations(engine), url)


@settings(max_examples=25)
@given(
    amount=st.integers(1, 10**21 - 1) | st.integers(10**18, 10**21 - 1),
    room=st.integers(0, 5),
    short=st.integers(0, 2),
    callers=st.integers(1, 8),
)
async def test_what_is_affordable_is_exact(
    database: tuple[str, AsyncEngine, Watched], amount: int, room: int, short: int, callers: int
) -> None:
    """A cap of so many amounts, short of the next by some billionths."""
    _, engine, scene = database
    cap = max(0, min(amount * (room + 1) - short, 10**21 - 1))
    agent = make_agent(
        budget_config={
            "max_cost_per_invocation": f"{Decimal(amount).scaleb(-9):f}",
            "max_monthly_cost": f"{Decimal(cap).scaleb(-9):f}",
        }
    )
    await PostgresAgents(engine, key_id_of=lambda envelope: "k1").create(agent)
    results = await asyncio.gather(
        *(scene.ledger.admit(make_request(agent)) for _ in range(callers)), return_exceptions=True
    )
    counts = Counter(type(result).__name__ for result in results)
    assert counts["Admission"] == min(callers, cap // amount)
    assert counts["Admission"] + counts["BudgetExceeded"] == callers
