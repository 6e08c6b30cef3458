"""What is known of an agent may lead to an admission and to nothing else."""

from __future__ import annotations

import asyncio
from typing import Any, TypeAlias

import pytest
from hypothesis import given
from hypothesis import strategies as st

from external_agents import ExternalAgent, ExternalAgentsError, ExternalAgentService
from external_agents.adapters.memory import (
    MemoryAgentReader,
    MemoryAgentWriter,
    MemoryInvocationReader,
    MemoryLedger,
    MemorySecretBox,
    MemoryStore,
)
from external_agents.application.access import AccessControl, Witness
from external_agents.application.known_agents import KnownAgents
from external_agents.application.registration import Opened
from external_agents.domain.auth import FixedHeaders
from external_agents.domain.egress import EgressPolicy
from external_agents.ports.secrets import SecretContext
from external_agents.testing.fakes import FakeClock, RecordingObservability, ScriptedTransport, SequentialIds
from two_services import (
    ALICE,
    CLOSED,
    DOCUMENT,
    SECRETS,
    ChangesHoldElsewhere,
    CountingReader,
    Side,
    Sides,
    TagPolicy,
    signed_with,
    token_of,
)


class CountingBox(MemorySecretBox):
    def __init__(self) -> None:
        super().__init__()
        self.opened = 0

    def open(self, envelope: bytes, context: SecretContext) -> bytes:
        self.opened += 1
        return super().open(envelope, context)


class House:
    """One store; as many services over it as one likes."""

    def __init__(self) -> None:
        self.store, self.clock, self.box = MemoryStore(), FakeClock(), CountingBox()
        self.ids = SequentialIds(self.clock)
        self.policy = TagPolicy()

    def side(self) -> Side:
        transport, observability = ScriptedTransport(), RecordingObservability()
        reader = CountingReader(MemoryAgentReader(self.store))
        service = ExternalAgentService(
            agent_reader=reader,
            agent_writer=MemoryAgentWriter(self.store),
            invocation_reader=MemoryInvocationReader(self.store),
            ledger=MemoryLedger(self.store, self.clock),
            policy=self.policy,
            transport=transport,
            secret_box=self.box,
            observability=observability,
            url_rules=EgressPolicy(),
            clock=self.clock,
            ids=self.ids,
        )
        return Side(service, transport, reader, observability)


@pytest.fixture
def house() -> House:
    return House()


@pytest.fixture
def sides(house: House) -> Sides:
    return house.side(), house.side()


class TestInMemory(ChangesHoldElsewhere):
    pass


async def test_credentials_are_opened_once_for_each_version(house: House) -> None:
    side = house.side()
    agent = await side.service.create_agent(ALICE, DOCUMENT)
    for _ in range(3):
        assert token_of(await side.told(agent)) == "first"
    assert house.box.opened == 1
    await side.service.update_agent(ALICE, agent.id, {"name": "Renamed"})
    opened = house.box.opened
    for _ in range(3):
        assert token_of(await side.told(agent)) == "first"
    assert house.box.opened == opened + 1


async def test_a_secret_whose_time_is_over_is_forgotten(house: House) -> None:
    """Where the agent is known; it has not changed."""
    side = house.side()
    agent = await side.service.create_agent(ALICE, {**DOCUMENT, "signing_secret": SECRETS[0]})
    await side.service.update_agent(ALICE, agent.id, {"signing_secret": SECRETS[1]})
    known: list[tuple[int, int]] = []
    for hours in (0, 23, 1, 1, 100):
        house.clock.advance(hours * 3600)
        reads, opened = side.reader.reads, house.box.opened
        assert signed_with(await side.told(agent), *SECRETS) == [1, 0][: 2 if len(known) < 2 else 1]
        known.append((side.reader.reads - reads, house.box.opened - opened))
    assert known == [(1, 3), (0, 0), (1, 2), (0, 0), (0, 0)], "read and opened once more, without the old one"


async def test_what_was_not_found_is_looked_for_each_time(house: House) -> None:
    here, there = house.side(), house.side()
    agent = await here.service.create_agent(ALICE, DOCUMENT)
    house.store.agents.pop((agent.org_id, agent.id))
    assert [await there.told(agent) for _ in range(3)] == ["AgentNotFound"] * 3
    assert there.reader.reads == 3
    house.store.agents[agent.org_id, agent.id] = agent
    assert token_of(await there.told(agent)) == "first"


async def test_so_many_are_known_and_no_more(house: House) -> None:
    reader = CountingReader(MemoryAgentReader(house.store))
    access = AccessControl(house.policy, house.clock, Witness(RecordingObservability()))
    opened = Opened(credentials=FixedHeaders({}), signing=None)
    known = KnownAgents(reader, access, lambda agent: opened, clock=house.clock, known_max=3)
    agents = [await house.side().service.create_agent(ALICE, DOCUMENT) for _ in range(4)]

    async def reads_after(*numbers: int) -> int:
        for number in numbers:
            assert await known.to_invoke(ALICE, agents[number].id, lambda found: found.agent) == agents[number]
        return reader.reads

    assert await reads_after(0, 1, 2, 0, 3) == 4
    assert await reads_after(0, 2, 3) == 4
    assert await reads_after(1) == 5, "the one that was asked for longest ago had to go"


@pytest.mark.parametrize(
    "large",
    [
        {"platform_config": {"text": "x" * 20_000}},
        {"platform_config": {"many": [[] for _ in range(300)]}},
        {"platform_config": {str(number): None for number in range(200)}},
        {"auth_type": "custom", "auth_config": {"headers": {f"X-{number}": "y" for number in range(200)}}},
    ],
)
async def test_a_large_agent_is_read_each_time(house: House, large: dict[str, Any]) -> None:
    side = house.side()
    agent = await side.service.create_agent(ALICE, {**DOCUMENT, **large})
    await side.service.invoke_agent(ALICE, agent.id, None)
    await side.service.invoke_agent(ALICE, agent.id, None)
    assert side.reader.reads == 2
    nothing = dict.fromkeys(large.get("platform_config", {}))
    await side.service.update_agent(ALICE, agent.id, {"platform_config": nothing, "auth_type": "none"})
    for reads in (4, 4):
        await side.service.invoke_agent(ALICE, agent.id, None)
        assert side.reader.reads == reads
    grown = house.side()
    await grown.service.update_agent(ALICE, agent.id, {"platform_config": {"text": "x" * 20_000}})
    for reads in (5, 6):
        await side.service.invoke_agent(ALICE, agent.id, None)
        assert side.reader.reads == reads


async def test_ones_own_change_is_known_at_once(house: House) -> None:
    """It costs no admission that is refused, and so no second decision."""
    side = house.side()
    agent = await side.service.create_agent(ALICE, DOCUMENT)
    await side.told(agent)
    await side.service.update_agent(ALICE, agent.id, {"name": "Renamed"})
    side.observability.records.clear()
    await side.told(agent)
    assert len(side.observability.decisions) == 1


Change: TypeAlias = dict[str, Any]
Step: TypeAlias = tuple[str, int, int, Change | None]
"""What is done, through which service, to which agent."""

CHANGES: list[Change] = [
    {"status": "inactive"},
    {"status": "active"},
    {"tags": [CLOSED]},
    {"tags": []},
    {"auth_config": {"token": "second"}},
    {"webhook_url": "https://other.example.com/", "auth_config": {"token": "third"}},
    {"rate_limit_config": {"requests_per_minute": 1}},
    {"rate_limit_config": None},
    {"budget_config": {"max_cost_per_invocation": 1, "max_monthly_cost": 2}},
    {"budget_config": None},
    {"platform_config": {"text": "x" * 20_000}},
    {"signing_secret": SECRETS[0]},
    {"signing_secret": SECRETS[1]},
    {"signing_secret": None},
    {},
]
steps = st.one_of(
    st.tuples(st.just("change"), st.integers(0, 1), st.integers(0, 1), st.sampled_from(CHANGES)),
    st.tuples(st.just("invoke"), st.integers(0, 1), st.integers(0, 1), st.none()),
    st.tuples(st.just("delete"), st.integers(0, 1), st.just(1), st.none()),
    st.tuples(st.just("wait"), st.just(0), st.just(0), st.none()),
    st.tuples(st.just("wait for hours"), st.just(0), st.just(0), st.none()),
)


@given(st.lists(steps, min_size=1, max_size=40))
def test_two_services_that_know_answer_like_one_that_does_not(
    history: list[Step],
) -> None:
    """The reference does each step through a service that has just been made."""
    assert _told(history, fresh=False) == _told(history, fresh=True)


def _told(history: list[Step], *, fresh: bool) -> list[object]:
    house = House()
    lasting = house.side(), house.side()
    told: list[object] = []

    async def live() -> None:
        first = house.side().service
        agents = [await first.create_agent(ALICE, DOCUMENT) for _ in range(2)]
        for kind, which, whom, change in history:
            side = house.side() if fresh else lasting[which]
            told.append(await _step(house, side, kind, agents[whom], change))

    asyncio.run(live())
    return told


async def _step(house: House, side: Side, kind: str, agent: ExternalAgent, change: Change | None) -> object:
    try:
        if kind == "change":
            return (await side.service.update_agent(ALICE, agent.id, change)).version
        if kind == "delete":
            return await side.service.delete_agent(ALICE, agent.id)
        if kind == "wait":
            return house.clock.advance(61)
        if kind == "wait for hours":
            return house.clock.advance(12.5 * 3600)
        request = await side.told(agent)
        if isinstance(request, str):
            return request
        return request.url, token_of(request), signed_with(request, *SECRETS)
    except ExternalAgentsError as refusal:
        return type(refusal).__name__
