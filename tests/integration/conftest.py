"""PostgreSQL adapters on a fresh database for each test; the whole service on one database for the tests of a file."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from uuid import uuid4

import httpx
import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from agents import Agent
from external_agents.adapters.postgres.agents import PostgresAgents
from external_agents.adapters.postgres.engine import create_engine
from external_agents.adapters.postgres.ledger import PostgresLedger
from external_agents.adapters.postgres.schema import migrate
from external_agents.adapters.rest import create_app
from external_agents.bootstrap import Installation, open_installation
from external_agents.settings import Settings
from postgres_server import OpenEngine, PostgresServer, ShiftedClock, as_role
from two_organisations import CANARY, World

SETTINGS = {"SECRET_KEYS": "k1:MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=", "EGRESS_ALLOW": "loopback"}
_numbers = itertools.count(1)


@pytest.fixture
async def open_engine() -> AsyncIterator[OpenEngine]:
    """`create_engine`; what was opened is closed after the test."""
    opened: list[AsyncEngine] = []

    def open_(url: str, *, pool_size: int = 10, pool_wait_s: float = 10.0) -> AsyncEngine:
        opened.append(create_engine(url, pool_size=pool_size, pool_wait_s=pool_wait_s))
        return opened[-1]

    yield open_
    for engine in opened:
        await engine.dispose()


@pytest.fixture
async def postgres_engine(postgres_url: str, open_engine: OpenEngine) -> AsyncEngine:
    return open_engine(postgres_url)


@pytest.fixture
def postgres_agents(postgres_engine: AsyncEngine) -> PostgresAgents:
    return PostgresAgents(postgres_engine, key_id_of=lambda envelope: "k1")


@pytest.fixture
def postgres_ledger(postgres_engine: AsyncEngine) -> PostgresLedger:
    return PostgresLedger(postgres_engine, uuid4())


@pytest.fixture
def shifted_clock(postgres_url: str) -> ShiftedClock:
    return ShiftedClock(postgres_url)


@pytest.fixture(scope="module", params=["one role", "two roles"])
async def installed(
    request: pytest.FixtureRequest, postgres_server: PostgresServer, postgres_url_template: str
) -> AsyncIterator[tuple[Installation, httpx.AsyncClient, str]]:
    """One installation for all tests here, with row security and without: each test has organisations of its own."""
    with postgres_server.role() as role, postgres_server.database(postgres_url_template) as name:
        url = postgres_server.url(name)
        environment = {**SETTINGS, "DATABASE_URL": url}
        if request.param == "two roles":
            migrate(url, role)
            environment |= {"DATABASE_URL": as_role(url, role), "ROW_SECURITY": "on"}
        settings = Settings.from_env({f"EXTERNAL_AGENTS_{name}": text for name, text in environment.items()})
        async with open_installation(settings, environment["DATABASE_URL"]) as installation:
            app = create_app(installation.service, authenticator=installation.authenticator)
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://api.test") as client:
                yield installation, client, url


@pytest.fixture
async def world(installed: tuple[Installation, httpx.AsyncClient, str], agent_server: Agent) -> World:
    number = next(_numbers)
    world = World(*installed, agent_server, victim=f"acme-{number}", stranger=f"umbrella-{number}")
    await world.populate(world.victim, CANARY)
    await world.populate(world.stranger, "plain")
    return world
