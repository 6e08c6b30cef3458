"""
What tests of every kind may ask for: a database of one's own on a real PostgreSQL, a real Redis, a real HTTP agent.

Adapters are imported by the fixtures that need them: the tests of the core run with nothing but the core installed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from agents import Agent
    from postgres_server import PostgresServer
    from redis_server import RedisServer


# `--hypothesis-profile=thorough` tries fifty times as hard.
settings.register_profile("suite", max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("thorough", parent=settings.get_profile("suite"), max_examples=5000)
settings.load_profile("suite")


@pytest.fixture(autouse=True)
async def no_batch_outlives_its_test() -> AsyncIterator[None]:
    """Batches are carried by tasks that hold a connection for a moment longer than anybody waits."""
    yield
    tasks = [task for task in asyncio.all_tasks() if task.get_name() == "external-agents group commit"]
    if tasks:
        await asyncio.wait(tasks, timeout=10)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """One server a test process; with xdist, each worker has its own."""
    from postgres_server import running_postgres

    with running_postgres() as server:
        yield server


@pytest.fixture(scope="session")
def postgres_url_template(postgres_server: PostgresServer) -> Iterator[str]:
    """The name of a database with the newest schema. Nobody connects to it: it is copied."""
    from external_agents.adapters.postgres.schema import migrate

    with postgres_server.database() as name:
        migrate(postgres_server.url(name))
        yield name


@pytest.fixture
def postgres_url(postgres_server: PostgresServer, postgres_url_template: str) -> Iterator[str]:
    """The SQLAlchemy URL of a fresh database with the newest schema, for one test."""
    with postgres_server.database(postgres_url_template) as name:
        yield postgres_server.url(name)


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """One durable server a test process, which nobody may stop or empty; see `redis_server.py`."""
    from redis_server import running_redis

    with running_redis() as server:
        yield server


@pytest.fixture
async def agent_server() -> AsyncIterator[Agent]:
    """An agent on the loopback address that answers 200 with JSON until it is told otherwise; see `agents.py`."""
    from agents import serve_agent

    async with serve_agent() as agent:
        yield agent
