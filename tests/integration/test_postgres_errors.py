"""What goes wrong between us and PostgreSQL is told in the library's words, and passes."""

from __future__ import annotations

import asyncio
from uuid import uuid4

import psycopg
import pytest
from psycopg import sql
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine

from external_agents.adapters.postgres.agents import PostgresAgents
from external_agents.adapters.postgres.engine import POOL_WAIT_S
from external_agents.adapters.postgres.errors import translate_errors
from external_agents.adapters.postgres.ledger import PostgresLedger
from external_agents.domain.agent import ExternalAgent
from external_agents.domain.errors import AgentNotFound, Unavailable
from external_agents.domain.refusals import RateLimited
from external_agents.testing.builders import make_agent, make_finished_call, make_request, new_id, new_org
from postgres_server import LOCK_AGENT, OpenEngine, PostgresServer, dsn, wait_for_lock


def end_connections(url: str) -> None:
    with psycopg.connect(dsn(url)) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
        )


async def raise_state(engine: AsyncEngine, state: str) -> None:
    with translate_errors():
        async with engine.begin() as connection:
            await connection.execute(text(f"DO $$ BEGIN RAISE EXCEPTION 'secret' USING ERRCODE = '{state}'; END $$"))


@pytest.mark.parametrize(
    "state",
    [
        "08006",
        "25006",
        "28P01",
        "40001",
        "40P01",
        "53100",
        "53200",
        "53300",
        "55P03",
        "57014",
        "57P01",
        "57P03",
        "58030",
    ],
)
async def test_outages_are_unavailability(postgres_engine: AsyncEngine, state: str) -> None:
    with pytest.raises(Unavailable) as outage:
        await raise_state(postgres_engine, state)
    assert str(outage.value) == "The database is not available."
    assert isinstance(outage.value.__cause__, DBAPIError)


@pytest.mark.parametrize("state", ["42P01", "42703", "42883", "3F000"])
async def test_a_schema_that_is_behind_is_told(postgres_engine: AsyncEngine, state: str) -> None:
    with pytest.raises(Unavailable, match="external-agents migrate"):
        await raise_state(postgres_engine, state)


@pytest.mark.parametrize("state", ["22012", "23505", "42601", "XX000", "P0001"])
async def test_faults_of_ours_stay_what_they_are(postgres_engine: AsyncEngine, state: str) -> None:
    with pytest.raises(DBAPIError):
        await raise_state(postgres_engine, state)


async def test_parameters_are_not_in_messages(postgres_engine: AsyncEngine) -> None:
    with pytest.raises(DBAPIError) as error:
        async with postgres_engine.begin() as connection:
            await connection.execute(text("SELECT 1 / 0, :payload"), {"payload": "s3cret"})
    assert "s3cret" not in str(error.value)


async def test_work_goes_on_after_connections_were_killed(
    postgres_url: str, postgres_agents: PostgresAgents, postgres_ledger: PostgresLedger
) -> None:
    agent = make_agent()
    await postgres_agents.create(agent)
    await asyncio.gather(*(postgres_ledger.admit(make_request(agent)) for _ in range(10)))
    end_connections(postgres_url)
    # Nobody is told: that the server has closed an idle connection is found out before anything is sent.
    assert await postgres_agents.read(agent.org_id, agent.id) == agent
    end_connections(postgres_url)
    await asyncio.gather(*(postgres_ledger.admit(make_request(agent)) for _ in range(10)))


async def test_an_admission_killed_half_way_leaves_nothing(
    postgres_url: str, postgres_agents: PostgresAgents, postgres_ledger: PostgresLedger
) -> None:
    agent = make_agent(rate_limit_config={"requests_per_day": 1}, budget_config={"max_cost_per_invocation": 1})
    await postgres_agents.create(agent)
    with psycopg.connect(dsn(postgres_url)) as connection:
        connection.execute(LOCK_AGENT, [agent.org_id, agent.id])
        admission = asyncio.create_task(postgres_ledger.admit(make_request(agent)))
        await wait_for_lock(postgres_url)
        connection.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        )
        with pytest.raises(Unavailable):
            await admission
    forecast = await postgres_ledger.forecast(agent.org_id, agent.id)
    assert (forecast.quotas.quotas[0].used, forecast.account.reserved) == (0, 0)
    await postgres_ledger.admit(make_request(agent))


async def test_a_cancelled_admission_is_ended(
    postgres_url: str, postgres_agents: PostgresAgents, postgres_ledger: PostgresLedger
) -> None:
    agent = make_agent(rate_limit_config={"requests_per_day": 1})
    await postgres_agents.create(agent)
    with psycopg.connect(dsn(postgres_url)) as connection:
        connection.execute(LOCK_AGENT, [agent.org_id, agent.id])
        admission = asyncio.create_task(postgres_ledger.admit(make_request(agent)))
        await wait_for_lock(postgres_url)
        admission.cancel()
        with pytest.raises(asyncio.CancelledError):
            await admission
    with pytest.raises(RateLimited):  # It shared its call with nobody here, but might have: the call went on.
        await postgres_ledger.admit(make_request(agent))
    assert await postgres_ledger.recover() == 1


async def locked_agent(agents: PostgresAgents, connection: psycopg.Connection) -> ExternalAgent:
    agent = make_agent()
    await agents.create(agent)
    connection.execute(LOCK_AGENT, [agent.org_id, agent.id])
    return agent


async def test_waiting_for_a_lock_ends(
    postgres_url: str, postgres_agents: PostgresAgents, open_engine: OpenEngine
) -> None:
    ledger = PostgresLedger(open_engine(f"{postgres_url}&options=-clock_timeout%3D100ms"), uuid4())
    with psycopg.connect(dsn(postgres_url)) as connection:
        agent = await locked_agent(postgres_agents, connection)
        with pytest.raises(Unavailable):
            await ledger.admit(make_request(agent))


async def test_waiting_for_a_connection_ends(
    postgres_url: str, postgres_agents: PostgresAgents, open_engine: OpenEngine
) -> None:
    assert POOL_WAIT_S <= 10
    ledger = PostgresLedger(open_engine(postgres_url, pool_size=1, pool_wait_s=0.1), uuid4())
    await ledger.heartbeat()
    with psycopg.connect(dsn(postgres_url)) as connection:
        agent = await locked_agent(postgres_agents, connection)
        admission = asyncio.create_task(ledger.admit(make_request(agent)))
        await wait_for_lock(postgres_url)
        with pytest.raises(Unavailable):
            await ledger.forecast(agent.org_id, agent.id)
        connection.rollback()
        await admission


async def test_more_connections_than_the_server_gives(postgres_server: PostgresServer, open_engine: OpenEngine) -> None:
    with postgres_server.database() as name:
        role = sql.Identifier(name)
        postgres_server.execute(sql.SQL("CREATE ROLE {} LOGIN CONNECTION LIMIT 0").format(role))
        try:
            url = postgres_server.url(name).replace("external_agents@", f"{name}@")
            with pytest.raises(Unavailable), translate_errors():
                async with open_engine(url).connect():
                    pass
        finally:
            postgres_server.execute(sql.SQL("DROP ROLE {}").format(role))


@pytest.mark.parametrize("url", ["postgresql+psycopg://x@127.0.0.1:1/x", "postgresql+psycopg://x@/x?host=/nowhere"])
async def test_a_server_that_is_not_there(open_engine: OpenEngine, url: str) -> None:
    engine = open_engine(url)
    ledger, agents = PostgresLedger(engine, uuid4()), PostgresAgents(engine, key_id_of=lambda envelope: "")
    agent = make_agent()
    with pytest.raises(Unavailable):
        await agents.read(agent.org_id, agent.id)
    with pytest.raises(Unavailable):
        await ledger.admit(make_request(agent))
    with pytest.raises(Unavailable):
        await ledger.recover()


async def test_a_record_of_an_agent_that_is_not_there(
    postgres_agents: PostgresAgents, postgres_ledger: PostgresLedger
) -> None:
    agent = make_agent()
    await postgres_agents.create(agent)
    for stranger in (make_agent(org_id=agent.org_id, id=new_id()), make_agent(org_id=new_org(), id=agent.id)):
        with pytest.raises(AgentNotFound):
            await postgres_ledger.record(make_finished_call(stranger))
