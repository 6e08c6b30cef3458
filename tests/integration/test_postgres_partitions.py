"""Partitions of the invocations: there ahead of time, and strays find home."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import psycopg
import pytest
from sqlalchemy import Connection, event
from sqlalchemy.ext.asyncio import AsyncEngine

from external_agents.adapters.postgres.agents import PostgresAgents
from external_agents.adapters.postgres.errors import translate_errors
from external_agents.adapters.postgres.invocations import PostgresInvocations
from external_agents.adapters.postgres.ledger import PostgresLedger
from external_agents.adapters.postgres.partitions import MONTHS_AHEAD, add_missing_partitions, keep_partitions
from external_agents.domain.errors import InvocationNotFound, Unavailable
from external_agents.domain.invocation import InvocationStatus
from external_agents.ports.repositories import InvocationQuery
from external_agents.testing.builders import conclude, id_at, make_agent, make_finished_call, make_request, new_id
from postgres_server import dsn

YEAR_END = datetime(2031, 11, 15, tzinfo=UTC)
RUNNING, DEFAULT = "external_agent_invocations_running", "external_agent_invocations_default"
NAMES = [f"external_agent_invocations_{month}" for month in ("2031_11", "2031_12", "2032_01", "2032_02")]


def partitions(url: str) -> set[str]:
    with psycopg.connect(dsn(url)) as connection:
        rows = connection.execute(
            "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 'external_agent_invocations'::regclass"
        )
        return {name for (name,) in rows}


async def add(engine: AsyncEngine, now: datetime) -> list[str]:
    async with engine.connect() as connection:
        return await connection.run_sync(add_missing_partitions, now)


async def test_a_migration_leaves_this_month_and_the_next_ones(postgres_url: str, postgres_engine: AsyncEngine) -> None:
    assert len(partitions(postgres_url)) == 2 + 1 + MONTHS_AHEAD
    assert "external_agent_invocations_default" in partitions(postgres_url)
    assert await keep_partitions(postgres_engine) == []


async def test_months_follow_each_other_over_the_years_end(postgres_url: str, postgres_engine: AsyncEngine) -> None:
    before = partitions(postgres_url)
    assert await add(postgres_engine, YEAR_END) == NAMES
    assert await add(postgres_engine, YEAR_END) == []
    assert partitions(postgres_url) - before == set(NAMES)


async def test_strays_move_from_the_default_partition(
    postgres_url: str, postgres_engine: AsyncEngine, postgres_agents: PostgresAgents, postgres_ledger: PostgresLedger
) -> None:
    agent = make_agent(budget_config={"max_cost_per_invocation": 1})
    await postgres_agents.create(agent)
    month = timedelta(days=31)
    moments = [YEAR_END.replace(day=1) - timedelta(milliseconds=1), YEAR_END, YEAR_END + month, YEAR_END + 12 * month]
    strays = [make_finished_call(agent, id=id_at(moment)) for moment in moments]
    for stray in strays:
        await postgres_ledger.record(stray)
    running = (await postgres_ledger.admit(make_request(agent, invocation_id=id_at(YEAR_END)))).invocation
    await add(postgres_engine, YEAR_END)
    with psycopg.connect(dsn(postgres_url)) as connection:
        found = dict(
            connection.execute("SELECT tableoid::regclass::text, count(*) FROM external_agent_invocations GROUP BY 1")
        )
    assert found == {"external_agent_invocations_default": 2, NAMES[0]: 1, NAMES[1]: 1, RUNNING: 1}
    reader = PostgresInvocations(postgres_engine)
    everything = await reader.list(InvocationQuery(org_id=agent.org_id), limit=10)
    assert {row.id for row in everything} == {*(stray.id for stray in strays), running.id}
    settled = conclude(running)
    assert await postgres_ledger.settle(settled) == settled
    assert await reader.read(agent.org_id, agent.id, running.id) == settled


async def test_several_at_once_make_each_partition_once(postgres_engine: AsyncEngine) -> None:
    made = await asyncio.gather(*(add(postgres_engine, YEAR_END) for _ in range(5)))
    assert sorted(name for names in made for name in names) == NAMES


async def test_upkeep_gives_way_to_live_work(
    postgres_url: str, postgres_engine: AsyncEngine, postgres_agents: PostgresAgents, postgres_ledger: PostgresLedger
) -> None:
    agent = make_agent()
    await postgres_agents.create(agent)
    with psycopg.connect(dsn(postgres_url)) as busy:
        busy.execute("DELETE FROM external_agent_invocations WHERE org_id = 'nobody'")
        with pytest.raises(Unavailable), translate_errors():
            await add(postgres_engine, YEAR_END)
        call = make_finished_call(agent, id=id_at(YEAR_END))
        await postgres_ledger.record(call)
    assert NAMES[0] not in partitions(postgres_url)
    assert await add(postgres_engine, YEAR_END) == NAMES


async def test_a_lookup_by_id_or_time_touches_one_month(postgres_url: str, postgres_engine: AsyncEngine) -> None:
    await add(postgres_engine, YEAR_END)
    plans: list[str] = []

    def explain(connection: Connection, _: object, statement: str, parameters: object, *rest: object) -> None:
        with psycopg.connect(dsn(postgres_url)) as other:
            plans.append(str(other.execute(f"EXPLAIN {statement}", parameters).fetchall()))  # type: ignore[arg-type]

    event.listen(postgres_engine.sync_engine, "before_cursor_execute", explain)
    reader = PostgresInvocations(postgres_engine)
    first = id_at(YEAR_END)
    await reader.exists("o", first)
    with pytest.raises(InvocationNotFound):
        await reader.read("o", new_id(), first)
    await reader.list(InvocationQuery(org_id="o", since=YEAR_END, until=YEAR_END + timedelta(days=1)), limit=10)
    for plan in plans:
        touched = {name for name in partitions(postgres_url) if f" {name} " in plan}
        assert touched - {RUNNING, DEFAULT} == {NAMES[0]}, plan
    await reader.list(InvocationQuery(org_id="o", status=InvocationStatus.RUNNING), limit=10)
    assert {name for name in partitions(postgres_url) if f" {name} " in plans[-1]} - {DEFAULT} == {RUNNING}
    assert len(plans) == 4
