"""Two processes over one PostgreSQL: a key that one revokes is refused by the other within 2 s."""

from __future__ import annotations

import asyncio
import time

import pytest

from external_agents.adapters.identity import ApiKeyAuthenticator, ApiKeys
from external_agents.adapters.memory import SystemClock, SystemIds
from external_agents.adapters.postgres.api_keys import PostgresApiKeys
from external_agents.adapters.secrets import KeyRing
from external_agents.domain.errors import Unauthenticated
from postgres_server import OpenEngine

RING = KeyRing({"k1": bytes(range(32))})


async def test_a_revoked_key_is_refused_by_every_process_within_two_seconds(
    postgres_url: str, open_engine: OpenEngine
) -> None:
    clock = SystemClock()
    stores = [PostgresApiKeys(open_engine(postgres_url)) for _ in range(2)]
    doors = [ApiKeyAuthenticator(store=store, key_ring=RING, clock=clock) for store in stores]
    keys = ApiKeys(store=stores[0], key_ring=RING, clock=clock, ids=SystemIds())
    text, key = await keys.issue("acme", "billing")
    asking = [asyncio.create_task(_until_refused(door, text)) for door in doors for _ in range(3)]
    assert (await doors[1].authenticate(text)).subject == "billing"
    await asyncio.sleep(0)
    await keys.revoke(key.id)
    revoked_s = time.monotonic()
    async with asyncio.timeout(10):
        refused_s = await asyncio.gather(*asking)
    assert max(refused_s) - revoked_s < 2
    for door in doors:
        with pytest.raises(Unauthenticated):
            await door.authenticate(text)


async def _until_refused(door: ApiKeyAuthenticator, text: str) -> float:
    """When the last call began that was let in."""
    last_s = time.monotonic()
    while True:
        began_s = time.monotonic()
        try:
            await door.authenticate(text)
        except Unauthenticated:
            return last_s
        last_s = began_s
        await asyncio.sleep(0)
