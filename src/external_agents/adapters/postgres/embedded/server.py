"""
One PostgreSQL server on a folder: made, started, stopped, restarted.

    HOME/postgres/data          the cluster; appears whole, by a rename, or not at all
    HOME/postgres/data.new      a cluster in the making
    HOME/postgres/server.lock   held by every process of the server: each inherits the open file
    HOME/postgres/postgres.log  what the server says; bounded

server.lock tells whether anything of an earlier server still lives, postmaster or orphaned backend, without guessing
from process ids, which are reused. Whoever takes it may remove a stale postmaster.pid. Owning HOME comes first: see
`embedded`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import time
from pathlib import Path
from urllib.parse import quote

import psycopg
from psycopg import sql

from external_agents.adapters.postgres.embedded.account import (
    ROOT,
    Account,
    EmbeddedPostgresError,
    account_for,
)
from external_agents.adapters.postgres.embedded.child_process import ChildProcess
from external_agents.adapters.postgres.embedded.file_lock import FileLock
from external_agents.adapters.postgres.embedded.home import make_server_folder, server_folder, unusable
from external_agents.adapters.postgres.embedded.leftovers import end_leftovers, postmaster_on
from external_agents.adapters.postgres.embedded.log import ServerLog
from external_agents.adapters.postgres.embedded.programs import Programs, binaries
from external_agents.adapters.postgres.embedded.socket_folder import make_socket_dir, remove_socket_dir

DATABASE = "external_agents"
USER = "external_agents"
PORT = 5432
MAX_CONNECTIONS = 200

INIT_TIMEOUT_S = 120.0
START_TIMEOUT_S = 300.0
"""Recovery after a crash replays up to max_wal_size; it is not cut short while the server lives."""
STOP_TIMEOUT_S = 20.0
QUIT_TIMEOUT_S = 5.0
POLL_S = 0.01

SETTINGS = {
    "listen_addresses": "",
    "port": str(PORT),
    "unix_socket_permissions": "0700",
    "max_connections": str(MAX_CONNECTIONS),
    "shared_buffers": "128MB",
    "huge_pages": "off",
    "fsync": "on",
    "full_page_writes": "on",
    "synchronous_commit": "on",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "jit": "off",
    "logging_collector": "off",
    "log_destination": "stderr",
    # A statement that fails is its sender's to report. What is left is rare, and quotes no value.
    "log_min_messages": "log",
    "log_checkpoints": "off",
    "log_autovacuum_min_duration": "-1",
}


def url_of(socket_dir: str) -> str:
    """The SQLAlchemy URL of the database behind a socket folder."""
    return f"postgresql+psycopg://{USER}@/{DATABASE}?host={quote(socket_dir)}&port={PORT}"


def ready_postmaster(home: Path) -> int | None:
    """The pid of the server that postmaster.pid calls ready, as pg_ctl looks for it; the server may be dead since."""
    try:
        lines = (server_folder(home) / "data" / "postmaster.pid").read_text().splitlines()
    except FileNotFoundError:
        return None
    return int(lines[0]) if len(lines) >= 8 and lines[7].strip() == "ready" else None


class EmbeddedPostgres:
    """
    The server on HOME. Only the owner of HOME may have one: see `embedded.owned`.

    It ends with this process. When it ended by itself, `start` brings it back under the same URL.
    """

    def __init__(self, home: Path, *, account: Account | None = None) -> None:
        self._home = home.resolve()
        self._folder = server_folder(self._home)
        self._data = self._folder / "data"
        self._new_data = self._folder / "data.new"
        self._mark = "external-agents-" + hashlib.sha256(os.fsencode(self._data)).hexdigest()[:12]
        self._account = account or account_for(self._data)
        self._log = ServerLog(self._folder / "postgres.log")
        self._programs = Programs(account=self._account, folder=self._folder, log=self._log)
        self._socket_dir: Path | None = None
        self._child: ChildProcess | None = None

    @property
    def socket_dir(self) -> str:
        assert self._socket_dir is not None, "a server has a socket while it is started"
        return str(self._socket_dir)

    @property
    def url(self) -> str:
        return url_of(self.socket_dir)

    @property
    def pid(self) -> int:
        assert self._child is not None, "a server has a pid from its first start on"
        return self._child.pid

    def poll(self) -> int | None:
        """The exit status, or None while it runs. Call it now and then: it also keeps the log bounded."""
        assert self._child is not None, "a server can be polled from its first start on"
        self._log.trim()
        return self._child.poll()

    def start(self) -> str:
        """
        Make the cluster if there is none, bring the server up, and return the URL of its database.

        Raises:
            EmbeddedPostgresError: It did not come up; nothing of it runs.
        """
        try:
            self._child = self._start()
        except OSError as error:
            raise unusable(error) from error
        try:
            self._await_ready(self._child)
            self._make_database()
        except BaseException:
            self._end()
            raise
        return self.url

    def stop(self) -> None:
        """A clean shutdown, a quick one after `STOP_TIMEOUT_S`. Nothing happens when it is not running."""
        self._end()
        if self._socket_dir is not None:
            remove_socket_dir(self._socket_dir)
            self._socket_dir = None

    def _start(self) -> ChildProcess:
        make_server_folder(self._home, self._account)
        lock = FileLock(self._folder / "server.lock")
        if not end_leftovers(self._mark, lock):
            raise EmbeddedPostgresError(
                f"Processes of an earlier PostgreSQL on {self._data} do not end: end them, then try again."
            )
        try:
            self._clear_remains()
            if not self._data.exists():
                self._make_cluster(lock)
            self._socket_dir = make_socket_dir(self._socket_dir, self._mark, self._account)
            return self._programs.start(self._server_command(self._socket_dir), signal.SIGINT, lock)
        finally:
            lock.let_go()

    def _end(self) -> None:
        if self._child is not None:
            self._child.end((signal.SIGINT, STOP_TIMEOUT_S), (signal.SIGQUIT, QUIT_TIMEOUT_S))

    def _clear_remains(self) -> None:
        """Remove what an earlier run left half-done. We hold the server's lock: no server of ours lives."""
        other = postmaster_on(self._data)
        if other is not None:
            raise EmbeddedPostgresError(
                f"A PostgreSQL that was started by hand (pid {other}) runs on {self._data}: stop it, then try again."
            )
        (self._data / "postmaster.pid").unlink(missing_ok=True)
        if self._new_data.exists():
            shutil.rmtree(self._new_data)
        if self._account.kind == "account" and self._data.exists():
            _give_away(self._data, self._account)

    def _make_cluster(self, lock: FileLock) -> None:
        self._new_data.mkdir(mode=0o700)
        if self._account.kind == "account":
            _give_away(self._new_data, self._account)
        command = [
            *(str(binaries() / "initdb"), "--pgdata", str(self._new_data), "--username", USER, "--auth", "trust"),
            *("--encoding", "UTF8", "--locale", "C", "--locale-provider", "builtin", "--builtin-locale", "C.UTF-8"),
        ]
        initdb = self._programs.start(command, signal.SIGKILL, lock)
        try:
            initdb.wait(INIT_TIMEOUT_S)
        finally:
            status = initdb.end()
        if status != 0:
            raise self._programs.failure("PostgreSQL could not make its data folder")
        self._new_data.rename(self._data)
        _sync(self._folder)

    def _server_command(self, socket_dir: Path) -> list[str]:
        settings = {
            **SETTINGS,
            "unix_socket_directories": f'"{socket_dir}"',
            # The operating system shows it with every process of the server: see `leftovers`.
            "cluster_name": self._mark,
        }
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        return [str(binaries() / "postgres"), "-D", str(self._data), *options]

    def _await_ready(self, child: ChildProcess) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while ready_postmaster(self._home) != child.pid:
            if child.wait(POLL_S):
                raise self._programs.failure("PostgreSQL did not start")
            if time.monotonic() > deadline:
                raise self._programs.failure(f"PostgreSQL was not up within {START_TIMEOUT_S:.0f} s")

    def _make_database(self) -> None:
        try:
            with psycopg.connect(
                host=self.socket_dir, port=PORT, user=USER, dbname="postgres", autocommit=True, connect_timeout=30
            ) as connection:
                found = connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [DATABASE]).fetchone()
                if found is None:
                    connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(DATABASE)))
        except psycopg.Error as error:
            line = str(error).strip().splitlines()[0]
            raise EmbeddedPostgresError(f"The embedded database does not answer: {line}") from error


def _give_away(folder: Path, account: Account) -> None:
    """Hand over what belongs to root. Links are not followed, and nobody else's files are touched."""
    for parent, _, files in os.walk(folder):
        for path in (parent, *(os.path.join(parent, name) for name in files)):
            if os.lstat(path).st_uid == ROOT:
                os.chown(path, account.owner_uid, account.owner_gid, follow_symlinks=False)


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
