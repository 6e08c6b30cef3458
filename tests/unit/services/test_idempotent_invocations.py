"""Invocations asked for twice: what is answered again, what is sent, and who is told."""

from __future__ import annotations

import asyncio
from typing import Any

import attrs
import pytest

from external_agents import (
    AgentInactive,
    AgentNotFound,
    ExternalAgent,
    ExternalAgentService,
    IdempotencyKeyInFlight,
    IdempotencyKeyReused,
    InvocationStatus,
    JsonText,
    Outcome,
    PermissionDenied,
    Principal,
    RateLimited,
    ValidationError,
)
from external_agents.adapters.memory import MemoryLedger, MemoryStore, memory_service
from external_agents.domain.idempotency import KEPT_FOR
from external_agents.ports.ledger import Admission, AdmissionRequest
from external_agents.testing.builders import ALL_PERMISSIONS, costing, refused, timed_out
from external_agents.testing.fakes import FakeClock, Gate, RecordingObservability, ScriptedTransport, SequentialIds

ALICE = Principal("acme", "alice", ALL_PERMISSIONS)
KEY = "order-17"
DOCUMENT = {
    "name": "Research",
    "provider": "custom",
    "webhook_url": "https://agent.example.com/hook",
    "auth_type": "none",
    "max_attempts": 1,
    "rate_limit_config": {"requests_per_hour": 2},
    "budget_config": {"max_cost_per_invocation": "0.1", "max_monthly_cost": 1},
}


class RacingLedger(MemoryLedger):
    """Somebody changes the agent just before an admission, as often as it is told."""

    changes = 0

    async def admit(self, request: AdmissionRequest) -> Admission:
        if self.changes:
            self.changes -= 1
            agent = self._store.agents[request.org_id, request.agent_id]
            self._store.agents[request.org_id, request.agent_id] = attrs.evolve(agent, version=agent.version + 1)
        return await super().admit(request)


@attrs.frozen
class World:
    clock: FakeClock
    ledger: RacingLedger
    transport: ScriptedTransport
    observability: RecordingObservability
    service: ExternalAgentService

    async def agent(self, **changes: Any) -> ExternalAgent:
        return await self.service.create_agent(ALICE, {**DOCUMENT, **changes})

    async def used(self, agent: ExternalAgent) -> object:
        return await self.service.get_usage(ALICE, agent.id)

    @property
    def told(self) -> list[str]:
        """Of each record of an invocation: how it ended, or why it was none."""
        records = self.observability.invocations
        return [str(record.refusal or (record.invocation and record.invocation.status)) for record in records]


@pytest.fixture
def world() -> World:
    clock, store = FakeClock(), MemoryStore()
    ledger, transport, observability = RacingLedger(store, clock), ScriptedTransport(), RecordingObservability()
    service = memory_service(
        transport, store=store, ledger=ledger, clock=clock, ids=SequentialIds(clock), observability=observability
    )
    return World(clock, ledger, transport, observability, service)


@pytest.mark.parametrize(
    ("outcome", "status"),
    [(costing("0.05"), "succeeded"), (refused(400), "failed"), (timed_out(), "failed")],
    ids=["answer", "refusal", "timeout"],
)
async def test_the_first_is_returned_again_and_nothing_is_sent(world: World, outcome: Outcome, status: str) -> None:
    agent = await world.agent()
    world.transport.script.append(outcome)
    first = await world.service.invoke(ALICE, agent.id, {"a": [1, 2.5]}, idempotency_key=KEY)
    assert not first.replayed
    used = await world.used(agent)
    again = await world.service.invoke(ALICE, agent.id, JsonText('{"a":[1.0,25e-1]}'), idempotency_key=KEY)
    assert (again.replayed, again.invocation) == (True, first.invocation)
    assert again.invocation.status is InvocationStatus(status)
    assert await world.service.invoke_agent(ALICE, agent.id, {"a": [1, 2.5]}, idempotency_key=KEY) == first.invocation
    assert len(world.transport.requests) == 1
    assert await world.used(agent) == used
    page = await world.service.list_invocations(ALICE, agent.id)
    assert list(page.items) == [first.invocation]


async def test_who_asks_again_may_be_another_subject_of_the_organisation(world: World) -> None:
    agent = await world.agent()
    first = await world.service.invoke_agent(ALICE, agent.id, None, idempotency_key=KEY)
    again = await world.service.invoke_agent(
        attrs.evolve(ALICE, subject="bob"), agent.id, None, idempotency_key=KEY, trace_id="a" * 32, lineage_hop_id="hop"
    )
    assert again == first
    with pytest.raises(PermissionDenied):
        await world.service.invoke_agent(Principal("acme", "eve", ()), agent.id, None, idempotency_key=KEY)
    with pytest.raises(AgentNotFound):
        await world.service.invoke_agent(attrs.evolve(ALICE, org_id="other"), agent.id, None, idempotency_key=KEY)


async def test_a_replay_is_told_but_not_as_another_end(world: World) -> None:
    agent = await world.agent()
    for _ in range(3):
        await world.service.invoke_agent(ALICE, agent.id, None, idempotency_key=KEY)
    with pytest.raises(IdempotencyKeyReused):
        await world.service.invoke_agent(ALICE, agent.id, 0, idempotency_key=KEY)
    assert world.told == ["succeeded", "Replayed", "Replayed", "IdempotencyKeyReused"]
    assert [record.invocation is None for record in world.observability.invocations] == [False, True, True, True]


async def test_while_the_first_runs(world: World) -> None:
    agent = await world.agent()
    gate = Gate()
    world.transport.script.append(gate)
    running = asyncio.create_task(world.service.invoke_agent(ALICE, agent.id, None, idempotency_key=KEY))
    await gate.entered.wait()
    with pytest.raises(IdempotencyKeyInFlight):
        await world.service.invoke_agent(ALICE, agent.id, None, idempotency_key=KEY)
    with pytest.raises(IdempotencyKeyReused):
        await world.service.invoke_agent(ALICE, agent.id, 0, idempotency_key=KEY)
    gate.opened.set()
    first = await running
    assert await world.service.invoke_agent(ALICE, agent.id, None, idempotency_key=KEY) == first
    assert world.told == ["IdempotencyKeyInFlight", "IdempotencyKeyReused", "succeeded", "Replayed"]


async def test_a_caller_who_went_away_finds_the_answer_by_the_key(world: World) -> None:
    agent = await world.agent()
    gate = Gate()
    world.transport.script.append(gate)
    leaving = asyncio.create_task(world.service.invoke_agent(ALICE, agent.id, None, idempotency_key=KEY))
    await gate.entered.wait()
    leaving.cancel()
    gate.opened.set()
    await world.service.drain()
    again = await world.service.invoke(ALICE, agent.id, None, idempotency_key=KEY)
    assert (again.replayed, len(world.transport.requests)) == (True, 1)


async def test_an_agent_that_changes_meanwhile_is_read_again(world: World) -> None:
    agent = await world.agent()
    world.ledger.changes = 2
    first = await world.service.invoke(ALICE, agent.id, None, idempotency_key=KEY)
    assert not first.replayed
    world.ledger.changes = 2
    again = await world.service.invoke(ALICE, agent.id, None, idempotency_key=KEY)
    assert (again.replayed, again.invocation) == (True, first.invocation)


async def test_a_refusal_keeps_no_key(world: World) -> None:
    agent = await world.agent(status="inactive", rate_limit_config={"requests_per_hour": 0})
    with pytest.raises(AgentInactive):
        await world.service.invoke_agent(ALICE, agent.id, 1, idempotency_key=KEY)
    await world.service.update_agent(ALICE, agent.id, {"status": "active"})
    with pytest.raises(RateLimited):
        await world.service.invoke_agent(ALICE, agent.id, 2, idempotency_key=KEY)
    await world.service.update_agent(ALICE, agent.id, {"rate_limit_config": None})
    assert not (await world.service.invoke(ALICE, agent.id, 3, idempotency_key=KEY)).replayed


async def test_a_key_is_kept_for_a_day(world: World) -> None:
    agent = await world.agent()
    first = await world.service.invoke_agent(ALICE, agent.id, None, idempotency_key=KEY)
    world.clock.advance(KEPT_FOR.total_seconds())
    second = await world.service.invoke_agent(ALICE, agent.id, None, idempotency_key=KEY)
    assert second.id != first.id


@pytest.mark.parametrize("key", ["", "x" * 256, "a\0b", "\udc80"])
@pytest.mark.parametrize("status", ["active", "inactive"])
async def test_what_is_no_key_is_told_before_the_agents_state(world: World, key: str, status: str) -> None:
    agent = await world.agent(status=status)
    with pytest.raises(ValidationError) as invalid:
        await world.service.invoke_agent(ALICE, agent.id, None, idempotency_key=key)
    assert {fault.path for fault in invalid.value.errors} == {"idempotency_key"}
    with pytest.raises(ValidationError) as invalid:
        await world.service.invoke_agent(ALICE, agent.id, None, idempotency_key=key, lineage_hop_id="", trace_id="x")
    assert {fault.path for fault in invalid.value.errors} == {"idempotency_key", "lineage_hop_id", "trace_id"}
    assert not world.transport.requests


@pytest.mark.parametrize("key", ["k", " ", "x" * 255, "ключ", "\U0001f511" * 255])
async def test_any_other_text_is_one(world: World, key: str) -> None:
    agent = await world.agent()
    first = await world.service.invoke_agent(ALICE, agent.id, None, idempotency_key=key)
    assert await world.service.invoke_agent(ALICE, agent.id, None, idempotency_key=key) == first
