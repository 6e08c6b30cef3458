"""What goes wrong between us and Redis: nothing is admitted, nothing is taken twice, and it passes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from uuid import uuid4

import pytest

from external_agents.adapters.redis import RedisConnection, RedisRateLimiter
from external_agents.adapters.redis.connection import CALL_TIMEOUT_S
from external_agents.adapters.redis.rate_limiter import WAITING_MAX
from external_agents.adapters.redis.windows import SHA, key_of
from external_agents.domain.errors import ConfigurationError, Unavailable
from external_agents.domain.rate_limit import Window
from external_agents.domain.refusals import RateLimited
from external_agents.ports.rate_limiter import Place
from external_agents.testing.rate_limits import Caller, all_windows
from redis_server import RedisServer, running_redis

PATIENCE_S = 4 * CALL_TIMEOUT_S
"""Nobody may wait longer for an answer, or for the news that there is none."""


@pytest.fixture
def server() -> Iterator[RedisServer]:
    """For one test, to be killed and emptied."""
    with running_redis() as server:
        yield server


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[RedisRateLimiter]:
    limiter = RedisRateLimiter(RedisConnection(url))
    try:
        yield limiter
    finally:
        await limiter.aclose()


@pytest.fixture
async def limiter(server: RedisServer) -> AsyncIterator[RedisRateLimiter]:
    async with opened(server.url) as limiter:
        yield limiter


async def is_unavailable(limiter: RedisRateLimiter) -> bool:
    """Everything is, in good time, in the same words."""
    caller = Caller(limiter, {Window.MINUTE: 5})
    for question in (caller.acquire(), limiter.peek(caller.org_id, caller.agent_id, {})):
        async with asyncio.timeout(PATIENCE_S):
            with pytest.raises(Unavailable) as outage:
                await question
        assert str(outage.value) == "The rate limiter is not available."
        assert "s3cret" not in repr(outage.value.__cause__)
    return True


async def results_of(caller: Caller, times: int) -> tuple[int, int]:
    """How many of so many at once were admitted, and for how many nobody knows."""
    async with asyncio.timeout(PATIENCE_S):
        results = await asyncio.gather(*(caller.acquire() for _ in range(times)), return_exceptions=True)
    assert {type(result) for result in results} <= {Place, Unavailable, RateLimited}
    return sum(isinstance(one, Place) for one in results), sum(isinstance(one, Unavailable) for one in results)


async def test_nothing_connects_before_it_is_needed(server: RedisServer) -> None:
    server.kill()
    async with opened(server.url) as limiter:
        assert await is_unavailable(limiter)
        await asyncio.to_thread(server.start)
        await Caller(limiter, {}).acquire()


async def test_a_killed_server_remembers_what_it_acknowledged(server: RedisServer, limiter: RedisRateLimiter) -> None:
    caller = Caller(limiter, {Window.DAY: 7})
    assert await results_of(caller, 5) == (5, 0)
    server.kill()
    assert await is_unavailable(limiter)
    await asyncio.to_thread(server.start)
    assert await caller.used() == all_windows(5)
    assert await results_of(caller, 5) == (2, 0)


async def test_a_server_killed_at_work(server: RedisServer, limiter: RedisRateLimiter) -> None:
    """What was acknowledged is there; what was not may be; nothing is there twice."""
    caller = Caller(limiter, {Window.DAY: 1_000_000})
    admitted = unknown = 0

    async def work() -> None:
        nonlocal admitted, unknown
        while not unknown:
            try:
                await caller.acquire()
            except Unavailable:
                unknown += 1
                return
            admitted += 1
            if admitted == 200:
                server.kill()

    async with asyncio.timeout(PATIENCE_S):
        await asyncio.gather(*(work() for _ in range(16)))
    await asyncio.to_thread(server.start)
    used = (await caller.used())[Window.DAY]
    assert admitted <= used <= admitted + unknown


async def test_a_server_that_hangs(server: RedisServer, limiter: RedisRateLimiter) -> None:
    caller = Caller(limiter, {Window.DAY: 100})
    assert await results_of(caller, 3) == (3, 0)
    server.pause()
    assert await results_of(caller, 3) == (0, 3)
    assert await is_unavailable(limiter)
    server.resume()
    used = (await caller.used())[Window.DAY]
    assert 3 <= used <= 6, "they may have been taken once, and not again"
    assert await results_of(caller, 3) == (3, 0)
    assert await caller.used() == all_windows(used + 3)


async def test_a_server_that_was_restarted_meanwhile_costs_nobody_anything(
    server: RedisServer, limiter: RedisRateLimiter
) -> None:
    caller = Caller(limiter, {})
    for _ in range(3):
        await caller.acquire()
        await asyncio.to_thread(server.kill)
        await asyncio.to_thread(server.start)
    assert await caller.used() == all_windows(3)


async def test_scripts_and_keys_may_vanish(server: RedisServer, limiter: RedisRateLimiter) -> None:
    callers = [Caller(limiter, {Window.DAY: 3}) for _ in range(3)]
    with server.client() as client:
        for used in (1, 2):
            client.script_flush()
            await asyncio.gather(*(caller.acquire() for caller in callers))
            assert [await caller.used() for caller in callers] == [all_windows(used)] * 3
        client.flushall()
    assert [await results_of(caller, 4) for caller in callers] == [(3, 0)] * 3


async def test_callers_of_one_moment_are_one_command(server: RedisServer, limiter: RedisRateLimiter) -> None:
    caller = Caller(limiter, {Window.DAY: 30})
    await caller.used()
    with server.client() as client:
        client.config_resetstat()
        assert await results_of(caller, 50) == (30, 0)
        assert client.info("commandstats")["cmdstat_evalsha"]["calls"] == 1
    assert [quota.used for quota in (await caller.refused()).quotas.quotas] == [30]


async def test_callers_who_come_while_the_event_loop_is_busy_are_one_command(
    server: RedisServer, limiter: RedisRateLimiter
) -> None:
    caller = Caller(limiter, {Window.DAY: 100})

    async def come(turns: int) -> None:
        for _ in range(turns):
            await asyncio.sleep(0)
        await caller.acquire()

    assert await results_of(caller, 20) == (20, 0)  # From now on it is known that there is company.
    with server.client() as client:
        client.config_resetstat()
        await asyncio.gather(*(come(turns) for turns in range(20)))
        assert client.info("commandstats")["cmdstat_evalsha"]["calls"] == 1


async def test_one_poisoned_key_fails_alone(server: RedisServer, limiter: RedisRateLimiter) -> None:
    sane, strange, garbled = (Caller(limiter, {Window.DAY: 5}) for _ in range(3))
    with server.client() as client:
        client.lpush(key_of(strange.org_id, strange.agent_id), "not ours")
        client.set(key_of(garbled.org_id, garbled.agent_id), "not ours")
    results = await asyncio.gather(*(results_of(caller, 2) for caller in (strange, sane, garbled)))
    assert results == [(0, 2), (2, 0), (0, 2)]


async def test_a_replica_that_takes_no_writes(server: RedisServer, limiter: RedisRateLimiter) -> None:
    caller = Caller(limiter, {})
    await caller.acquire()
    with server.client() as client:
        client.replicaof("127.0.0.1", "1")
        assert await results_of(caller, 2) == (0, 2)
        client.replicaof("NO", "ONE")
    assert await results_of(caller, 2) == (2, 0)


async def test_a_server_without_memory_evicts_nothing(server: RedisServer, limiter: RedisRateLimiter) -> None:
    caller = Caller(limiter, {Window.DAY: 5})
    await caller.acquire()
    with server.client() as client:
        client.config_set("maxmemory", 1)
        assert await results_of(caller, 2) == (0, 2)
        client.config_set("maxmemory", 0)
    assert await results_of(caller, 9) == (4, 0)


async def test_a_wrong_password_is_nowhere_to_be_read(caplog: pytest.LogCaptureFixture) -> None:
    with running_redis(requirepass="right-s3cret") as server:
        for user in (":", "nobody:"):
            async with opened(server.url.replace("unix://", f"unix://{user}wrong-s3cret@")) as limiter:
                assert await is_unavailable(limiter)
                assert "s3cret" not in repr(limiter) + repr(vars(limiter))
        async with opened(server.url) as limiter:
            assert await is_unavailable(limiter)
        assert len(caplog.records) == 3
        assert "s3cret" not in caplog.text
        async with opened(server.url.replace("unix://", "unix://:right-s3cret@")) as limiter:
            await Caller(limiter, {}).acquire()


async def test_an_outage_is_logged_once_not_for_each_call(
    server: RedisServer, limiter: RedisRateLimiter, caplog: pytest.LogCaptureFixture
) -> None:
    server.kill()
    for _ in range(20):
        assert await results_of(Caller(limiter, {}), 1) == (0, 1)
    [record] = caplog.records
    assert record.levelno == logging.WARNING


@pytest.mark.parametrize(
    "url",
    [
        "http://:s3cret@localhost",
        "redis://:s3cret@localhost?no_such_option=1",
        "redis://:s3cret@localhost?db=first",
        "redis://:s3:cret/@localhost",
        "redis://:s3cret@localhost:port",
    ],
)
def test_a_url_that_cannot_be_used(url: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        RedisConnection(url)
    assert "s3cret" not in str(error.value)
    assert error.value.__suppress_context__


# A server that says what a test wants it to, and one that stands between us and the real one.


@asynccontextmanager
async def replying(reply: bytes) -> AsyncIterator[str]:
    """The URL of a server that gives one answer to everything; with no answer it only listens."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(65_536):
            # One script call at a time is asked for, and the connection's own commands, each on its own.
            writer.write(reply)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1")
    try:
        yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


REFUSALS = [
    "LOADING Redis is loading the dataset in memory",
    "READONLY You can't write against a read only replica.",
    "OOM command not allowed when used memory > 'maxmemory'.",
    "MISCONF Errors writing to the AOF file: No space left on device",
    "NOREPLICAS Not enough good replicas to write.",
    "MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.",
    "MOVED 1234 192.0.2.1:6379",
    "ASK 1234 192.0.2.1:6379",
    "TRYAGAIN Multiple keys request during rehashing of slot",
    "CLUSTERDOWN Hash slot not served",
    "CROSSSLOT Keys in request don't hash to the same slot",
    f"NOSCRIPT No matching script. {SHA}",
    "NOPERM this user has no permissions to run the 'evalsha' command",
    "NOAUTH Authentication required.",
    "BUSY Redis is busy running a script.",
    "UNKILLABLE",
    "ERR max number of clients reached",
    "ERR something new",
]


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda line: line.split()[0])
async def test_whatever_the_server_refuses_with_nothing_is_admitted(refusal: str) -> None:
    async with replying(f"-{refusal}\r\n".encode()) as url, opened(url) as limiter:
        assert await is_unavailable(limiter)


@pytest.mark.parametrize(
    "reply", [b"", b"+OK\r\n", b":1\r\n", b"$-1\r\n", b"$3\r\nabc\r\n", b"*0\r\n", b"HTTP/1.1 400 Bad Request\r\n\r\n"]
)
async def test_what_is_no_answer_admits_nothing(reply: bytes) -> None:
    async with replying(reply) as url, opened(url) as limiter:
        assert await is_unavailable(limiter)


class Proxy:
    """
    Stands between us and the server.

    Attributes:
        forwards: Cleared: answers wait.
        cuts: The connection ends where the answer of a script would begin.
    """

    def __init__(self, server: RedisServer) -> None:
        self.forwards, self.asked = asyncio.Event(), asyncio.Event()
        self.forwards.set()
        self.cuts = False
        self.url = ""
        self._socket = str(server.folder / "socket")

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_server, from_server = await self._connect()
        while question := await reader.read(65_536):
            from_server.write(question)
            answer = await to_server.read(65_536)
            self.asked.set()
            await self.forwards.wait()
            if self.cuts and b"EVALSHA" in question:
                break
            writer.write(answer)
        from_server.close()
        writer.close()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_unix_connection(self._socket)


@pytest.fixture
async def proxy(server: RedisServer) -> AsyncIterator[Proxy]:
    proxy = Proxy(server)
    listener = await asyncio.start_server(proxy.serve, "127.0.0.1")
    proxy.url = f"redis://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    yield proxy
    proxy.forwards.set()
    listener.close()


async def test_a_call_whose_answer_was_lost_is_not_repeated(proxy: Proxy) -> None:
    async with opened(proxy.url) as limiter:
        caller = Caller(limiter, {Window.DAY: 100})
        await caller.acquire()
        proxy.cuts = True
        for _ in range(3):
            assert await results_of(caller, 2) == (0, 2)
        proxy.cuts = False
        assert await caller.used() == all_windows(7)


async def test_a_place_for_someone_who_has_gone_is_given_back(proxy: Proxy) -> None:
    async with opened(proxy.url) as limiter:
        caller = Caller(limiter, {Window.DAY: 3})
        await caller.used()
        proxy.asked.clear()
        proxy.forwards.clear()
        waiting = [asyncio.create_task(caller.acquire()) for _ in range(3)]
        await proxy.asked.wait()
        waiting[0].cancel()
        await asyncio.wait(waiting[:1])
        proxy.forwards.set()
        await asyncio.gather(*waiting[1:])
        assert await caller.used() == all_windows(2)
        await caller.acquire()
        await caller.refused()


async def test_whoever_waits_inherits_the_place_of_someone_who_has_gone(proxy: Proxy) -> None:
    async with opened(proxy.url) as limiter:
        caller = Caller(limiter, {Window.DAY: 1})
        await caller.used()
        proxy.asked.clear()
        proxy.forwards.clear()
        first, second = (asyncio.create_task(caller.acquire()) for _ in range(2))
        await proxy.asked.wait()
        first.cancel()
        proxy.forwards.set()
        await second
        assert await caller.used() == all_windows(1)


async def test_a_failed_release_is_told_and_not_repeated(proxy: Proxy) -> None:
    async with opened(proxy.url) as limiter:
        caller = Caller(limiter, {Window.DAY: 5})
        lost, kept = await caller.acquire(), await caller.acquire()
        proxy.cuts = True
        with pytest.raises(Unavailable):
            await limiter.release(lost)
        proxy.cuts = False
        await limiter.release(lost)
        assert await caller.used() == all_windows(1)
        await limiter.release(kept)
        assert await caller.used() == all_windows(0)


async def test_a_full_queue_turns_callers_away_but_takes_places_back(proxy: Proxy) -> None:
    async with opened(proxy.url) as limiter:
        caller = Caller(limiter, {})
        place = await caller.acquire()
        proxy.asked.clear()
        proxy.forwards.clear()
        waiting = [asyncio.create_task(caller.acquire()) for _ in range(WAITING_MAX)]
        await proxy.asked.wait()
        for question in (caller.acquire(), limiter.peek(caller.org_id, uuid4(), {})):
            with pytest.raises(Unavailable) as full:
                await question
            assert full.value.retry_after_s == 1
        release = asyncio.create_task(limiter.release(place))
        proxy.forwards.set()
        await asyncio.gather(*waiting, release)
        assert await caller.used() == all_windows(WAITING_MAX)
        await caller.acquire()


async def test_closing_answers_those_who_wait(proxy: Proxy) -> None:
    async with opened(proxy.url) as limiter:
        caller = Caller(limiter, {})
        await caller.acquire()
        proxy.asked.clear()
        proxy.forwards.clear()
        sent = asyncio.create_task(caller.acquire())
        await proxy.asked.wait()
        queued = asyncio.create_task(caller.acquire())
        await asyncio.sleep(0)
        await limiter.aclose()
        assert {type(one) for one in await asyncio.gather(sent, queued, return_exceptions=True)} == {Unavailable}


async def test_no_more_than_some_commands_in_one_round_trip(server: RedisServer, limiter: RedisRateLimiter) -> None:
    callers = [Caller(limiter, {}) for _ in range(1_200)]
    await asyncio.gather(*(caller.acquire() for caller in callers))
    with server.client() as client:
        assert client.dbsize() == 1_200
