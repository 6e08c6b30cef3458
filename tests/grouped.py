"""The ledger with group commit, as its tests use it: its batches are watched, and others hold locks in its way."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, TypeVar
from uuid import uuid4

import attrs
import psycopg
from sqlalchemy.ext.asyncio import AsyncEngine

from external_agents.adapters.postgres.agents import PostgresAgents
from external_agents.adapters.postgres.grouped.fair_queue import Lane
from external_agents.adapters.postgres.ledger import PostgresLedger
from external_agents.domain.agent import ExternalAgent
from external_agents.domain.invocation import ExternalAgentInvocation
from external_agents.ports.ledger import Admission
from external_agents.ports.observability import BatchRecord
from external_agents.testing.builders import make_agent, make_request
from postgres_server import LOCK_AGENT, dsn

Result = TypeVar("Result")

LAST_MONTH = datetime(2026, 1, 31, 23, 59, 59, 999000, tzinfo=UTC)
THIS_MONTH = datetime(2026, 2, 1, tzinfo=UTC)


@attrs.define(eq=False)
class Watched:
    """A ledger that has sent a heartbeat, and its batches so far."""

    ledger: PostgresLedger
    batches: list[BatchRecord]

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(admissions, settlements)"""
        return [(batch.admissions, batch.settlements) for batch in self.batches]

    async def running(self, agent: ExternalAgent, count: int = 1, **changes: Any) -> list[ExternalAgentInvocation]:
        admissions = await asyncio.gather(*(self.ledger.admit(make_request(agent, **changes)) for _ in range(count)))
        return [admission.invocation for admission in admissions]


async def watched(engine: AsyncEngine, **settings: Any) -> Watched:
    batches: list[BatchRecord] = []
    ledger = PostgresLedger(engine, uuid4(), observe=batches.append, **settings)
    await ledger.heartbeat()
    return Watched(ledger, batches)


def lane_of(agent: ExternalAgent) -> Lane:
    return agent.org_id, agent.id.int


async def stored_agents(agents: PostgresAgents, count: int, **changes: Any) -> list[ExternalAgent]:
    made = [make_agent(**changes) for _ in range(count)]
    await agents.bulk(made)
    return made


@contextmanager
def held_up(url: str, *agents: ExternalAgent, statement: str = LOCK_AGENT) -> Iterator[psycopg.Connection]:
    """Another session holds a row of each of these agents."""
    with psycopg.connect(dsn(url)) as connection:
        for agent in agents:
            connection.execute(statement, [agent.org_id, agent.id])
        yield connection


async def until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    """Until it holds; it is asked on every turn of the event loop."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - nobody tells when it does
            await asyncio.sleep(0)


async def settled_down(*work: Awaitable[Result]) -> list[Result | BaseException]:
    """What became of each."""
    return await asyncio.gather(*work, return_exceptions=True)


def admitted(results: list[Any]) -> list[Admission]:
    return [result for result in results if isinstance(result, Admission)]


def names(results: list[Any]) -> set[str]:
    return {type(result).__name__ for result in results}
