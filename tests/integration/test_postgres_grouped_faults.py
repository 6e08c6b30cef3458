"""What cannot be done, or has to wait, fails alone: the others of its batch do not know."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import attrs
import psycopg
import pytest
from psycopg import sql
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine

from books import assert_books_balance
from external_agents.adapters.postgres.agents import PostgresAgents
from external_agents.adapters.postgres.invocations import PostgresInvocations
from external_agents.domain.agent import ExternalAgent
from external_agents.domain.budget import Money
from external_agents.domain.errors import AdmissionInDoubt, Unavailable
from external_agents.domain.invocation import ExternalAgentInvocation, InvocationStatus
from external_agents.domain.json_values import JsonText
from external_agents.ports.ledger import AdmissionRequest
from external_agents.ports.repositories import InvocationQuery
from external_agents.testing.builders import conclude, costing, make_agent, make_request, new_org
from grouped import Watched, admitted, held_up, names, settled_down, stored_agents, until, watched
from postgres_server import LOCK_AGENT, OpenEngine, dsn, wait_for_lock

BUDGET = {"budget_config": {"max_cost_per_invocation": 1}}
WHILE_HELD_S = 4.0
"""By then the others have their answers. Who waits for the lock itself waits for five seconds."""

LOCK_ACCOUNT = "SELECT FROM external_agent_budgets WHERE org_id = %s AND agent_id = %s FOR UPDATE"
LOCK_INVOCATIONS = (
    "SELECT FROM external_agent_invocations WHERE org_id = %s AND external_agent_id = %s AND status = 'running' "
    "FOR UPDATE"
)

Poisoned = Callable[[AdmissionRequest, ExternalAgentInvocation], AdmissionRequest]

POISONED_ADMISSIONS: dict[str, Poisoned] = {
    "not JSON to the server": lambda request, known: attrs.evolve(request, request=JsonText("{")),
    "no UTF-8": lambda request, known: attrs.evolve(request, request=JsonText('"\ud800"')),
    "NUL": lambda request, known: attrs.evolve(request, initiated_by="a\0b"),
    "an id that is taken": lambda request, known: attrs.evolve(request, invocation_id=known.id),
    "NULL": lambda request, known: attrs.evolve(request, trace_id=None),  # type: ignore[arg-type]
}
POISONED_SETTLEMENTS: dict[str, Callable[[ExternalAgentInvocation], ExternalAgentInvocation]] = {
    "not JSON to the server": lambda finished: attrs.evolve(finished, response=JsonText("{")),
    "no UTF-8": lambda finished: attrs.evolve(finished, response=JsonText('"\udfff"')),
    "out of range": lambda finished: attrs.evolve(finished, execution_time_ms=2**31),
    "a negative cost": lambda finished: attrs.evolve(finished, cost=Money(Decimal(-5), "USD")),
    "no amount": lambda finished: attrs.evolve(finished, cost=Money("dear", "USD")),  # type: ignore[arg-type]
}


async def statuses(engine: AsyncEngine, agent: ExternalAgent) -> dict[str, int]:
    reader = PostgresInvocations(engine)
    query = InvocationQuery(org_id=agent.org_id, agent_ids=frozenset({agent.id}))
    found = await reader.list(query, limit=10_000)
    return {status: [row.status.value for row in found].count(status) for status in {row.status.value for row in found}}


@pytest.mark.parametrize("poison", POISONED_ADMISSIONS.values(), ids=POISONED_ADMISSIONS.keys())
async def test_a_poisoned_admission_fails_alone(
    postgres_url: str, postgres_agents: PostgresAgents, postgres_engine: AsyncEngine, poison: Poisoned
) -> None:
    """In the midst of settlements and admissions of its own agent, and of others."""
    agents = await stored_agents(postgres_agents, 12, **BUDGET)
    scene = await watched(postgres_engine)
    running = {agent.id: await scene.running(agent, 3) for agent in agents}
    [known] = await scene.running(agents[0])
    poisoned = poison(make_request(agents[0]), known)
    async with asyncio.timeout(30):
        results = await settled_down(
            *(scene.ledger.admit(make_request(agent)) for _ in range(4) for agent in agents),
            scene.ledger.admit(poisoned),
            *(scene.ledger.settle(conclude(invocation)) for own in running.values() for invocation in own),
            *(scene.ledger.admit(make_request(agents[0])) for _ in range(4)),
        )
    failed = [result for result in results if isinstance(result, BaseException)]
    assert [result for number, result in enumerate(results) if number == 48] == failed
    assert not isinstance(failed[0], Unavailable)
    assert len(admitted(results)) == 52
    assert await statuses(postgres_engine, agents[0]) == {"running": 9, "succeeded": 3}
    await assert_books_balance(postgres_url)
    await recovers(scene, agents)


@pytest.mark.parametrize("poison", POISONED_SETTLEMENTS.values(), ids=POISONED_SETTLEMENTS.keys())
async def test_a_poisoned_settlement_fails_alone(
    postgres_url: str,
    postgres_agents: PostgresAgents,
    postgres_engine: AsyncEngine,
    poison: Callable[[ExternalAgentInvocation], ExternalAgentInvocation],
) -> None:
    agents = await stored_agents(postgres_agents, 12, **BUDGET)
    scene = await watched(postgres_engine)
    mine, *running = [invocation for agent in agents for invocation in await scene.running(agent, 3)]
    async with asyncio.timeout(30):
        results = await settled_down(
            *(scene.ledger.admit(make_request(agent)) for _ in range(4) for agent in agents),
            *(scene.ledger.settle(conclude(invocation)) for invocation in running),
            scene.ledger.settle(poison(conclude(mine))),
        )
    assert names(results[:-1]) == {"Admission", "ExternalAgentInvocation"}
    assert isinstance(results[-1], Exception)
    assert not isinstance(results[-1], Unavailable)
    assert await statuses(postgres_engine, agents[0]) == {"running": 5, "succeeded": 2}
    await scene.ledger.settle(conclude(mine))
    await assert_books_balance(postgres_url)
    await recovers(scene, agents)


async def test_many_poisoned_items_fail_each_by_itself(
    postgres_url: str, postgres_agents: PostgresAgents, postgres_engine: AsyncEngine
) -> None:
    agents = await stored_agents(postgres_agents, 5, **BUDGET)
    scene = await watched(postgres_engine)
    requests = [
        make_request(agent, request=JsonText("{" if number % 7 == 0 else "{}"))
        for number in range(70)
        for agent in agents
    ]
    async with asyncio.timeout(60):
        results = await settled_down(*(scene.ledger.admit(request) for request in requests))
    for request, result in zip(requests, results, strict=True):
        assert isinstance(result, psycopg.errors.InvalidTextRepresentation) == (request.request.text == "{")
    assert len(admitted(results)) == 300
    assert scene.ledger._instance.in_flight() == 300
    await assert_books_balance(postgres_url)


async def recovers(scene: Watched, agents: list[ExternalAgent]) -> None:
    """They are served as if nothing had been: all at once, but for the one that was at fault."""
    before = len(scene.sizes)
    await asyncio.gather(*(scene.ledger.admit(make_request(agent)) for _ in range(5) for agent in agents))
    assert max(scene.sizes[before:]) == (5 * (len(agents) - 1), 0)


@pytest.mark.parametrize("lock", [None, LOCK_ACCOUNT], ids=["windows", "account"])
async def test_agents_that_are_held_up_fail_alone(
    postgres_url: str, postgres_agents: PostgresAgents, postgres_engine: AsyncEngine, lock: str | None
) -> None:
    """More of them than connections that serve them, in the same batches as others, again and again."""
    stuck = await stored_agents(postgres_agents, 6, **BUDGET)
    others = await stored_agents(postgres_agents, 20, **BUDGET)
    scene = await watched(postgres_engine)
    for agent in stuck:
        await scene.running(agent)
    with held_up(postgres_url, *stuck, **({"statement": lock} if lock else {})):
        waiting = asyncio.gather(
            *(scene.ledger.admit(make_request(agent)) for _ in range(3) for agent in stuck), return_exceptions=True
        )
        async with asyncio.timeout(WHILE_HELD_S):
            for _ in range(3):
                await asyncio.gather(*(scene.ledger.admit(make_request(agent)) for agent in others + others))
        assert not waiting.done()
        async with asyncio.timeout(30):
            failed = await waiting
    assert names(failed) == {"Unavailable"}
    for agent in stuck:
        assert await statuses(postgres_engine, agent) == {"running": 1}
    assert scene.ledger._instance.in_flight() == len(stuck) + 120
    async with asyncio.timeout(30):
        results = await settled_down(*(scene.ledger.admit(make_request(agent)) for agent in stuck for _ in range(3)))
    assert len(admitted(results)) == 18
    await assert_books_balance(postgres_url)


@pytest.mark.parametrize("lock", [LOCK_ACCOUNT, LOCK_INVOCATIONS], ids=["account", "invocation"])
async def test_settlements_that_are_held_up_wait_alone(
    postgres_url: str, postgres_agents: PostgresAgents, postgres_engine: AsyncEngine, lock: str
) -> None:
    stuck, *others = await stored_agents(postgres_agents, 10, **BUDGET)
    scene = await watched(postgres_engine)
    held = await scene.running(stuck, 3)
    running = [invocation for agent in others for invocation in await scene.running(agent, 3)]
    with held_up(postgres_url, stuck, statement=lock):
        waiting = asyncio.gather(
            *(scene.ledger.settle(conclude(invocation)) for invocation in held), return_exceptions=True
        )
        async with asyncio.timeout(WHILE_HELD_S):
            await asyncio.gather(*(scene.ledger.settle(conclude(invocation)) for invocation in running))
        async with asyncio.timeout(30):
            assert names(await waiting) == {"Unavailable"}
        assert scene.ledger._instance.in_flight() == 3
    settled = await asyncio.gather(*(scene.ledger.settle(conclude(invocation)) for invocation in held))
    assert {invocation.status for invocation in settled} == {InvocationStatus.SUCCEEDED}
    assert scene.ledger._instance.in_flight() == 0
    await assert_books_balance(postgres_url)


async def test_who_is_held_up_for_a_moment_goes_on(
    postgres_url: str, postgres_agents: PostgresAgents, postgres_engine: AsyncEngine
) -> None:
    """It has waited in vain with the others, and by itself."""
    stuck, other = await stored_agents(postgres_agents, 2)
    scene = await watched(postgres_engine)
    with held_up(postgres_url, stuck):
        waiting = asyncio.gather(*(scene.ledger.admit(make_request(stuck)) for _ in range(200)))
        for _ in range(2):
            await scene.ledger.admit(make_request(other))
            await wait_for_lock(postgres_url)
    assert len(admitted(await waiting)) == 200


async def test_a_flood_on_an_agent_that_is_held_up_does_not_hold_up_others(
    postgres_url: str, postgres_agents: PostgresAgents, postgres_engine: AsyncEngine
) -> None:
    """What still waits of it among the others goes apart as well."""
    stuck, other = await stored_agents(postgres_agents, 2)
    scene = await watched(postgres_engine)
    with held_up(postgres_url, stuck):
        flood = asyncio.gather(*(scene.ledger.admit(make_request(stuck)) for _ in range(1500)), return_exceptions=True)
        async with asyncio.timeout(WHILE_HELD_S):
            for _ in range(20):
                await scene.ledger.admit(make_request(other))
    results = await flood
    assert len(admitted(results)) == 1500


async def test_a_deadlock_with_another_session_reaches_nobody(
    postgres_url: str, postgres_agents: PostgresAgents, open_engine: Callable[[str], AsyncEngine]
) -> None:
    """The batch holds the first, waits for the second, and then for the third, whose holder waits for the first."""
    agents = sorted(await stored_agents(postgres_agents, 3, org_id=new_org()), key=lambda agent: agent.id)
    first, second, third = agents
    with psycopg.connect(dsn(postgres_url), autocommit=True) as connection:
        name = sql.Identifier(connection.info.dbname)
        connection.execute(sql.SQL("ALTER DATABASE {} SET deadlock_timeout = '10ms'").format(name))
    engine = open_engine(postgres_url)
    scene = await watched(engine)
    with held_up(postgres_url, third) as session:
        session.execute("SET deadlock_timeout = '1min'")
        with held_up(postgres_url, second):
            work = asyncio.gather(*(scene.ledger.admit(make_request(agent)) for agent in agents for _ in range(5)))
            await wait_for_lock(postgres_url)
            crossing = asyncio.create_task(asyncio.to_thread(session.execute, LOCK_AGENT, [first.org_id, first.id]))
            await wait_for_lock(postgres_url, 2)
        await crossing
    assert len(admitted(await work)) == 15
    await engine.dispose()  # Backends that end make their statistics known.
    deadlocks = "SELECT FROM pg_stat_database WHERE datname = current_database() AND deadlocks = 1"
    await until(lambda: one_row(postgres_url, deadlocks))


def one_row(url: str, statement: str) -> bool:
    with psycopg.connect(dsn(url)) as connection:
        return connection.execute(statement).rowcount == 1


async def test_a_flood_is_refused_where_its_room_ends(
    postgres_url: str, postgres_agents: PostgresAgents, postgres_engine: AsyncEngine
) -> None:
    flooded, sibling = await stored_agents(postgres_agents, 2, org_id=new_org(), **BUDGET)
    [elsewhere] = await stored_agents(postgres_agents, 1)
    scene = await watched(postgres_engine)
    with held_up(postgres_url, flooded):
        flood = [asyncio.create_task(scene.ledger.admit(make_request(flooded))) for _ in range(4000)]
        done, waiting = await asyncio.wait(flood, return_when=asyncio.FIRST_COMPLETED)
        refusals = [task.exception() for task in done]
        assert {type(refusal) for refusal in refusals} == {Unavailable}
        assert {refusal.retry_after_s for refusal in refusals if isinstance(refusal, Unavailable)} == {1}
        assert 3000 <= len(waiting) < 4000
        assert scene.ledger._instance.in_flight() == len(waiting)
        async with asyncio.timeout(WHILE_HELD_S):
            results = await asyncio.gather(
                *(scene.ledger.admit(make_request(agent)) for agent in (sibling, elsewhere) for _ in range(100))
            )
        assert len(results) == 200
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)
    await scene.ledger.admit(make_request(flooded))
    # A batch may have been under way; nobody waits for it any more.
    await scene.ledger.recover()
    assert (await statuses(postgres_engine, flooded))["running"] == 1


async def test_what_waits_is_bounded_in_bytes(
    postgres_url: str, postgres_agents: PostgresAgents, postgres_engine: AsyncEngine
) -> None:
    """As they lie in memory: a character may take four."""
    flooded, elsewhere = await stored_agents(postgres_agents, 2)
    scene = await watched(postgres_engine)
    heavy = JsonText('"' + "\U0001f600" * 500_000 + '"')
    with held_up(postgres_url, flooded):
        flood = [asyncio.create_task(scene.ledger.admit(make_request(flooded, request=heavy))) for _ in range(40)]
        done, waiting = await asyncio.wait(flood, return_when=asyncio.FIRST_COMPLETED)
        assert {type(task.exception()) for task in done} == {Unavailable}
        assert 15 <= len(waiting) <= 25
        async with asyncio.timeout(WHILE_HELD_S):
            await scene.ledger.admit(make_request(elsewhere, request=heavy))
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)


async def test_a_flood_of_one_idempotency_key_holds_up_nobody(
    postgres_url: str, postgres_agents: PostgresAgents, postgres_engine: AsyncEngine
) -> None:
    one, other = await stored_agents(postgres_agents, 2)
    scene = await watched(postgres_engine)
    flood = asyncio.gather(
        *(scene.ledger.admit(make_request(one, idempotency_key="again")) for _ in range(500)), return_exceptions=True
    )
    async with asyncio.timeout(WHILE_HELD_S):
        await asyncio.gather(*(scene.ledger.admit(make_request(agent)) for agent in (one, other) for _ in range(100)))
    results = await flood
    assert len(admitted(results)) == 1
    assert names(results) == {"Admission", "IdempotencyKeyInFlight"}


async def test_nothing_is_left_when_all_is_quiet(
    postgres_url: str, postgres_agents: PostgresAgents, postgres_engine: AsyncEngine
) -> None:
    agents = await stored_agents(postgres_agents, 4)
    scene = await watched(postgres_engine)
    with held_up(postgres_url, agents[0]):
        work = [asyncio.create_task(scene.ledger.admit(make_request(agent))) for agent in agents for _ in range(20)]
        await wait_for_lock(postgres_url)
        await asyncio.gather(*work[20:])
    await asyncio.gather(*work)
    [committer] = scene.ledger._committers
    await until(lambda: not committer._tasks)
    assert not committer._shared
    assert not committer._apart


async def test_nothing_is_left_by_who_retires(postgres_agents: PostgresAgents, postgres_engine: AsyncEngine) -> None:
    """A process that ends at once would break off the giving back of a connection, and say so."""
    [agent] = await stored_agents(postgres_agents, 1)
    scene = await watched(postgres_engine)
    await scene.ledger.settle(conclude(*await scene.running(agent)))
    [committer] = scene.ledger._committers
    assert committer._tasks, "else this shows nothing"
    await scene.ledger.retire()
    assert not committer._tasks
    assert postgres_engine.sync_engine.pool.checkedout() == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("while_given_back", [False, True], ids=["held", "given back"])
async def test_an_engine_that_is_disposed_of_leaves_no_connection_open(
    postgres_url: str, postgres_agents: PostgresAgents, open_engine: OpenEngine, while_given_back: bool
) -> None:
    [agent] = await stored_agents(postgres_agents, 1)
    engine = open_engine(postgres_url)
    opened: list[psycopg.AsyncConnection[Any]] = []
    event.listen(engine.sync_engine, "connect", lambda connection, _: opened.append(connection.driver_connection))
    scene = await watched(engine)
    await scene.ledger.admit(make_request(agent))
    disposals: list[asyncio.Task[None]] = []
    if while_given_back:
        event.listen(
            engine.sync_engine, "reset", lambda *_: disposals.append(asyncio.create_task(engine.dispose())), once=True
        )
    else:
        await engine.dispose()
    [committer] = scene.ledger._committers
    await until(lambda: not committer._tasks)
    await asyncio.gather(*disposals)
    assert len(disposals) == while_given_back
    assert [connection.closed for connection in opened] == [True] * len(opened)
    assert opened


async def test_whoever_is_cancelled_leaves_nothing_running(
    postgres_url: str, postgres_agents: PostgresAgents, postgres_engine: AsyncEngine
) -> None:
    """In the queue, in the call that is under way, and while the answer is on its way to it."""
    agent = make_agent(**BUDGET)
    await postgres_agents.create(agent)
    scene = await watched(postgres_engine)
    kept = await scene.running(agent, 2)
    with held_up(postgres_url, agent):
        in_flight = [asyncio.create_task(scene.ledger.admit(make_request(agent))) for _ in range(20)]
        await wait_for_lock(postgres_url)
        queued = [asyncio.create_task(scene.ledger.admit(make_request(agent))) for _ in range(20)]
        settling = [asyncio.create_task(scene.ledger.settle(conclude(one, costing("0.5")))) for one in kept]
        await asyncio.sleep(0)
        for task in (*in_flight[:15], *queued[:15], settling[0]):
            task.cancel()
    results = await settled_down(*in_flight, *queued)
    assert names(results) == {"CancelledError", "Admission"}
    assert len(admitted(results)) == 10
    hasty = [asyncio.create_task(scene.ledger.admit(make_request(agent))) for _ in range(200)]
    await until(lambda: any(task.done() for task in hasty))
    for task in hasty:
        task.cancel()
    # One at a time, at every point of its way.
    for steps in range(1, 40):
        task = asyncio.create_task(scene.ledger.admit(make_request(agent)))
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        hasty.append(task)
    results += await settled_down(*hasty)
    await settled_down(*settling)
    await scene.ledger.settle(conclude(kept[0]))
    running = [admission.invocation for admission in admitted(results)]
    await asyncio.gather(*(scene.ledger.settle(conclude(invocation)) for invocation in running))
    [committer] = scene.ledger._committers
    await until(lambda: not committer._tasks)
    await scene.ledger.recover()
    assert set(await statuses(postgres_engine, agent)) <= {"succeeded", "unknown"}
    doubtful = scene.ledger._recovery._doubtful
    assert scene.ledger._instance._in_flight == set(doubtful)
    for invocation_id, (org_id, _) in list(doubtful.items()):
        doubtful[invocation_id] = org_id, 0.0
    assert await scene.ledger.recover() == 0
    assert not scene.ledger._instance._in_flight
    await assert_books_balance(postgres_url)


async def test_no_doubt_where_there_is_none(
    postgres_url: str, postgres_agents: PostgresAgents, postgres_engine: AsyncEngine
) -> None:
    """What the server has refused was not recorded, and nobody has to look for it."""
    [agent] = await stored_agents(postgres_agents, 1)
    scene = await watched(postgres_engine)
    with held_up(postgres_url, agent):
        async with asyncio.timeout(30):
            with pytest.raises(Unavailable) as refusal:
                await scene.ledger.admit(make_request(agent))
    assert not isinstance(refusal.value, AdmissionInDoubt)
    assert not scene.ledger._recovery._doubtful
    assert not scene.ledger._instance._in_flight
