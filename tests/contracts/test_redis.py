"""The rate limiter in Redis, alone and within a ledger, keeps what the ports promise."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from uuid import uuid4

import pytest

from external_agents.adapters.postgres.agents import PostgresAgents
from external_agents.adapters.postgres.engine import create_engine
from external_agents.adapters.postgres.invocations import PostgresInvocations
from external_agents.adapters.postgres.ledger import PostgresLedger
from external_agents.application.limited_ledger import LimitedLedger
from external_agents.ports.ledger import InvocationLedger
from external_agents.testing.idempotency import IdempotencyContract
from external_agents.testing.ledger import LedgerContract
from external_agents.testing.ledger_time import LedgerTimeContract
from external_agents.testing.rate_limits import NewLimiter, RateLimiterContract
from external_agents.testing.stores import PassTime, Store
from postgres_server import PostgresServer, ShiftedClock
from redis_server import RedisServer, ShiftedTime


@pytest.fixture(scope="module")
async def shifted_time(redis_server: RedisServer) -> AsyncIterator[ShiftedTime]:
    time = ShiftedTime(redis_server)
    yield time
    await time.aclose()


@pytest.fixture(scope="module")
def new_limiter(shifted_time: ShiftedTime) -> NewLimiter:
    return shifted_time.limiter


class TestRedisRateLimiter(RateLimiterContract):
    @pytest.fixture
    def pass_time(self, shifted_time: ShiftedTime) -> PassTime:
        return shifted_time.pass_time


@pytest.fixture(scope="module")
def clock(postgres_server: PostgresServer, postgres_url_template: str) -> Iterator[ShiftedClock]:
    with postgres_server.database(postgres_url_template) as name:
        yield ShiftedClock(postgres_server.url(name))


@pytest.fixture(scope="module")
def pass_time(clock: ShiftedClock, shifted_time: ShiftedTime) -> PassTime:
    """For the database and for Redis."""

    async def pass_time(seconds: float) -> None:
        await clock.pass_time(seconds)
        await shifted_time.pass_time(seconds)

    return pass_time


@pytest.fixture(scope="module")
async def store(clock: ShiftedClock, new_limiter: NewLimiter) -> AsyncIterator[Store]:
    engine = create_engine(clock.url)
    agents = PostgresAgents(engine, key_id_of=lambda envelope: "k1")

    async def new_ledger() -> InvocationLedger:
        ledger = LimitedLedger(PostgresLedger(engine, uuid4()), new_limiter())
        await ledger.heartbeat()
        return ledger

    yield Store(
        agent_reader=agents,
        agent_writer=agents,
        invocation_reader=PostgresInvocations(engine),
        new_ledger=new_ledger,
        now=clock.now,
    )
    await engine.dispose()


class TestRedisLimitedLedger(LedgerContract):
    pass


class TestRedisLimitedLedgerInTime(LedgerTimeContract):
    pass


class TestRedisLimitedIdempotency(IdempotencyContract):
    pass
