"""`serve`'s two children: started in order, watched, drained, and gone with it, however it goes."""

from __future__ import annotations

import json
import os
import resource
import selectors
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest

from external_agents.adapters.postgres.embedded import attached, running_url
from external_agents.supervisor.metrics_folder import PREFIX, metrics_folder, remove_leftovers

GONE_WITHIN_S = 30.0
LONGEST_S = 120.0
CONNECTIONS = 1000
LIFESPAN_S = 32
"""More than the 30 s that gunicorn would give the application's shutdown."""

# Tells through files what it has begun, so that a test need not guess.
APP = """
import asyncio, os, time
from pathlib import Path

FOLDER = Path(os.environ["TEST_FOLDER"])

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
        if os.environ.get("TEST_LIFESPAN") == "failed":
            return await send({"type": "lifespan.startup.failed", "message": "no luck today"})
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await asyncio.sleep(float(os.environ.get("TEST_LIFESPAN") or 0))
        FOLDER.joinpath("lifespan-ended").touch()
        return await send({"type": "lifespan.shutdown.complete"})
    _, name, seconds = (scope["path"] + "/0").split("/")[:3]
    FOLDER.joinpath(name).touch()
    await asyncio.sleep(float(seconds))
    body = str(os.getpid()).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})
"""

SERVE = """
import json, os, sys, threading
from pathlib import Path
from external_agents.domain.errors import ExternalAgentsError
from external_agents.supervisor import Serving, supervise

def say(**said):
    print(json.dumps(said), flush=True)

def before_serving(url):
    say(database=url)
    if os.environ.get("TEST_BEFORE") == "fails":
        raise ExternalAgentsError("the schema is behind")
    if os.environ.get("TEST_BEFORE") == "hangs":
        threading.Event().wait()

options = json.loads(sys.argv[1])
try:
    status = supervise(
        home=Path(options["home"]),
        database_url=options["database_url"],
        serving=Serving(**{"port": 0, "workers": 2, "app": "app:app"} | options["serving"]),
        before_serving=before_serving,
        on_ready=lambda address: say(address=address),
        tell=lambda line: say(told=line),
    )
except ExternalAgentsError as error:
    say(error=str(error))
    status = 1
sys.exit(status)
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def children(pid: int) -> list[int]:
    try:
        return [
            int(child)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
    except FileNotFoundError:
        return []


def descendants(pid: int) -> list[int]:
    return [found for child in children(pid) for found in (child, *descendants(child))]


def eventually(condition: Callable[[], object], within_s: float = GONE_WITHIN_S) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.01)


def import_path(folder: Path) -> str:
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


class Serve:
    """A supervisor in a process of its own, with a small application."""

    def __init__(
        self, folder: Path, env: dict[str, str] | None = None, database_url: str | None = None, **serving: object
    ) -> None:
        self.folder = folder
        self.home = folder / "home"
        said = {"home": str(self.home), "database_url": database_url, "serving": serving}
        self._workers = serving.get("workers", 2)
        (folder / "modules").mkdir(exist_ok=True)
        (folder / "modules/app.py").write_text(APP)
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", SERVE, json.dumps(said)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=folder,
            env={
                **os.environ,
                "TEST_FOLDER": str(folder),
                "PYTHONPATH": import_path(folder / "modules"),
                **(env or {}),
            },
        )
        assert self.process.stdout is not None
        self._stdout = self.process.stdout
        self._bound = threading.Timer(LONGEST_S, self.process.kill)
        self._bound.start()
        self.pids: list[int] = []

    def said(self, what: str) -> str:
        """The next thing of that kind it says."""
        for line in self._stdout:
            if what in (said := json.loads(line)):
                return str(said[what])
        raise AssertionError(self.process.communicate()[1])

    def up(self) -> Serve:
        self.database = self.said("database")
        self.address = self.said("address")
        self.host, self.port = "127.0.0.1", int(self.address.rpartition(":")[2])
        eventually(lambda: len(children(self.gunicorn)) == self._workers)
        self.pids = descendants(self.process.pid)
        return self

    @property
    def gunicorn(self) -> int:
        return next(
            pid for pid in children(self.process.pid) if b"gunicorn_server" in Path(f"/proc/{pid}/cmdline").read_bytes()
        )

    @property
    def postmaster(self) -> int:
        return int((self.home / "postgres/data/postmaster.pid").read_text().splitlines()[0])

    def get(self, path: str) -> int:
        with urllib.request.urlopen(self.address + path, timeout=60) as answer:
            assert answer.status == 200
            return int(answer.read())

    def running(self, pool: ThreadPoolExecutor, name: str, seconds: int) -> object:
        """A request that the application has begun with."""
        future = pool.submit(self.get, f"/{name}/{seconds}")
        eventually((self.folder / name).exists)
        return future

    def ended(self, within_s: float = GONE_WITHIN_S) -> int:
        status = self.process.wait(within_s)
        assert not [pid for pid in self.pids if alive(pid)]
        return status

    def clean_up(self) -> None:
        self.pids += descendants(self.process.pid)
        self._bound.cancel()
        self.process.kill()
        self.process.communicate()
        try:
            eventually(lambda: not any(map(alive, self.pids)))
        finally:
            for pid in filter(alive, self.pids):
                os.kill(pid, signal.SIGKILL)
            remove_leftovers()


@pytest.fixture(autouse=True)
def socket_folders(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where sockets lie; killed owners leave empty folders behind."""
    tmp_path_factory.getbasetemp()  # It must not come to lie in there, where it would last for one test.
    with tempfile.TemporaryDirectory(prefix="ea-", dir="/tmp") as folder:
        Path(folder).chmod(0o1777)
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", None)
        yield


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Serve]]:
    started: list[Serve] = []

    def start(**options: object) -> Serve:
        started.append(Serve(tmp_path, **options))  # type: ignore[arg-type]
        return started[-1]

    yield start
    for one in started:
        one.clean_up()


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """One whose application needs long to end; it does so while the other tests run."""
    one = Serve(tmp_path_factory.mktemp("patient"), {"TEST_LIFESPAN": str(LIFESPAN_S)}, database_url="none", workers=1)
    one.up().process.terminate()
    yield one
    one.clean_up()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    executor = ThreadPoolExecutor(4)
    yield executor
    executor.shutdown(wait=False)  # what still runs ends with the server


@pytest.mark.usefixtures("patient")
class TestEnding:
    @pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
    def test_the_first_signal_lets_a_running_request_finish(
        self, serve: Callable[..., Serve], pool: ThreadPoolExecutor, signum: signal.Signals
    ) -> None:
        one = serve().up()
        request = one.running(pool, "slow", 2)
        one.process.send_signal(signum)
        assert one.ended() == 0
        assert request.result() in one.pids  # type: ignore[attr-defined]
        assert (one.folder / "lifespan-ended").exists()
        assert not (one.home / "postgres/data/postmaster.pid").exists()

    def test_a_second_signal_ends_it_at_once(self, serve: Callable[..., Serve], pool: ThreadPoolExecutor) -> None:
        one = serve().up()
        request = one.running(pool, "endless", 600)
        one.process.terminate()
        assert "Draining" in one.said("told")
        one.process.terminate()
        assert one.ended() == 130
        assert request.exception() is not None  # type: ignore[attr-defined]

    def test_idle_connections_do_not_hold_it_up(self, serve: Callable[..., Serve]) -> None:
        one = serve().up()
        with (
            socket.create_connection((one.host, one.port)) as silent,
            socket.create_connection((one.host, one.port)) as kept_alive,
        ):
            kept_alive.sendall(b"GET /once HTTP/1.1\r\nHost: test\r\n\r\n")
            assert kept_alive.recv(1000).startswith(b"HTTP/1.1 200")
            one.process.terminate()
            assert one.ended() == 0
            assert silent.recv(1) == b""

    def test_a_signal_before_it_serves(self, serve: Callable[..., Serve]) -> None:
        one = serve(env={"TEST_BEFORE": "hangs"})
        one.said("database")
        one.pids = descendants(one.process.pid)
        one.process.terminate()
        assert one.ended() == 0

    @pytest.mark.parametrize("draining", [False, True])
    def test_its_sudden_death_takes_all_with_it(
        self, serve: Callable[..., Serve], pool: ThreadPoolExecutor, draining: bool
    ) -> None:
        one = serve().up()
        request = one.running(pool, "endless", 600)
        if draining:
            one.process.terminate()
            one.said("told")
        one.process.kill()
        eventually(lambda: not any(map(alive, one.pids)))
        assert request.exception() is not None  # type: ignore[attr-defined]

    def test_the_children_have_sessions_of_their_own(self, serve: Callable[..., Serve]) -> None:
        one = serve().up()
        assert os.getsid(one.gunicorn) == one.gunicorn
        assert os.getsid(one.postmaster) == one.postmaster
        assert set(children(one.process.pid)) == {one.gunicorn, one.postmaster}

    def test_the_application_ends_in_its_own_time(self, patient: Serve) -> None:
        assert patient.ended(LIFESPAN_S + 30) == 0
        assert (patient.folder / "lifespan-ended").exists()


class TestFaults:
    def test_a_killed_database_comes_back_under_its_url(self, serve: Callable[..., Serve]) -> None:
        one = serve().up()
        before = one.postmaster
        with psycopg.connect(one.database.replace("+psycopg", ""), autocommit=True) as connection:
            connection.execute("CREATE TABLE kept AS SELECT 42 AS answer")
            os.kill(before, signal.SIGKILL)
            assert "started again" in one.said("told")
        with attached(one.home) as url:
            assert url == one.database == running_url(one.home)
            with psycopg.connect(url.replace("+psycopg", "")) as connection:
                assert connection.execute("SELECT answer FROM kept").fetchone() == (42,)
        assert one.postmaster != before
        assert one.get("/still") in one.pids

    def test_gunicorn_dies(self, serve: Callable[..., Serve], pool: ThreadPoolExecutor) -> None:
        one = serve().up()
        one.running(pool, "endless", 600)
        os.kill(one.gunicorn, signal.SIGKILL)
        assert "gunicorn" in one.said("error")
        assert one.ended() == 1

    def test_the_application_does_not_start(self, serve: Callable[..., Serve]) -> None:
        for options in ({"app": "nowhere:app"}, {"env": {"TEST_LIFESPAN": "failed"}}):
            one = serve(database_url="none", **options)
            assert "did not start" in one.said("error")
            assert one.ended() == 1

    def test_what_comes_before_fails(self, serve: Callable[..., Serve]) -> None:
        one = serve(env={"TEST_BEFORE": "fails"})
        assert one.said("error") == "the schema is behind"
        assert one.ended() == 1
        assert not (one.home / "postgres/data/postmaster.pid").exists()

    def test_the_port_is_in_use(self, serve: Callable[..., Serve]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            one = serve(port=port)
            assert one.said("error").startswith(f"Cannot listen on 127.0.0.1, port {port}: Address already in use.")
            assert one.ended() == 1
        assert not one.home.exists()

    def test_a_second_one_on_the_same_home(self, serve: Callable[..., Serve]) -> None:
        one = serve().up()
        other = serve()
        assert f"pid {one.process.pid}" in other.said("error")
        assert other.ended() == 1
        assert one.get("/still") in one.pids


class TestServing:
    def test_a_thousand_connections_at_once_are_all_answered(self, serve: Callable[..., Serve]) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, CONNECTIONS + 500)), hard))
        one = serve(database_url="none").up()
        workers = children(one.gunicorn)
        # Nobody accepts, so that every connection has to fit into the backlog.
        for worker in workers:
            os.kill(worker, signal.SIGSTOP)
        sockets = [socket.socket() for _ in range(CONNECTIONS)]
        try:
            for client in sockets:
                client.setblocking(False)
                client.connect_ex((one.host, one.port))
            established(sockets)
            for client in sockets:
                client.sendall(b"GET /burst HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")
            for worker in workers:
                os.kill(worker, signal.SIGCONT)
            for client in sockets:
                client.settimeout(60)
                assert client.recv(1000).startswith(b"HTTP/1.1 200")
        finally:
            for client in sockets:
                client.close()
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    def test_plain_gunicorn_serves_the_same_application(self, serve: Callable[..., Serve], tmp_path: Path) -> None:
        one = serve(database_url="none")
        one.up().process.terminate()
        one.ended()
        plain = subprocess.Popen(
            [sys.executable, "-m", "gunicorn", "-k", "asgi", "-b", "127.0.0.1:0", "--no-control-socket", "app:app"],
            env={**os.environ, "TEST_FOLDER": str(tmp_path), "PYTHONPATH": import_path(tmp_path / "modules")},
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert plain.stderr is not None
        try:
            address = next(
                line.split("Listening at: ")[1].split()[0] for line in plain.stderr if "Listening at" in line
            )
            with urllib.request.urlopen(address + "/plain", timeout=30) as answer:
                assert answer.status == 200
        finally:
            plain.terminate()
            plain.communicate(timeout=30)

    def test_nothing_in_the_current_or_the_home_folder_matters(
        self, serve: Callable[..., Serve], tmp_path: Path
    ) -> None:
        for name in ("gunicorn.conf.py", "secrets.py", "falcon.py", "calendar.py"):
            (tmp_path / name).write_text("raise SystemExit('imported from the current folder')")
        somewhere = tmp_path / "somewhere"
        somewhere.mkdir()
        one = serve(
            database_url="none",
            env={"HOME": str(somewhere), "XDG_RUNTIME_DIR": "", "GUNICORN_CMD_ARGS": "--workers=7"},
        )
        one.up()
        assert len(children(one.gunicorn)) == 2
        one.process.terminate()
        assert one.ended() == 0
        assert list(somewhere.iterdir()) == []


class TestTheFolderOfMetrics:
    def test_it_is_private_and_ends_with_it(self, serve: Callable[..., Serve]) -> None:
        one = serve(database_url="none").up()
        folder = metrics_folder_of(one)
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        one.process.terminate()
        assert one.ended() == 0
        assert not folder.exists()

    def test_that_of_a_killed_one_goes_with_the_next_that_of_a_living_one_stays(
        self, serve: Callable[..., Serve]
    ) -> None:
        killed, living = serve(database_url="none").up(), serve(database_url="none").up()
        left, kept = metrics_folder_of(killed), metrics_folder_of(living)
        killed.process.kill()
        eventually(lambda: not any(map(alive, killed.pids)))
        following = serve(database_url="none").up()
        eventually(lambda: not left.exists())  # Another test's may be at it.
        assert kept.exists()
        assert metrics_folder_of(following) not in {left, kept}

    def test_without_room_in_memory_it_is_elsewhere(self, tmp_path: Path) -> None:
        with metrics_folder(tmp_path / "no memory") as folder:
            assert folder.parent == Path(tempfile.gettempdir())
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert not folder.exists()

    def test_what_others_have_made_is_left_alone(self, tmp_path: Path) -> None:
        strange = [tmp_path / f"{PREFIX}file", tmp_path / f"{PREFIX}link"]
        strange[0].touch()
        strange[1].symlink_to(tmp_path)
        (tmp_path / f"{PREFIX}left" / "more").mkdir(parents=True)
        with metrics_folder(tmp_path) as folder:
            assert set(tmp_path.iterdir()) == {folder, *strange}
        assert set(tmp_path.iterdir()) == set(strange)


def metrics_folder_of(one: Serve) -> Path:
    environment = Path(f"/proc/{children(one.gunicorn)[0]}/environ").read_bytes().split(b"\0")
    [folder] = [line.partition(b"=")[2] for line in environment if line.startswith(b"PROMETHEUS_MULTIPROC_DIR=")]
    return Path(os.fsdecode(folder))


def established(sockets: list[socket.socket]) -> None:
    """Wait until the kernel has taken every one of these connections into the listener's backlog."""
    deadline = time.monotonic() + 20
    with selectors.DefaultSelector() as selector:
        for client in sockets:
            selector.register(client, selectors.EVENT_WRITE)
        while selector.get_map():
            assert time.monotonic() < deadline, f"{len(selector.get_map())} connections found no place"
            for key, _ in selector.select(timeout=1):
                selector.unregister(key.fileobj)
