"""Many callers, few connections."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from uuid import uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from external_agents.adapters.postgres.agents import PostgresAgents
from external_agents.adapters.postgres.plain.ledger import PlainPostgresLedger
from external_agents.adapters.postgres.plain.turnstile import Turnstile
from external_agents.domain.errors import Unavailable
from external_agents.testing.builders import make_agent, make_request


async def test_those_of_one_key_pass_one_by_one_and_others_meanwhile() -> None:
    turnstile, inside, most = Turnstile(at_once=2), 0, 0
    held = asyncio.Event()

    async def pass_through() -> None:
        nonlocal inside, most
        async with turnstile.turn("busy"):
            inside += 1
            most = max(most, inside)
            await held.wait()
            inside -= 1

    waiting = [asyncio.create_task(pass_through()) for _ in range(5)]
    async with asyncio.timeout(5), turnstile.turn("quiet"):
        held.set()
        await asyncio.gather(*waiting)
    assert most == 1


async def test_too_many_are_turned_away_and_leave_no_trace() -> None:
    turnstile = Turnstile(at_once=1, waiting_max=0)
    async with turnstile.turn("a"):
        with pytest.raises(Unavailable):
            async with turnstile.turn("b"):
                pytest.fail("it was let in")
    async with turnstile.turn("b"):
        pass


async def test_a_busy_agent_leaves_connections_to_others(
    postgres_url: str, open_engine: Callable[..., AsyncEngine], postgres_engine: AsyncEngine
) -> None:
    """The agent's row is locked from outside: whoever admits to it waits. Everybody else must not."""
    agents = PostgresAgents(postgres_engine, key_id_of=lambda envelope: "")
    busy, quiet = make_agent(), make_agent()
    await agents.bulk([busy, quiet])
    small = open_engine(postgres_url, pool_size=8, pool_wait_s=1.0)
    ledger = PlainPostgresLedger(small, uuid4(), endings=open_engine(postgres_url, pool_size=1))
    await ledger.heartbeat()
    async with postgres_engine.begin() as outside:
        lock = text("SELECT FROM external_agent_rate_windows WHERE agent_id = :id FOR UPDATE")
        await outside.execute(lock, {"id": busy.id})
        waiting = [asyncio.create_task(ledger.admit(make_request(busy))) for _ in range(50)]
        async with asyncio.timeout(3):
            admission = await ledger.admit(make_request(quiet))
            reader = PostgresAgents(small, key_id_of=lambda envelope: "")
            await asyncio.gather(*(reader.read(quiet.org_id, quiet.id) for _ in range(20)))
            await ledger.heartbeat()
            await ledger.settle(admission.invocation.interrupted(admission.invocation.created_at))
    assert len(await asyncio.gather(*waiting)) == 50
