"""Group commit while the database is away, back again, or stands still: nobody waits for ever, the books balance."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from between import Proxy
from books import assert_books_balance
from external_agents.adapters.postgres.agents import PostgresAgents
from external_agents.adapters.postgres.invocations import PostgresInvocations
from external_agents.adapters.postgres.ledger import PostgresLedger
from external_agents.adapters.postgres.schema import migrate
from external_agents.domain.agent import ExternalAgent
from external_agents.domain.errors import AdmissionInDoubt, Unavailable
from external_agents.domain.invocation import ExternalAgentInvocation, InvocationStatus
from external_agents.testing.builders import conclude, costing, make_agent, make_request
from grouped import Watched, admitted, names, settled_down, stored_agents, until, watched
from postgres_server import OpenEngine, PostgresServer, dsn, running_postgres

BUDGET = {"budget_config": {"max_cost_per_invocation": 1}}
ANSWERED_S = 20.0
"""Whoever asks while nothing answers has got an answer by then."""

RETIRED_S = 12.0
"""Shorter than a statement is waited for when its server says nothing."""


@pytest.fixture(scope="module")
def mortal_server() -> Iterator[PostgresServer]:
    """One to kill. What it has acknowledged is written, as far as the kernel goes."""
    with running_postgres(synchronous_commit="on") as server:
        yield server


@pytest.fixture
def mortal_url(mortal_server: PostgresServer) -> Iterator[str]:
    with mortal_server.database() as name:
        migrate(mortal_server.url(name))
        yield mortal_server.url(name)


async def agents_on(engine: AsyncEngine, count: int) -> list[ExternalAgent]:
    return await stored_agents(PostgresAgents(engine, key_id_of=lambda envelope: "k1"), count, **BUDGET)


async def status_of(engine: AsyncEngine, invocation: ExternalAgentInvocation) -> InvocationStatus:
    reader = PostgresInvocations(engine)
    return (await reader.read(invocation.org_id, invocation.external_agent_id, invocation.id)).status


async def settle_patiently(ledger: PostgresLedger, finished: ExternalAgentInvocation) -> ExternalAgentInvocation:
    """As the pipeline does: until it is stored."""
    async with asyncio.timeout(60):
        while True:
            try:
                return await ledger.settle(finished)
            except Unavailable:
                await asyncio.sleep(0.05)


async def all_is_well(url: str, scene: Watched, engine: AsyncEngine, agents: list[ExternalAgent]) -> None:
    """Nothing runs that nobody has, the books balance, and work goes on."""
    await scene.ledger.recover()
    for agent in agents:
        [invocation] = await scene.running(agent)
        assert (await scene.ledger.settle(conclude(invocation))).status is InvocationStatus.SUCCEEDED
    with psycopg.connect(dsn(url)) as connection:
        running = connection.execute("SELECT FROM external_agent_invocations WHERE status = 'running'").rowcount
    assert running == 0
    assert scene.ledger._instance._in_flight == set(scene.ledger._recovery._doubtful)
    await assert_books_balance(url)


@pytest.mark.parametrize("recorded", [True, False], ids=["after the commit", "before it arrived"])
async def test_a_connection_lost_in_the_middle_of_a_batch(
    postgres_url: str, postgres_engine: AsyncEngine, open_engine: OpenEngine, tmp_path: Path, recorded: bool
) -> None:
    agents = await agents_on(postgres_engine, 3)
    async with Proxy.to(postgres_url, tmp_path) as proxy:
        scene = await watched(open_engine(proxy.url))
        running = [invocation for agent in agents for invocation in await scene.running(agent, 3)]
        requests = [make_request(agent) for agent in agents for _ in range(5)]
        lost = requests[7].invocation_id.bytes
        proxy.losing, proxy.dropping = (lost, None) if recorded else (None, lost)
        later = [make_request(agent) for agent in agents for _ in range(50)]
        results = await settled_down(
            *(scene.ledger.settle(conclude(invocation, costing("0.25"))) for invocation in running),
            *(scene.ledger.admit(request) for request in requests),
            *(scene.ledger.admit(request) for request in later),
        )
        assert {type(result) for result in results[:9]} == {Unavailable}
        assert names(results[9:24]) == {"AdmissionInDoubt"}
        in_doubt = sum(isinstance(result, AdmissionInDoubt) for result in results)
        assert len(admitted(results)) + in_doubt == 165
        assert len(admitted(results)) == 165 - 128
        proxy.losing = proxy.dropping = None
        assert await scene.ledger.recover() == (128 if recorded else 0)
        # What was done while nobody could be told has not become unknown.
        settled = await asyncio.gather(
            *(settle_patiently(scene.ledger, conclude(invocation, costing("0.25"))) for invocation in running),
            *(scene.ledger.settle(conclude(admission.invocation)) for admission in admitted(results)),
        )
        assert {invocation.status for invocation in settled} == {InvocationStatus.SUCCEEDED}
        await all_is_well(postgres_url, scene, postgres_engine, agents)


async def test_a_call_that_arrives_when_everybody_has_given_up(
    postgres_url: str, postgres_engine: AsyncEngine, open_engine: OpenEngine, tmp_path: Path
) -> None:
    """And recovery, too: what it then records would run for ever."""
    [agent] = await agents_on(postgres_engine, 1)
    async with Proxy.to(postgres_url, tmp_path) as proxy:
        scene = await watched(open_engine(proxy.url))
        [running] = await scene.running(agent)
        requests = [make_request(agent) for _ in range(3)]
        proxy.stalling = requests[0].invocation_id.bytes
        async with asyncio.timeout(ANSWERED_S):
            results = await settled_down(
                *(scene.ledger.admit(request) for request in requests), scene.ledger.settle(conclude(running))
            )
        assert {type(result) for result in results[:3]} == {AdmissionInDoubt}
        assert type(results[3]) is Unavailable
        assert proxy.stalled.is_set()
        proxy.stalling = None
        doubtful = scene.ledger._recovery._doubtful
        assert set(doubtful) == {request.invocation_id for request in requests}
        for invocation_id, (org_id, _) in list(doubtful.items()):
            doubtful[invocation_id] = org_id, 0.0
        assert await scene.ledger.recover() == 0
        assert not doubtful
        proxy.released.set()
        stored = await settle_patiently(scene.ledger, conclude(running))
        assert stored.status is InvocationStatus.SUCCEEDED
        assert await scene.ledger.recover() == 3
        await all_is_well(postgres_url, scene, postgres_engine, [agent])


async def test_a_restart_while_nothing_was_under_way_is_nobodys_business(
    mortal_server: PostgresServer, mortal_url: str, open_engine: OpenEngine
) -> None:
    engine = open_engine(mortal_url)
    agents = await agents_on(engine, 3)
    scene = await watched(engine)
    await asyncio.gather(*(scene.ledger.forecast(agents[0].org_id, agents[0].id) for _ in range(10)))
    running = await scene.running(agents[0], 5)
    mortal_server.crash()
    mortal_server.restart()
    results = await settled_down(
        *(scene.ledger.settle(conclude(invocation)) for invocation in running),
        *(scene.ledger.admit(make_request(agent)) for agent in agents for _ in range(3)),
    )
    assert names(results) == {"ExternalAgentInvocation", "Admission"}
    await asyncio.gather(*(scene.ledger.settle(conclude(admission.invocation)) for admission in admitted(results)))
    await all_is_well(mortal_url, scene, engine, agents)


async def test_what_finishes_while_the_server_is_gone_is_settled_when_it_is_back(
    mortal_server: PostgresServer, mortal_url: str, open_engine: OpenEngine
) -> None:
    """Killed in the midst of work. Everything acknowledged is there; nothing that finished turns unknown."""
    engine = open_engine(mortal_url)
    agents = await agents_on(engine, 5)
    scene = await watched(engine)
    judge = PostgresLedger(engine, uuid4())
    await judge.heartbeat()
    acknowledged: list[ExternalAgentInvocation] = []
    stopped = asyncio.Event()

    async def caller(number: int) -> set[str]:
        seen = set()
        while not stopped.is_set():
            try:
                admission = await scene.ledger.admit(make_request(agents[number % 5]))
            except Unavailable as outage:
                seen.add(type(outage).__name__)
                await asyncio.sleep(0.01)
                continue
            acknowledged.append(admission.invocation)
            stored = await settle_patiently(scene.ledger, conclude(admission.invocation, costing("0.5")))
            seen.add(stored.status)
        return seen

    callers = [asyncio.create_task(caller(number)) for number in range(40)]
    for round_ in range(3):
        await until(lambda needed=200 * (round_ + 1): len(acknowledged) > needed)
        # Not on this thread: the callers go on meanwhile.
        await asyncio.to_thread(mortal_server.crash)
        await asyncio.sleep(0.2)
        await asyncio.to_thread(mortal_server.restart)
        await until(lambda reached=[*acknowledged]: len(acknowledged) > len(reached))
        await judge.heartbeat()
        await judge.recover()
    stopped.set()
    async with asyncio.timeout(ANSWERED_S):
        seen = set().union(*await asyncio.gather(*callers))
    assert "succeeded" in seen
    assert seen <= {"succeeded", "Unavailable", "AdmissionInDoubt"}
    assert {await status_of(engine, invocation) for invocation in acknowledged} == {InvocationStatus.SUCCEEDED}
    await all_is_well(mortal_url, scene, engine, agents)


async def test_a_server_that_stands_still_keeps_nobody_waiting(
    mortal_server: PostgresServer, mortal_url: str, open_engine: OpenEngine
) -> None:
    """In the call that is under way, in the queue, and newly come; and when it goes on, so does the work."""
    engine = open_engine(mortal_url)
    agents = await agents_on(engine, 4)
    scene = await watched(engine)
    running = [invocation for agent in agents for invocation in await scene.running(agent, 3)]
    with mortal_server.standing_still():
        work = [asyncio.create_task(scene.ledger.admit(make_request(agent))) for agent in agents for _ in range(100)]
        work += [asyncio.create_task(scene.ledger.settle(conclude(invocation))) for invocation in running]
        newcomers: list[asyncio.Task[object]] = []
        async with asyncio.timeout(ANSWERED_S):
            while not all(task.done() for task in work):
                newcomers.append(asyncio.create_task(scene.ledger.admit(make_request(agents[0]))))
                await asyncio.sleep(0.1)
            results = await settled_down(*work, *newcomers)
        assert names(results) == {"AdmissionInDoubt", "Unavailable"}
    stored = await asyncio.gather(*(settle_patiently(scene.ledger, conclude(invocation)) for invocation in running))
    assert {invocation.status for invocation in stored} == {InvocationStatus.SUCCEEDED}
    [committer] = scene.ledger._committers
    await until(lambda: not committer._tasks)
    await all_is_well(mortal_url, scene, engine, agents)


async def test_who_retires_from_a_server_that_stands_still_leaves_nothing_either(
    mortal_server: PostgresServer, mortal_url: str, open_engine: OpenEngine
) -> None:
    engine = open_engine(mortal_url)
    [agent] = await agents_on(engine, 1)
    scene = await watched(engine)
    with mortal_server.standing_still():
        work = asyncio.create_task(scene.ledger.admit(make_request(agent)))
        [committer] = scene.ledger._committers
        await until(lambda: bool(committer._tasks))
        async with asyncio.timeout(RETIRED_S):
            with pytest.raises(Unavailable):
                await scene.ledger.retire()
        assert not committer._tasks
        assert names(await settled_down(work)) == {"AdmissionInDoubt"}


async def test_a_pool_that_is_exhausted_is_told(
    postgres_url: str, postgres_engine: AsyncEngine, open_engine: OpenEngine
) -> None:
    agents = await agents_on(postgres_engine, 2)
    engine = open_engine(postgres_url, pool_size=2, pool_wait_s=0.3)
    scene = await watched(engine)
    async with engine.connect(), engine.connect():
        results = await settled_down(*(scene.ledger.admit(make_request(agent)) for agent in agents for _ in range(10)))
        assert {type(result) for result in results} == {Unavailable}
        assert {result.retry_after_s for result in results if isinstance(result, Unavailable)} == {1}
    assert not scene.ledger._instance._in_flight
    await all_is_well(postgres_url, scene, engine, agents)


async def test_the_heartbeat_and_recovery_go_on_beside_a_flood(
    postgres_engine: AsyncEngine, postgres_agents: PostgresAgents
) -> None:
    """Group commit leaves the pool's other connections alone."""
    agent = make_agent(**BUDGET)
    await postgres_agents.create(agent)
    scene = await watched(postgres_engine)
    flood = asyncio.gather(*(scene.ledger.admit(make_request(agent)) for _ in range(3000)))
    beats = 0
    while not flood.done():
        await scene.ledger.heartbeat()
        await scene.ledger.recover()
        beats += 1
    assert len(await flood) == 3000
    assert beats >= 2
