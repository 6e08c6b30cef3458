"""What the adapters in memory promise beyond their ports."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta, timezone
from uuid import UUID

import pytest

from external_agents import Action, InvocationNotFound, Principal, StaleVersion, Unauthenticated
from external_agents.adapters.memory import (
    MemoryAgentWriter,
    MemoryAuthenticator,
    MemoryLedger,
    MemoryObservability,
    MemoryStore,
    SystemClock,
    SystemIds,
)
from external_agents.domain.ids import created_at_of, first_id_at
from external_agents.ports.ledger import LEASE_S
from external_agents.ports.observability import DecisionRecord
from external_agents.testing.builders import id_at, make_agent, make_finished_call, make_request, principal_of
from external_agents.testing.fakes import FakeClock, SequentialIds


def test_the_systems_ids_are_uuid7_and_grow() -> None:
    ids = SystemIds()
    issued = [ids.new_id() for _ in range(2000)]
    assert issued == sorted(set(issued))
    assert {(type(id), id.version) for id in issued} == {(UUID, 7)}
    now = datetime.now(UTC)
    assert abs(created_at_of(issued[-1]) - now) < timedelta(minutes=1)
    traces = {ids.new_trace_id() for _ in range(100)}
    assert len(traces) == 100
    assert all(re.fullmatch("[0-9a-f]{32}", trace) for trace in traces)
    assert all(0 <= ids.jitter() < 1 for _ in range(100))


async def test_the_systems_clock() -> None:
    clock = SystemClock()
    assert clock.now().utcoffset() == timedelta(0)
    before = clock.monotonic_s()
    await clock.sleep(0)
    assert clock.monotonic_s() >= before


def test_sequential_ids_are_uuid7_of_the_clock() -> None:
    clock = FakeClock()
    ids = SequentialIds(clock)
    first, second = ids.new_id(), ids.new_id()
    clock.advance(1)
    third = ids.new_id()
    assert first < second < third
    assert [id.version for id in (first, second, third)] == [7, 7, 7]
    assert created_at_of(third) - created_at_of(first) == timedelta(seconds=1)


def test_the_first_id_of_a_moment() -> None:
    moment = datetime(2026, 3, 10, 12, 0, 0, 1000, tzinfo=UTC)
    assert created_at_of(first_id_at(moment)) == moment
    assert first_id_at(moment) <= id_at(moment) < first_id_at(moment + timedelta(milliseconds=1))
    later = moment + timedelta(microseconds=1)
    assert created_at_of(first_id_at(later)) == moment + timedelta(milliseconds=1)
    assert created_at_of(first_id_at(datetime.min.replace(tzinfo=UTC))) == datetime(1970, 1, 1, tzinfo=UTC)
    assert first_id_at(datetime.max.replace(tzinfo=UTC)).version == 7
    plus_two = moment.astimezone(timezone(timedelta(hours=2)))
    assert first_id_at(plus_two) == first_id_at(moment)


async def test_an_id_that_is_taken() -> None:
    writer, agent = MemoryAgentWriter(MemoryStore()), make_agent()
    await writer.create(agent)
    for again in ([agent], [make_agent(), agent]):
        with pytest.raises(StaleVersion):
            await writer.bulk(again)
    twice = make_agent()
    with pytest.raises(StaleVersion):
        await writer.bulk([twice, twice])


async def test_settling_what_was_never_admitted() -> None:
    with pytest.raises(InvocationNotFound):
        await MemoryLedger(MemoryStore(), FakeClock()).settle(make_finished_call(make_agent()))


async def test_an_instance_does_not_end_its_own_invocations() -> None:
    """An embedding host that never sends a heartbeat is not dead for that."""
    clock, store, agent = FakeClock(), MemoryStore(), make_agent()
    await MemoryAgentWriter(store).create(agent)
    ledger = MemoryLedger(store, clock)
    running = (await ledger.admit(make_request(agent))).invocation
    clock.advance(10 * LEASE_S)
    assert await ledger.recover() == 0
    assert store.invocations_of(agent.org_id)[running.id] == running


async def test_a_withdrawn_token_is_refused() -> None:
    authenticator = MemoryAuthenticator()
    token, other = (authenticator.issue(principal_of("acme")) for _ in range(2))
    authenticator.withdraw(token)
    authenticator.withdraw("never issued")
    with pytest.raises(Unauthenticated):
        await authenticator.authenticate(token)
    assert (await authenticator.authenticate(other)).org_id == "acme"


def test_the_latest_records_are_kept() -> None:
    observability = MemoryObservability(records_max=2)
    records = [
        DecisionRecord(
            at=datetime(2026, 1, day, tzinfo=UTC),
            principal=Principal("acme", "alice", set()),
            action=Action.READ,
            agent_id=None,
            allowed=True,
        )
        for day in (1, 2, 3)
    ]
    for record in records:
        observability(record)
    assert list(observability.records) == records[1:]
