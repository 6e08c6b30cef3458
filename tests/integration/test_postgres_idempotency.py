"""Idempotency keys on a real PostgreSQL: races between processes' connections, expired ones cleared away."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import psycopg
import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from external_agents.adapters.postgres.agents import PostgresAgents
from external_agents.adapters.postgres.engine import LOCK_TIMEOUT_S
from external_agents.adapters.postgres.idempotency import CLEARING_LOCK, clear_expired
from external_agents.adapters.postgres.ledger import PostgresLedger
from external_agents.bootstrap import open_installation
from external_agents.domain.agent import ExternalAgent
from external_agents.domain.errors import Unavailable
from external_agents.domain.idempotency import KEPT_FOR
from external_agents.settings import Settings
from external_agents.testing.builders import conclude, id_at, make_agent, make_request
from postgres_server import OpenEngine, ShiftedClock, dsn, wait_for_lock

DEADLINE_S = 30.0

FILL = """
    INSERT INTO external_agent_idempotency_keys
    SELECT org_id, id, n::text, '', gen_random_uuid(), now() - %s * interval '1 s' - (n / 3) * interval '1 ms'
    FROM external_agents, generate_series(1, %s) AS n
"""
COUNT = "SELECT count(*) FROM external_agent_idempotency_keys"


@pytest.fixture
async def agent(postgres_agents: PostgresAgents) -> ExternalAgent:
    agent = make_agent()
    await postgres_agents.create(agent)
    return agent


def fill(url: str, *, age: timedelta, keys: int) -> None:
    with psycopg.connect(dsn(url)) as connection:
        connection.execute(FILL, [age.total_seconds(), keys])


def count(url: str) -> int:
    with psycopg.connect(dsn(url)) as connection:
        row = connection.execute(COUNT).fetchone()
    return row[0] if row else 0


class TestClearing:
    @pytest.mark.parametrize("keys", [0, 1, 9, 10, 11, 100])
    async def test_what_has_expired_goes_in_batches_and_nothing_else(
        self, postgres_url: str, postgres_engine: AsyncEngine, agent: ExternalAgent, keys: int
    ) -> None:
        fill(postgres_url, age=KEPT_FOR, keys=keys)
        with psycopg.connect(dsn(postgres_url)) as connection:
            connection.execute("UPDATE external_agent_idempotency_keys SET key = 'old ' || key")
        fill(postgres_url, age=KEPT_FOR - timedelta(minutes=1), keys=7)
        assert await clear_expired(postgres_engine, at_once=10) == keys
        assert count(postgres_url) == 7
        assert await clear_expired(postgres_engine) == 0

    async def test_it_goes_by_the_databases_clock(
        self, postgres_url: str, shifted_clock: ShiftedClock, open_engine: OpenEngine, agent: ExternalAgent
    ) -> None:
        engine = open_engine(shifted_clock.url)
        fill(postgres_url, age=timedelta(), keys=3)
        await shifted_clock.pass_time(KEPT_FOR.total_seconds() - 60)
        assert await clear_expired(engine) == 0
        await shifted_clock.pass_time(60)
        assert await clear_expired(engine) == 3

    async def test_one_process_clears_and_the_others_leave_it_to_that_one(
        self, postgres_url: str, postgres_engine: AsyncEngine, agent: ExternalAgent
    ) -> None:
        fill(postgres_url, age=KEPT_FOR, keys=5)
        with psycopg.connect(dsn(postgres_url)) as other:
            other.execute("SELECT pg_advisory_xact_lock(%s)", [CLEARING_LOCK])
            assert await clear_expired(postgres_engine) == 0
        counts = await asyncio.gather(*(clear_expired(postgres_engine, at_once=2) for _ in range(4)))
        assert sum(counts) == 5
        assert count(postgres_url) == 0

    async def test_it_gives_way_to_an_admission(
        self, postgres_url: str, postgres_engine: AsyncEngine, agent: ExternalAgent
    ) -> None:
        fill(postgres_url, age=KEPT_FOR, keys=3)
        with psycopg.connect(dsn(postgres_url)) as admission:
            admission.execute("SELECT FROM external_agent_idempotency_keys WHERE key = '2' FOR UPDATE")
            async with asyncio.timeout(LOCK_TIMEOUT_S - 1):  # Sooner than whoever else waits for a lock.
                with pytest.raises(Unavailable):
                    await clear_expired(postgres_engine)
        assert count(postgres_url) == 3
        assert await clear_expired(postgres_engine) == 3

    async def test_a_key_that_comes_again_meanwhile_stays(
        self, postgres_url: str, postgres_engine: AsyncEngine, agent: ExternalAgent
    ) -> None:
        """The clearing waits for an admission that overwrites an expired key, and sees that it has."""
        fill(postgres_url, age=KEPT_FOR, keys=1)
        with psycopg.connect(dsn(postgres_url)) as admission:
            admission.execute("UPDATE external_agent_idempotency_keys SET created_at = now()")
            clearing = asyncio.create_task(clear_expired(postgres_engine))
            await wait_for_lock(postgres_url)
        assert await clearing == 0
        assert count(postgres_url) == 1

    async def test_a_running_service_clears_by_itself(self, postgres_url: str, agent: ExternalAgent) -> None:
        fill(postgres_url, age=KEPT_FOR, keys=5)
        settings = Settings.from_env({"EXTERNAL_AGENTS_SECRET_KEYS": "k1:" + "QUFB" * 10 + "QUE="})
        async with asyncio.timeout(DEADLINE_S), open_installation(settings, postgres_url):
            while await asyncio.to_thread(count, postgres_url):
                pass


async def test_an_expired_key_is_overwritten_in_place(
    postgres_url: str, shifted_clock: ShiftedClock, open_engine: OpenEngine, agent: ExternalAgent
) -> None:
    ledger = PostgresLedger(open_engine(shifted_clock.url), uuid4())
    for _ in range(3):
        admission = await ledger.admit(make_request(agent, idempotency_key="key"))
        assert not admission.replayed
        await ledger.settle(conclude(admission.invocation))
        assert count(postgres_url) == 1
        await shifted_clock.pass_time(KEPT_FOR.total_seconds())


async def test_a_key_whose_invocation_is_gone_is_free(
    postgres_url: str, postgres_ledger: PostgresLedger, agent: ExternalAgent
) -> None:
    await postgres_ledger.admit(make_request(agent, idempotency_key="key"))
    with psycopg.connect(dsn(postgres_url)) as connection:
        connection.execute("DELETE FROM external_agent_invocations")
    assert not (await postgres_ledger.admit(make_request(agent, idempotency_key="key"))).replayed


async def test_a_replay_leaves_nothing_in_flight(
    postgres_url: str, postgres_ledger: PostgresLedger, agent: ExternalAgent
) -> None:
    """Recovery looks from the instance's mark on, which would stand still for ever."""
    for _ in range(2):
        admission = await postgres_ledger.admit(make_request(agent, idempotency_key="key"))
        if not admission.replayed:
            await postgres_ledger.settle(conclude(admission.invocation))
    assert admission.replayed
    later = datetime.now(UTC) + timedelta(seconds=1)
    newest = (await postgres_ledger.admit(make_request(agent, invocation_id=id_at(later)))).invocation
    await postgres_ledger.settle(conclude(newest))
    await postgres_ledger.heartbeat()
    with psycopg.connect(dsn(postgres_url)) as connection:
        assert connection.execute("SELECT running_from FROM instances").fetchall() == [(newest.id,)]
