"""The PostgreSQL adapters keep what the ports promise."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from uuid import uuid4

import pytest

from external_agents.adapters.postgres.agents import PostgresAgents
from external_agents.adapters.postgres.api_keys import PostgresApiKeys
from external_agents.adapters.postgres.engine import create_engine
from external_agents.adapters.postgres.invocations import PostgresInvocations
from external_agents.adapters.postgres.ledger import PostgresLedger
from external_agents.adapters.postgres.plain.ledger import PlainPostgresLedger
from external_agents.ports.identity import ApiKeyStore
from external_agents.ports.ledger import InvocationLedger
from external_agents.testing.idempotency import IdempotencyContract
from external_agents.testing.identity import ApiKeyStoreContract
from external_agents.testing.ledger import LedgerContract
from external_agents.testing.ledger_time import LedgerTimeContract
from external_agents.testing.ledger_verdict import LedgerVerdictContract
from external_agents.testing.repositories import AgentRepositoryContract, InvocationReaderContract
from external_agents.testing.stores import PassTime, Store
from postgres_server import PostgresServer, ShiftedClock


@pytest.fixture(scope="module")
def database(postgres_server: PostgresServer, postgres_url_template: str) -> Iterator[str]:
    with postgres_server.database(postgres_url_template) as name:
        yield postgres_server.url(name)


@pytest.fixture(scope="module")
def clock(database: str) -> ShiftedClock:
    return ShiftedClock(database)


@pytest.fixture(scope="module")
def pass_time(clock: ShiftedClock) -> PassTime:
    return clock.pass_time


@pytest.fixture(scope="class")
async def store(clock: ShiftedClock, request: pytest.FixtureRequest) -> AsyncIterator[Store]:
    engine = create_engine(clock.url)
    agents = PostgresAgents(engine, key_id_of=lambda envelope: "k1")

    async def new_ledger() -> InvocationLedger:
        ledger = (PlainPostgresLedger if request.cls in PLAIN else PostgresLedger)(engine, uuid4())
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


@pytest.fixture(scope="module")
async def api_keys(database: str) -> AsyncIterator[ApiKeyStore]:
    engine = create_engine(database)
    yield PostgresApiKeys(engine)
    await engine.dispose()


class TestPostgresAgents(AgentRepositoryContract):
    pass


class TestPostgresInvocations(InvocationReaderContract):
    pass


class TestPostgresLedger(LedgerContract):
    pass


class TestPostgresLedgerInTime(LedgerTimeContract):
    pass


class TestPostgresIdempotency(IdempotencyContract):
    pass


class TestPostgresLedgerWithVerdicts(LedgerVerdictContract):
    pass


class TestPlainPostgresLedger(LedgerContract):
    pass


class TestPlainPostgresLedgerInTime(LedgerTimeContract):
    pass


class TestPlainPostgresIdempotency(IdempotencyContract):
    pass


class TestPlainPostgresLedgerWithVerdicts(LedgerVerdictContract):
    pass


PLAIN = (
    *(TestPlainPostgresLedger, TestPlainPostgresLedgerInTime),
    *(TestPlainPostgresIdempotency, TestPlainPostgresLedgerWithVerdicts),
)


class TestPostgresApiKeys(ApiKeyStoreContract):
    pass
