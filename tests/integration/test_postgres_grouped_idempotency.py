"""Idempotency keys in the function of group commit: one invocation, whoever asks for it, and however often."""

from __future__ import annotations

import asyncio
from typing import Any

import attrs
import psycopg
import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from books import assert_books_balance
from external_agents.adapters.postgres.agents import PostgresAgents
from external_agents.domain.agent import AgentStatus, ExternalAgent
from external_agents.domain.errors import AgentInactive, AgentNotFound, StaleVersion
from external_agents.domain.invocation import ExternalAgentInvocation, InvocationStatus
from external_agents.domain.json_values import JsonText
from external_agents.domain.rate_limit import Quota, RateQuotas, Window
from external_agents.domain.refusals import (
    BudgetExceeded,
    IdempotencyKeyInFlight,
    IdempotencyKeyReused,
    RateLimited,
)
from external_agents.ports.ledger import LEASE_S, Admission, AdmissionRequest
from external_agents.ports.rate_limiter import Place
from external_agents.testing.builders import conclude, costing, make_agent, make_request, new_org, next_version, refused
from grouped import Watched, admitted, names, settled_down, stored_agents, watched
from postgres_server import OpenEngine, ShiftedClock, dsn

DAY_S = 24 * 3600.0


@pytest.fixture
def engine(shifted_clock: ShiftedClock, open_engine: OpenEngine) -> AsyncEngine:
    return open_engine(shifted_clock.url)


@pytest.fixture
async def scene(engine: AsyncEngine) -> Watched:
    return await watched(engine)


def keyed(agent: ExternalAgent, key: str = "key", **changes: Any) -> AdmissionRequest:
    return make_request(agent, idempotency_key=key, **changes)


async def ended(scene: Watched, request: AdmissionRequest, **changes: Any) -> ExternalAgentInvocation:
    admission = await scene.ledger.admit(request)
    assert not admission.replayed
    return await scene.ledger.settle(conclude(admission.invocation, **changes))


async def used(scene: Watched, agent: ExternalAgent) -> list[int]:
    return [quota.used for quota in (await scene.ledger.forecast(agent.org_id, agent.id)).quotas.quotas]


async def test_the_first_answer_again(scene: Watched, postgres_agents: PostgresAgents, postgres_url: str) -> None:
    """Success or failure; nothing is taken, nothing is recorded."""
    agent = make_agent(rate_limit_config={"requests_per_day": 5}, budget_config={"max_cost_per_invocation": 1})
    await postgres_agents.create(agent)
    first = await ended(scene, keyed(agent, "a"), outcome=costing("0.5"))
    second = await ended(scene, keyed(agent, "b"), outcome=refused())
    for _ in range(3):
        for key, invocation in (("a", first), ("b", second)):
            admission = await scene.ledger.admit(keyed(agent, key))
            assert (admission.invocation, admission.replayed) == (invocation, True)
            assert [quota.used for quota in admission.quotas.quotas] == [2]
    assert await used(scene, agent) == [2]
    assert not scene.ledger._instance._in_flight
    with psycopg.connect(dsn(postgres_url)) as connection:
        assert connection.execute("SELECT FROM external_agent_invocations").rowcount == 2
    await assert_books_balance(postgres_url)


async def test_the_same_is_equal_json(scene: Watched, postgres_agents: PostgresAgents) -> None:
    [agent] = await stored_agents(postgres_agents, 1)
    first = await ended(scene, keyed(agent, request=JsonText('{"a": 1, "b": [1.50, "\\u0041"]}')))
    again = await scene.ledger.admit(keyed(agent, request=JsonText('{"b":[15e-1,"A"],"a":1.0}')))
    assert (again.invocation, again.replayed) == (first, True)
    with pytest.raises(IdempotencyKeyReused):
        await scene.ledger.admit(keyed(agent, request=JsonText('{"a": 1, "b": [1.51, "A"]}')))


async def test_another_payload_is_told_before_that_the_first_still_runs(
    scene: Watched, postgres_agents: PostgresAgents
) -> None:
    [agent] = await stored_agents(postgres_agents, 1, rate_limit_config={"requests_per_day": 5})
    await scene.ledger.admit(keyed(agent))
    with pytest.raises(IdempotencyKeyInFlight):
        await scene.ledger.admit(keyed(agent))
    with pytest.raises(IdempotencyKeyReused):
        await scene.ledger.admit(keyed(agent, request=JsonText("7")))
    assert await used(scene, agent) == [1]
    assert scene.ledger._instance.in_flight() == 1


async def test_a_key_is_an_agents_own(scene: Watched, postgres_agents: PostgresAgents) -> None:
    one = make_agent()
    sibling, namesake = make_agent(org_id=one.org_id), make_agent(id=one.id, org_id=new_org())
    await postgres_agents.bulk([one, sibling, namesake])
    results = await asyncio.gather(*(scene.ledger.admit(keyed(agent)) for agent in (one, sibling, namesake)))
    assert not any(admission.replayed for admission in results)
    assert scene.sizes == [(3, 0)]


@pytest.mark.parametrize("key", ["k", "x" * 255, "ü\U0010ffff" * 100, "NULL", "{a,b}", " ", "'; --", "\\"])
async def test_any_text_is_a_key(scene: Watched, postgres_agents: PostgresAgents, key: str) -> None:
    [agent] = await stored_agents(postgres_agents, 1)
    first = await ended(scene, keyed(agent, key))
    assert (await scene.ledger.admit(keyed(agent, key))).invocation == first


async def test_of_many_with_one_key_one_is_admitted(
    scene: Watched, engine: AsyncEngine, postgres_agents: PostgresAgents, postgres_url: str
) -> None:
    """In the same moment, in one process and in several."""
    [agent] = await stored_agents(postgres_agents, 1, budget_config={"max_cost_per_invocation": 1})
    other = await watched(engine)
    for number in range(5):
        results = await settled_down(
            *(each.ledger.admit(keyed(agent, f"key {number}")) for _ in range(30) for each in (scene, other))
        )
        assert len(admitted(results)) == 1
        assert names(results) == {"Admission", "IdempotencyKeyInFlight"}
    assert scene.ledger._instance.in_flight() + other.ledger._instance.in_flight() == 5
    await assert_books_balance(postgres_url)


async def test_of_two_payloads_with_one_key_one_is_admitted(scene: Watched, postgres_agents: PostgresAgents) -> None:
    [agent] = await stored_agents(postgres_agents, 1)
    payloads = [JsonText("1"), JsonText("2")] * 10
    results = await settled_down(*(scene.ledger.admit(keyed(agent, request=payload)) for payload in payloads))
    [admission] = admitted(results)
    for payload, result in zip(payloads, results, strict=True):
        if result is not admission:
            same = payload == admission.invocation.request
            assert type(result) is (IdempotencyKeyInFlight if same else IdempotencyKeyReused)


async def test_a_refusal_keeps_no_key(scene: Watched, postgres_agents: PostgresAgents) -> None:
    limited = make_agent(rate_limit_config={"requests_per_day": 0})
    poor = make_agent(budget_config={"max_cost_per_invocation": 2, "max_monthly_cost": 1})
    asleep = make_agent()
    await postgres_agents.bulk([limited, poor, asleep])
    await postgres_agents.update(asleep := next_version(asleep, status=AgentStatus.INACTIVE))
    refusals = await settled_down(
        *(scene.ledger.admit(keyed(agent)) for agent in (limited, poor, asleep, next_version(limited), make_agent()))
    )
    assert [type(refusal) for refusal in refusals] == [
        RateLimited,
        BudgetExceeded,
        AgentInactive,
        StaleVersion,
        AgentNotFound,
    ]
    for agent in (limited, poor, asleep):
        free = next_version(agent, rate_limit_config=None, budget_config=None, status=AgentStatus.ACTIVE)
        await postgres_agents.update(free)
        admission = await scene.ledger.admit(keyed(free, request=JsonText('"another payload"')))
        assert not admission.replayed


async def test_an_earlier_invocation_answers_before_limits_and_after_the_agents_state(
    scene: Watched, postgres_agents: PostgresAgents
) -> None:
    agent = make_agent(
        rate_limit_config={"requests_per_day": 1},
        budget_config={"max_cost_per_invocation": 1, "max_monthly_cost": 1},
    )
    await postgres_agents.create(agent)
    first = await ended(scene, keyed(agent))
    results = await settled_down(
        scene.ledger.admit(make_request(agent)),
        scene.ledger.admit(keyed(agent)),
        scene.ledger.admit(keyed(agent, verdict=RateLimited("day", 1, RateQuotas()))),
        scene.ledger.admit(keyed(agent, "other")),
    )
    assert names([results[0], results[3]]) == {"RateLimited"}
    assert [result.invocation for result in admitted(results)] == [first] * 2
    await postgres_agents.update(next_version(agent))
    with pytest.raises(StaleVersion):
        await scene.ledger.admit(keyed(agent))
    asleep = next_version(next_version(agent), status=AgentStatus.INACTIVE)
    await postgres_agents.update(asleep)
    with pytest.raises(AgentInactive):
        await scene.ledger.admit(keyed(asleep))


async def test_replays_take_no_room_from_those_they_share_a_batch_with(
    scene: Watched, postgres_agents: PostgresAgents
) -> None:
    agent = make_agent(
        rate_limit_config={"requests_per_day": 5}, budget_config={"max_cost_per_invocation": 1, "max_monthly_cost": 4}
    )
    await postgres_agents.create(agent)
    known = [await ended(scene, keyed(agent, f"{number}")) for number in range(2)]
    before = len(scene.sizes)
    requests = [
        *(keyed(agent, "0"), keyed(agent, "new"), make_request(agent), keyed(agent, "1")),
        *(keyed(agent, "0", request=JsonText("0")), make_request(agent), keyed(agent, "newer")),
    ]
    results: list[Any] = await settled_down(*(scene.ledger.admit(request) for request in requests))
    assert scene.sizes[before:] == [(6, 0), (1, 0)], "a key that is in the batch waits for the next"
    assert [type(result).__name__ for result in results] == [
        *("Admission", "Admission", "Admission", "Admission", "IdempotencyKeyReused"),
        *("BudgetExceeded", "BudgetExceeded"),
    ]
    assert [results[0].invocation, results[3].invocation] == known
    assert [result.replayed for result in results[:4]] == [True, False, False, True]
    assert [results[number].invocation.id for number in (1, 2)] == [
        requests[1].invocation_id,
        requests[2].invocation_id,
    ]
    assert [results[number].quotas.quotas[0].used for number in (1, 2)] == [3, 4]
    # What was refused has not kept its key.
    await postgres_agents.update(free := next_version(agent, budget_config=None))
    assert not (await scene.ledger.admit(keyed(free, "newer", request=JsonText("3")))).replayed


async def test_a_place_taken_elsewhere_is_answered_with_its_own_quotas(
    scene: Watched, postgres_agents: PostgresAgents
) -> None:
    [agent] = await stored_agents(postgres_agents, 1, rate_limit_config={"requests_per_day": 1})
    place = Place(RateQuotas((Quota(Window.DAY, 1, 1, 5.0),)), token=None)
    first = await ended(scene, keyed(agent, verdict=place))
    again = await scene.ledger.admit(keyed(agent, verdict=place))
    assert again == Admission(invocation=first, quotas=place.quotas, replayed=True)


async def test_a_key_is_kept_for_a_day_and_then_overwritten(
    scene: Watched, postgres_agents: PostgresAgents, shifted_clock: ShiftedClock, postgres_url: str
) -> None:
    [agent] = await stored_agents(postgres_agents, 1)
    first = await ended(scene, keyed(agent))
    await shifted_clock.pass_time(DAY_S - 60)
    assert (await scene.ledger.admit(keyed(agent))).invocation == first
    await shifted_clock.pass_time(61)
    second = await ended(scene, keyed(agent, request=JsonText('"new"')))
    assert second.id != first.id
    await shifted_clock.pass_time(DAY_S - 60)
    assert (await scene.ledger.admit(keyed(agent, request=JsonText('"new"')))).invocation == second
    with pytest.raises(IdempotencyKeyReused):
        await scene.ledger.admit(keyed(agent))
    with psycopg.connect(dsn(postgres_url)) as connection:
        assert connection.execute("SELECT FROM external_agent_idempotency_keys").rowcount == 1


async def test_a_key_whose_invocation_is_gone_is_free(
    scene: Watched, postgres_agents: PostgresAgents, postgres_url: str
) -> None:
    """Its partition was detached."""
    [agent] = await stored_agents(postgres_agents, 1)
    first = await ended(scene, keyed(agent))
    with psycopg.connect(dsn(postgres_url)) as connection:
        connection.execute("DELETE FROM external_agent_invocations")
    second = await scene.ledger.admit(keyed(agent))
    assert (second.replayed, second.invocation.id == first.id) == (False, False)


async def test_what_recovery_has_ended_is_replayed_as_it_ended(
    scene: Watched, engine: AsyncEngine, postgres_agents: PostgresAgents, shifted_clock: ShiftedClock
) -> None:
    """It is never sent again."""
    [agent] = await stored_agents(postgres_agents, 1)
    left = (await scene.ledger.admit(keyed(agent))).invocation
    judge = await watched(engine)
    for _ in range(6):
        await shifted_clock.pass_time(LEASE_S / 4)
        await judge.ledger.heartbeat()
    assert await judge.ledger.recover() == 1
    replay = await judge.ledger.admit(keyed(agent))
    assert (replay.invocation.id, replay.replayed) == (left.id, True)
    assert replay.invocation.status is InvocationStatus.UNKNOWN
    assert attrs.evolve(replay.invocation, completed_at=None) == attrs.evolve(
        left.interrupted(left.created_at), completed_at=None
    )
