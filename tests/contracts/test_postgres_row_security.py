"""The PostgreSQL adapters keep what the ports promise, confined by row security to one organisation at a time."""

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
from external_agents.adapters.postgres.schema import migrate
from external_agents.ports.identity import ApiKeyStore
from external_agents.ports.ledger import InvocationLedger
from external_agents.testing.idempotency import IdempotencyContract
from external_agents.testing.identity import ApiKeyStoreContract
from external_agents.testing.ledger import LedgerContract
from external_agents.testing.ledger_time import LedgerTimeContract
from external_agents.testing.ledger_verdict import LedgerVerdictContract
from external_agents.testing.repositories import AgentRepositoryContract, InvocationReaderContract
from external_agents.testing.stores import PassTime, Store
from postgres_server import PostgresServer, ShiftedClock, as_role


@pytest.fixture(scope="module")
def role(postgres_server: PostgresServer) -> Iterator[str]:
    with postgres_server.role() as name:
        yield name


@pytest.fixture(scope="module")
def database(postgres_server: PostgresServer, postgres_url_template: str, role: str) -> Iterator[str]:
    with postgres_server.database(postgres_url_template) as name:
        url = postgres_server.url(name)
        migrate(url, role)
        yield url


@pytest.fixture(scope="module")
def clock(database: str) -> ShiftedClock:
    return ShiftedClock(database)


@pytest.fixture(scope="module")
def pass_time(clock: ShiftedClock) -> PassTime:
    return clock.pass_time


@pytest.fixture(scope="class")
async def store(clock: ShiftedClock, role: str, request: pytest.FixtureRequest) -> AsyncIterator[Store]:
    engine = create_engine(as_role(clock.url, role), row_security=True)
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
async def api_keys(database: str, role: str) -> AsyncIterator[ApiKeyStore]:
    engine = create_engine(as_role(database, role), row_security=True)
    yield PostgresApiKeys(engine)
    await engine.dispose()


class TestConfinedAgents(AgentRepositoryContract):
    pass


class TestConfinedInvocations(InvocationReaderContract):
    pass


class TestConfinedLedger(LedgerContract):
    pass


class TestConfinedLedgerInTime(LedgerTimeContract):
    pass


class TestConfinedIdempotency(IdempotencyContract):
    pass


class TestConfinedLedgerWithVerdicts(LedgerVerdictContract):
    pass


class TestConfinedPlainLedger(LedgerContract):
    pass


class TestConfinedPlainLedgerInTime(LedgerTimeContract):
    pass


class TestConfinedPlainIdempotency(IdempotencyContract):
    pass


class TestConfinedPlainLedgerWithVerdicts(LedgerVerdictContract):
    pass


PLAIN = (
    *(TestConfinedPlainLedger, TestConfinedPlainLedgerInTime),
    *(TestConfinedPlainIdempotency, TestConfinedPlainLedgerWithVerdicts),
)


class TestConfinedApiKeys(ApiKeyStoreContract):
    pass
