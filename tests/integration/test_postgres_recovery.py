"""Who may be taken for dead, by whom, and when. Each test is about one protection, and fails without it."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from uuid import UUID, uuid4

import psycopg
import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from external_agents.adapters.postgres.agents import PostgresAgents
from external_agents.adapters.postgres.invocations import PostgresInvocations
from external_agents.adapters.postgres.ledger import PostgresLedger
from external_agents.adapters.postgres.settlement import RECOVERED_AT_ONCE
from external_agents.domain.agent import ExternalAgent
from external_agents.domain.errors import Unavailable
from external_agents.domain.invocation import ExternalAgentInvocation, InvocationStatus
from external_agents.ports.ledger import HEARTBEAT_S, LEASE_S
from external_agents.testing.builders import conclude, id_at, make_agent, make_request
from grouped import until
from postgres_server import LOCK_AGENT, OpenEngine, ShiftedClock, dsn, wait_for_lock


class Scene:
    """An agent, processes that invoke it, and the passing of the database's time."""

    def __init__(self, engine: AsyncEngine, clock: ShiftedClock, agent: ExternalAgent) -> None:
        self.engine = engine
        self.clock = clock
        self.agent = agent
        self._reader = PostgresInvocations(engine)

    def new_ledger(self, instance_id: UUID | None = None) -> PostgresLedger:
        return PostgresLedger(self.engine, instance_id or uuid4())

    async def living(self, seconds: float, *ledgers: PostgresLedger) -> None:
        """Time passes, and these send heartbeats all along."""
        for _ in range(round(seconds / HEARTBEAT_S)):
            await self.clock.pass_time(HEARTBEAT_S)
            for ledger in ledgers:
                await ledger.heartbeat()

    async def admitted(self, ledger: PostgresLedger, age_s: float = 0.0) -> ExternalAgentInvocation:
        at = self.clock.now() - timedelta(seconds=age_s)
        return (await ledger.admit(make_request(self.agent, invocation_id=id_at(at)))).invocation

    async def status(self, invocation: ExternalAgentInvocation) -> InvocationStatus:
        return (await self._reader.read(self.agent.org_id, self.agent.id, invocation.id)).status

    async def instances(self) -> set[UUID]:
        async with await psycopg.AsyncConnection.connect(dsn(self.clock.url)) as connection:
            return {id_ async for (id_,) in await connection.execute("SELECT id FROM instances")}


@pytest.fixture
async def scene(postgres_agents: PostgresAgents, open_engine: OpenEngine, shifted_clock: ShiftedClock) -> Scene:
    agent = make_agent(budget_config={"max_cost_per_invocation": 1})
    await postgres_agents.create(agent)
    return Scene(open_engine(shifted_clock.url), shifted_clock, agent)


async def test_a_new_process_judges_after_a_full_lease(scene: Scene) -> None:
    dead = scene.new_ledger()
    left = await scene.admitted(dead)
    await scene.clock.pass_time(LEASE_S + 1)
    judge = scene.new_ledger()
    await judge.heartbeat()
    await scene.living(LEASE_S - HEARTBEAT_S, judge)
    assert await judge.recover() == 0
    await scene.living(2 * HEARTBEAT_S, judge)
    assert await judge.recover() == 1
    assert await scene.status(left) is InvocationStatus.UNKNOWN


async def test_nobody_judges_before_the_server_is_up_for_a_lease(scene: Scene) -> None:
    """While it was down nobody could send heartbeats; whoever comes first must not bury the others."""
    silent, judge = scene.new_ledger(), scene.new_ledger()
    left = await scene.admitted(silent)
    await judge.heartbeat()
    await scene.living(LEASE_S + HEARTBEAT_S, judge)
    await scene.clock.restart_server()
    assert await judge.recover() == 0
    await scene.living(LEASE_S - HEARTBEAT_S, judge)
    assert await judge.recover() == 0
    assert await scene.status(left) is InvocationStatus.RUNNING
    await scene.living(2 * HEARTBEAT_S, judge)
    assert await judge.recover() == 1


async def test_a_judge_who_slept_through_its_own_lease_begins_anew(scene: Scene) -> None:
    """The database may have stood still for everybody, and the judge was merely the first to be heard again."""
    victim, judge = scene.new_ledger(), scene.new_ledger()
    left = await scene.admitted(victim)
    await judge.heartbeat()
    await scene.living(2 * LEASE_S, judge, victim)
    await scene.clock.pass_time(LEASE_S + 1)
    await judge.heartbeat()
    assert await judge.recover() == 0
    await victim.heartbeat()
    await scene.living(2 * LEASE_S, judge, victim)
    await judge.recover()
    assert await scene.status(left) is InvocationStatus.RUNNING


async def test_a_judge_whose_heartbeat_failed_begins_anew(scene: Scene) -> None:
    victim, judge = scene.new_ledger(), scene.new_ledger()
    left = await scene.admitted(victim)
    await judge.heartbeat()
    await scene.living(LEASE_S + HEARTBEAT_S, judge)
    with psycopg.connect(dsn(scene.clock.url)) as connection:
        connection.execute("SELECT FROM instances FOR UPDATE")
        heartbeat = asyncio.create_task(judge.heartbeat())
        await wait_for_lock(scene.clock.url)
        connection.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        )
        with pytest.raises(Unavailable):
            await heartbeat
    await judge.heartbeat()
    assert await judge.recover() == 0
    assert await scene.status(left) is InvocationStatus.RUNNING
    await scene.living(LEASE_S + HEARTBEAT_S, judge)
    assert await judge.recover() == 1


async def test_a_judge_without_a_lease_does_not_judge(scene: Scene) -> None:
    dead, judge = scene.new_ledger(), scene.new_ledger()
    await scene.admitted(dead)
    await judge.heartbeat()
    await scene.living(LEASE_S + HEARTBEAT_S, judge)
    await scene.clock.pass_time(LEASE_S + 1)
    assert await judge.recover() == 0


async def test_an_admission_under_way_keeps_its_instance_alive(scene: Scene) -> None:
    """It has seen its lease; the invocation that it is about to record must not fall between two recoveries."""
    slow, judge = scene.new_ledger(), scene.new_ledger()
    await slow.heartbeat()
    await judge.heartbeat()
    with psycopg.connect(dsn(scene.clock.url)) as connection:
        connection.execute(LOCK_AGENT, [scene.agent.org_id, scene.agent.id])
        admission = asyncio.create_task(slow.admit(make_request(scene.agent)))
        await wait_for_lock(scene.clock.url)
        await scene.living(LEASE_S + HEARTBEAT_S, judge)
        assert await judge.recover() == 0
        assert len(await scene.instances()) == 2
    left = (await admission).invocation
    assert await judge.recover() == 1
    assert await scene.status(left) is InvocationStatus.UNKNOWN
    assert len(await scene.instances()) == 1


async def test_an_instance_whose_lease_ran_out_does_not_admit_without_a_new_one(scene: Scene) -> None:
    """Else recovery would have forgotten the instance, and nobody would ever find what it then records."""
    sleeper, judge = scene.new_ledger(), scene.new_ledger()
    await sleeper.heartbeat()
    await judge.heartbeat()
    await scene.living(LEASE_S + HEARTBEAT_S, judge)
    await judge.recover()
    assert len(await scene.instances()) == 1
    left = await scene.admitted(sleeper)
    assert len(await scene.instances()) == 2
    await scene.living(LEASE_S + HEARTBEAT_S, judge)
    assert await judge.recover() == 1
    assert await scene.status(left) is InvocationStatus.UNKNOWN


async def test_a_heartbeat_between_saves_the_rest(scene: Scene) -> None:
    late, judge = scene.new_ledger(), scene.new_ledger()
    left = await scene.admitted(late)
    await judge.heartbeat()
    await scene.living(LEASE_S + HEARTBEAT_S, judge)
    await late.heartbeat()
    assert await judge.recover() == 0
    assert await scene.status(left) is InvocationStatus.RUNNING


async def test_a_heartbeat_during_a_recovery_saves_what_it_has_not_come_to(scene: Scene) -> None:
    dead, late, judge = scene.new_ledger(UUID(int=1)), scene.new_ledger(UUID(int=2)), scene.new_ledger()
    lost, left = await scene.admitted(dead), await scene.admitted(late)
    await judge.heartbeat()
    await scene.living(LEASE_S + HEARTBEAT_S, judge)
    with psycopg.connect(dsn(scene.clock.url)) as connection:
        connection.execute("SELECT FROM external_agent_budgets FOR UPDATE")
        recovery = asyncio.create_task(judge.recover())
        await wait_for_lock(scene.clock.url)
        await late.heartbeat()
    assert await recovery == 1
    assert await scene.status(lost) is InvocationStatus.UNKNOWN
    assert await scene.status(left) is InvocationStatus.RUNNING


async def test_what_is_being_settled_is_left_to_its_settlement(scene: Scene) -> None:
    late, judge = scene.new_ledger(), scene.new_ledger()
    left = await scene.admitted(late)
    await judge.heartbeat()
    await scene.living(LEASE_S + HEARTBEAT_S, judge)
    with psycopg.connect(dsn(scene.clock.url)) as connection:
        # Both wait for the account, and the settlement was there first.
        connection.execute("SELECT FROM external_agent_budgets FOR UPDATE")
        settlement = asyncio.create_task(late.settle(conclude(left)))
        await wait_for_lock(scene.clock.url)
        recovery = asyncio.create_task(judge.recover())
        await wait_for_lock(scene.clock.url, 2)
    assert (await settlement).status is InvocationStatus.SUCCEEDED
    assert await recovery == 0
    assert len(await scene.instances()) == 1


async def test_older_ids_that_came_late_are_found(scene: Scene) -> None:
    """The mark from which on recovery looks was stored before the older one was admitted."""
    dead, judge = scene.new_ledger(), scene.new_ledger()
    newer = await scene.admitted(dead)
    await dead.settle(conclude(newer))
    await dead.heartbeat()
    older = await scene.admitted(dead, age_s=30)
    await judge.heartbeat()
    await scene.living(LEASE_S + HEARTBEAT_S, judge)
    assert await judge.recover() == 1
    assert await scene.status(older) is InvocationStatus.UNKNOWN


async def test_the_mark_moves_on_with_what_runs(scene: Scene) -> None:
    ledger = scene.new_ledger()
    first, second = await scene.admitted(ledger, age_s=2), await scene.admitted(ledger, age_s=1)

    async def mark() -> UUID:
        await ledger.heartbeat()
        async with await psycopg.AsyncConnection.connect(dsn(scene.clock.url)) as connection:
            row = await (await connection.execute("SELECT running_from FROM instances")).fetchone()
        assert row is not None
        return row[0]

    assert await mark() == first.id
    await ledger.settle(conclude(first))
    assert await mark() == second.id
    await ledger.settle(conclude(second))
    assert await mark() == second.id


async def test_more_than_one_batch(scene: Scene) -> None:
    dead, judge = scene.new_ledger(), scene.new_ledger()
    left = RECOVERED_AT_ONCE + 5
    await asyncio.gather(*(scene.admitted(dead) for _ in range(left)))
    await judge.heartbeat()
    await scene.living(LEASE_S + HEARTBEAT_S, judge)
    assert await judge.recover() == left
    account = (await judge.forecast(scene.agent.org_id, scene.agent.id)).account
    assert (account.spent, account.reserved) == (left, 0)
    assert len(await scene.instances()) == 1


async def test_who_retires_leaves_nothing_to_wait_for(scene: Scene) -> None:
    tidy, hasty, judge = scene.new_ledger(), scene.new_ledger(), scene.new_ledger()
    await tidy.settle(conclude(await scene.admitted(tidy)))
    left = await scene.admitted(hasty)
    await judge.heartbeat()
    await scene.living(LEASE_S + HEARTBEAT_S, judge, tidy, hasty)
    await tidy.retire()
    await hasty.retire()
    assert len(await scene.instances()) == 2
    assert await judge.recover() == 1
    assert await scene.status(left) is InvocationStatus.UNKNOWN
    assert len(await scene.instances()) == 1


async def test_a_lease_runs_out_by_the_processs_own_clock(postgres_engine: AsyncEngine) -> None:
    ledger = PostgresLedger(postgres_engine, uuid4(), lease_s=1.0)
    assert not ledger.holds_lease(), "it has never been heard of"
    await ledger.heartbeat()
    await until(lambda: not ledger.holds_lease())
    await ledger.heartbeat()
    assert ledger.holds_lease()
