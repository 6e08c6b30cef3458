"""Whether Redis can be worked with, and whether it would remember: what is seen, and what is said about it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import redis

from external_agents.adapters.redis import RedisCheck, RedisConnection, RedisRateLimiter, RedisReadiness
from external_agents.domain.errors import Unavailable
from external_agents.ports.rate_limiter import Place
from external_agents.testing.rate_limits import Caller
from redis_server import RedisServer, running_redis
from serve import START_S, eventually, run

SECRET_KEYS = "k1:MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="


@asynccontextmanager
async def check_of(url: str) -> AsyncIterator[RedisCheck]:
    check = RedisCheck(RedisConnection(url))
    try:
        yield check
    finally:
        await check.aclose()


async def look(url: str) -> RedisReadiness:
    async with check_of(url) as check:
        return await check()


def checked(server: RedisServer, home: Path, url: str | None = None) -> tuple[int, str]:
    """The exit status of `external-agents check`, and what it says of Redis. The database is not there."""
    env = {"DATABASE_URL": "postgresql://127.0.0.1:1/x", "SECRET_KEYS": SECRET_KEYS, "REDIS_URL": url or server.url}
    [line] = [line for line in run("check", home=home, env=env).stdout.splitlines() if "  redis  " in line]
    return 0 if line.startswith("ok ") else 1, line


async def test_a_durable_server_is_ready(redis_server: RedisServer, tmp_path: Path) -> None:
    readiness = await look(redis_server.url)
    assert readiness == RedisReadiness()
    assert readiness.reason is None
    assert await asyncio.to_thread(checked, redis_server, tmp_path) == (
        0,
        "ok     redis       keeps the rate limits, and remembers what it acknowledges",
    )


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"appendonly": "no"}, "appendonly is no, set it to yes"),
        ({"appendfsync": "everysec"}, "appendfsync is everysec, set it to always"),
        ({"maxmemory_policy": "allkeys-lru"}, "maxmemory-policy is allkeys-lru, set it to noeviction"),
        ({"replicaof": "127.0.0.1 1"}, "replica"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
async def test_a_server_that_would_forget_is_not(settings: dict[str, str], named: str) -> None:
    with running_redis(**settings) as server:
        [fault] = (await look(server.url)).faults
    assert named in fault


async def test_every_fault_is_named(tmp_path: Path) -> None:
    with running_redis(appendonly="no", appendfsync="no", maxmemory_policy="volatile-lru") as server:
        reason = (await look(server.url)).reason
        status, line = await asyncio.to_thread(checked, server, tmp_path)
    assert reason is not None
    assert status == 1
    for told in (reason, line):
        assert all(name in told for name in ("appendonly", "appendfsync", "maxmemory-policy"))


async def test_a_server_that_does_not_tell_its_settings(tmp_path: Path) -> None:
    """As managed ones do: no fault, but a word to the operator."""
    with running_redis() as server:
        with server.client() as client:
            client.execute_command("ACL SETUSER", "managed", "on", ">s3cret", "~*", "+@all", "-config")
        url = server.url.replace("unix://", "unix://managed:s3cret@")
        assert await look(url) == RedisReadiness(unverified=("appendfsync",))
        status, line = await asyncio.to_thread(checked, server, tmp_path, url)
    assert status == 0
    assert "make sure that appendfsync is always" in line


async def test_an_account_that_may_not_run_scripts() -> None:
    with running_redis() as server:
        with server.client() as client:
            client.execute_command("ACL SETUSER", "poor", "on", ">s3cret", "~*", "+@all", "-@scripting")
        [fault] = (await look(server.url.replace("unix://", "unix://poor:s3cret@"))).faults
    assert "EVALSHA" in fault


async def test_the_account_that_the_documents_describe() -> None:
    commands = ["+eval", "+evalsha", "+get", "+set", "+time", "+info", "+config|get"]
    with running_redis() as server:
        with server.client() as client:
            keys = "~external-agents:rate:*"
            client.execute_command("ACL SETUSER", "least", "on", ">s3cret", keys, *commands)
        url = server.url.replace("unix://", "unix://least:s3cret@")
        assert await look(url) == RedisReadiness()
        assert await admitted(url) == 20


async def test_a_cluster() -> None:
    """A node that serves all slots will do; one that serves some is found out, and admits nothing by mistake."""
    with (
        running_redis(cluster_enabled="yes", port=free_port()) as server,
        running_redis(cluster_enabled="yes", port=free_port()) as other,
        server.client() as client,
        other.client() as other_client,
    ):
        client.execute_command("CLUSTER ADDSLOTSRANGE", 0, 16_383)
        await asyncio.to_thread(eventually, lambda: cluster_is_ready(client), START_S)
        assert await look(server.url) == RedisReadiness()
        assert await admitted(server.url) == 20

        client.execute_command("CLUSTER DELSLOTSRANGE", 0, 8_191)
        [fault] = (await look(server.url)).faults
        assert "proxy" in fault
        other_client.execute_command("CLUSTER ADDSLOTSRANGE", 0, 8_191)
        client.execute_command("CLUSTER MEET", "127.0.0.1", other.settings["port"])
        await asyncio.to_thread(eventually, lambda: cluster_is_ready(client), START_S)
        await asyncio.to_thread(eventually, lambda: cluster_is_ready(other_client), START_S)
        for node in (server, other):
            [fault] = (await look(node.url)).faults
            assert "proxy" in fault
            assert 0 < await admitted(node.url) < 20


def free_port() -> str:
    """Ten thousand above it, the nodes of a cluster talk to each other."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1] % 20_000 + 20_000)


def cluster_is_ready(client: redis.Redis) -> bool:
    return bool(client.execute_command("CLUSTER INFO")["cluster_state"] == "ok")


async def admitted(url: str) -> int:
    """Of 20 agents, in slots all over the place."""
    limiter = RedisRateLimiter(RedisConnection(url))
    try:
        calls = (Caller(limiter, {}).acquire() for _ in range(20))
        results = await asyncio.gather(*calls, return_exceptions=True)
    finally:
        await limiter.aclose()
    assert {type(result) for result in results} <= {Place, Unavailable}
    return sum(isinstance(result, Place) for result in results)


async def test_an_outage_is_an_answer(tmp_path: Path) -> None:
    with running_redis(requirepass="s3cret") as server:
        async with check_of(server.url) as check:
            refused = await check()
        wrong = server.url.replace("unix://", "unix://:wr0ng@")
        status, line = await asyncio.to_thread(checked, server, tmp_path, wrong)
        assert status == 1
        assert "EXTERNAL_AGENTS_REDIS_URL" in line
        assert "wr0ng" not in line
        async with check_of(server.url.replace("unix://", "unix://:s3cret@")) as check:
            assert (await check()).reason is None
            server.kill()
            gone = await check()
            assert gone.reason == refused.reason == "Redis cannot be reached"
            await asyncio.to_thread(server.start)
            assert (await check()).reason is None


async def test_many_who_ask_at_once_are_one_look(redis_server: RedisServer) -> None:
    with redis_server.client() as client:
        client.config_resetstat()
        async with check_of(redis_server.url) as check:
            answers = await asyncio.gather(*(check() for _ in range(50)))
        assert set(answers) == {RedisReadiness()}
        assert client.info("commandstats")["cmdstat_info"]["calls"] == 1
