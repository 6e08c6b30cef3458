"""
`external-agents` as its users run it: in processes of its own, with a HOME of its own, gone with the test.

    with home_folder() as home, serving(home, "--dev") as serve:
        httpx.get(f"{serve.address}/healthz")
        run("keys", "list", "--org", "dev", home=home)

Whatever becomes of the test, nothing stays: `serve` is ended in good order at the end of the block, killed when it does
not end, and gets a SIGTERM from the kernel when the test process itself is killed.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil
import psycopg
from psycopg.rows import dict_row

from agents import Agent, Answer, serve_agent
from external_agents.adapters.postgres.embedded import running_url
from external_agents.adapters.postgres.embedded.child_process import Launch
from external_agents.supervisor.metrics_folder import remove_leftovers

PROGRAM = Path(sysconfig.get_path("scripts")) / "external-agents"
API = "/api/external-agents"
START_S = 60.0
GONE_WITHIN_S = 30.0
COMMAND_S = 90.0

T = TypeVar("T")


@contextmanager
def home_folder() -> Iterator[Path]:
    """A folder for EXTERNAL_AGENTS_HOME. The account that the database may run under can pass through what is above."""
    folder = Path(tempfile.mkdtemp(prefix="xa-home-"))
    folder.chmod(0o711)
    try:
        yield folder / "home"
    finally:
        shutil.rmtree(folder)


def environment(home: Path, env: Mapping[str, str] | None = None, path: str | None = None) -> dict[str, str]:
    """
    The test's own, without what would change the service.

    Args:
        env: Settings, without the beginning that they all have.
        path: PATH of an environment that is not the test's.
    """
    strange = ("EXTERNAL_AGENTS_", "COLUMNS", *(("PYTHON", "VIRTUAL_ENV") if path else ()))
    kept = {name: text for name, text in os.environ.items() if not name.startswith(strange)}
    given = {"HOME": str(home), **(env or {})}
    given = {f"EXTERNAL_AGENTS_{name}": text for name, text in given.items()}
    return {**kept, **given, **({"PATH": path} if path else {})}


def run(
    *arguments: str,
    home: Path,
    env: Mapping[str, str] | None = None,
    stdin: str = "",
) -> subprocess.CompletedProcess[str]:
    """One command. Never may it show a traceback."""
    done = subprocess.run(
        [str(PROGRAM), *arguments],
        env=environment(home, env),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=COMMAND_S,
    )
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    return done


class Serve:
    """
    A running `serve`.

    Attributes:
        address: `http://127.0.0.1:…`
        pid: Of the supervisor.
    """

    def __init__(
        self, home: Path, argv: Sequence[str], env: Mapping[str, str] | None = None, path: str | None = None
    ) -> None:
        self.home = home
        self.address = ""
        self._folder = Path(tempfile.mkdtemp(prefix="xa-serve-"))
        launch = Launch(argv=argv, death_signal=signal.SIGTERM)
        with (self._folder / "stdout").open("wb") as stdout, (self._folder / "stderr").open("wb") as stderr:
            self.process = subprocess.Popen(
                launch.command(),
                env=environment(home, env, path),
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
        self.pid = self.process.pid

    @property
    def stdout(self) -> str:
        return (self._folder / "stdout").read_text()

    @property
    def stderr(self) -> str:
        return (self._folder / "stderr").read_text()

    @property
    def key(self) -> str:
        """The one that `--dev` prints."""
        [key] = re.findall(r"^export KEY=(\S+)$", self.stdout, re.MULTILINE)
        return str(key)

    def client(self, key: str | None = None) -> httpx.Client:
        return httpx.Client(base_url=self.address, headers=bearer(key or self.key), timeout=60)

    def async_client(self, key: str | None = None) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=self.address,
            headers=bearer(key or self.key),
            timeout=60,
            limits=httpx.Limits(max_connections=None),
        )

    def sql(self, statement: str, *values: object) -> list[dict[str, Any]]:
        url = running_url(self.home)
        assert url is not None
        return rows(url, statement, *values)

    def wait_until_ready(self) -> None:
        ended = "Ctrl-C stops it; running invocations finish first.\n"
        eventually(lambda: ended in self.stdout or self.process.poll() is not None, START_S)
        assert self.process.poll() is None, f"serve ended with {self.process.returncode}:\n{self.stderr}"
        [self.address] = re.findall(r"^external-agents serves (http://\S+)$", self.stdout, re.MULTILINE)

    def stop(self, signum: signal.Signals = signal.SIGTERM, within_s: float = GONE_WITHIN_S) -> int:
        """The exit status, once nothing of it is left."""
        with suppress(ProcessLookupError):
            self.process.send_signal(signum)
        return self.wait(within_s)

    def wait(self, within_s: float = GONE_WITHIN_S) -> int:
        status = self.process.wait(within_s)
        eventually(lambda: not processes_of(self.home), within_s)
        return status

    def clear(self) -> None:
        """Nothing of it runs afterwards, whatever it takes."""
        try:
            if self.process.poll() is None:
                self.stop()
            else:
                self.wait()
        except (subprocess.TimeoutExpired, AssertionError):
            for process in (psutil.Process(pid) for pid in processes_of(self.home)):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            self.process.kill()
            self.process.wait()
            raise
        finally:
            shutil.rmtree(self._folder)
            remove_leftovers()


@contextmanager
def serving(home: Path, *arguments: str, env: Mapping[str, str] | None = None) -> Iterator[Serve]:
    """`external-agents serve` on a free port."""
    with started(Serve(home, [str(PROGRAM), "serve", "--port", "0", "--workers", "2", *arguments], env)) as serve:
        yield serve


@contextmanager
def started(serve: Serve) -> Iterator[Serve]:
    """It answers when the block begins, and is gone when it has ended."""
    try:
        serve.wait_until_ready()
        yield serve
    finally:
        serve.clear()


@contextmanager
def agent_in_thread(*answers: Answer) -> Iterator[Agent]:
    """`serve_agent` for a test that is not a coroutine."""
    loop, over, started = asyncio.new_event_loop(), asyncio.Event(), threading.Event()
    found: list[Agent] = []

    async def live() -> None:
        async with serve_agent(*answers) as agent:
            found.append(agent)
            started.set()
            await over.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(live(),), name="agent", daemon=True)
    thread.start()
    assert started.wait(START_S)
    try:
        yield found[0]
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join()
        loop.close()


def processes_of(home: Path) -> list[int]:
    """Whatever runs for a HOME: with it in the environment, on the command line, or as its folder."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            traces = [process.environ().get("EXTERNAL_AGENTS_HOME", ""), process.cwd(), *process.cmdline()]
            if any(str(home) in trace for trace in traces) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


def eventually(condition: Callable[[], T], within_s: float, every_s: float = 0.05) -> T:
    """What `condition` returns once that is true."""
    deadline = time.monotonic() + within_s
    while not (result := condition()):
        assert time.monotonic() < deadline, f"it did not come true within {within_s:.0f} s"
        time.sleep(every_s)
    return result


def rows(url: str, statement: str, *values: object) -> list[dict[str, Any]]:
    """What a psql session would see."""
    with psycopg.connect(url.replace("+psycopg", ""), row_factory=dict_row, connect_timeout=10) as connection:
        return connection.execute(statement.encode(), values or None).fetchall()


def everything(url: str) -> str:
    """Every row of every table, and the definitions that a database has, as text."""
    tables = rows(url, "SELECT schemaname, tablename FROM pg_tables WHERE schemaname !~ '^(pg_|information_)'")
    assert tables
    parts = [str(rows(url, f'SELECT * FROM "{table["schemaname"]}"."{table["tablename"]}"')) for table in tables]
    return "\n".join(parts)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def agent_document(webhook_url: str, **changes: Any) -> dict[str, Any]:
    """What creates a plain agent."""
    plain = {"name": "Echo", "provider": "custom", "webhook_url": webhook_url, "auth_type": "none"}
    return {**plain, **changes}


def is_problem(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The problem, whole and consistent (RFC 9457)."""
    assert answer.status_code == status, (answer.status_code, answer.text)
    assert answer.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = answer.json()
    assert problem["status"] == status
    assert all(isinstance(problem[member], str) and problem[member] for member in ("type", "title", "detail"))
    return problem
