"""PostgreSQL adapters on a fresh database for each test."""

from __future__ import annotations

from collections.abc import AsyncIterator
from uuid import uuid4

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from external_agents.adapters.postgres.agents import PostgresAgents
from external_agents.adapters.postgres.engine import create_engine
from external_agents.adapters.postgres.ledger import PostgresLedger
from postgres_server import OpenEngine, ShiftedClock


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
