"""A real PostgreSQL for tests: in a temporary folder, on a unix socket, gone with the test run however that ends."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeAlias
from urllib.parse import quote
from uuid import uuid4

import psycopg
from psycopg import sql
from sqlalchemy.ext.asyncio import AsyncEngine

from external_agents.adapters.postgres.embedded.account import account_for
from external_agents.adapters.postgres.embedded.child_process import ChildProcess, Launch
from external_agents.adapters.postgres.embedded.server import binaries

OpenEngine: TypeAlias = Callable[..., AsyncEngine]
"""The fixture `open_engine`: `create_engine`, and what was opened is closed after the test."""

USER = "external_agents"
TIMEOUT_S = 60.0

# A server that is thrown away need not survive a power cut. Everything that a client can tell is as it is anywhere.
SETTINGS = {
    "listen_addresses": "",
    "max_connections": "200",
    "fsync": "off",
    "full_page_writes": "off",
    "synchronous_commit": "off",
    "shared_buffers": "64MB",
    "autovacuum_naptime": "5s",
}


class PostgresServer:
    """
    Its databases; `url` is SQLAlchemy's.

    What is killed or stopped here is started or continued here, too: other tests use the same server, unless it is one
    of your own (`running_postgres`).
    """

    def __init__(self, folder: Path, launch: Callable[[], ChildProcess]) -> None:
        self.folder = folder
        self._launch = launch
        self.process = launch()
        _await(folder, self.process)

    def url(self, database: str) -> str:
        return f"postgresql+psycopg://{USER}@/{database}?host={quote(str(self.folder))}"

    def execute(self, statement: sql.Composable) -> None:
        with psycopg.connect(
            host=str(self.folder), user=USER, dbname="postgres", autocommit=True, connect_timeout=10
        ) as connection:
            connection.execute(statement)

    @contextmanager
    def database(self, template: str = "template1") -> Iterator[str]:
        """The name of a new database, which is gone afterwards, whoever is still connected."""
        name = f"test_{uuid4().hex}"
        self.execute(sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(name), sql.Identifier(template)))
        try:
            yield name
        finally:
            self.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))

    @contextmanager
    def role(self) -> Iterator[str]:
        """The name of a new role that may log in, and no more. Its databases must be gone before the end."""
        name = f"role_{uuid4().hex}"
        self.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(name)))
        try:
            yield name
        finally:
            self.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(name)))

    def crash(self) -> None:
        """Without a word: kill -9. Its children end by themselves."""
        left = self._pids()
        os.kill(left[0], signal.SIGKILL)
        self.process.wait(TIMEOUT_S)
        for _ in range(int(TIMEOUT_S / 0.02)):
            if not any(Path(f"/proc/{pid}").exists() for pid in left):
                return
            time.sleep(0.02)
        raise RuntimeError("PostgreSQL's children outlive it")

    def restart(self) -> None:
        """After a crash."""
        (self.folder / "data" / "postmaster.pid").unlink()
        self.process = self._launch()
        _await(self.folder, self.process)

    @contextmanager
    def standing_still(self) -> Iterator[None]:
        """SIGSTOP: its connections stay open, and nothing answers."""
        pids = self._pids()
        try:
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            yield
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)

    def _pids(self) -> list[int]:
        """The postmaster, and its children."""
        postmaster = int((self.folder / "data" / "postmaster.pid").read_text().split()[0])
        children = Path(f"/proc/{postmaster}/task/{postmaster}/children").read_text().split()
        return [postmaster, *map(int, children)]


@contextmanager
def running_postgres(**settings: str) -> Iterator[PostgresServer]:
    """
    A server of the embedded binaries, or of those in the folder that EXTERNAL_AGENTS_TEST_PG_BIN names.

    It refuses to be root, so for root it runs in a user namespace or as `nobody`, like the embedded one.

    Args:
        settings: The server's own, beside SETTINGS.
    """
    folder = Path(tempfile.mkdtemp(prefix="xa-pg-"))
    try:
        account = account_for(folder)
        if account.kind == "account":
            os.chown(folder, account.uid, account.gid)
        environment = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
        programs = Path(os.environ.get("EXTERNAL_AGENTS_TEST_PG_BIN") or binaries())
        with (folder / "log").open("wb") as log:

            def launch(*argv: str) -> ChildProcess:
                return ChildProcess(
                    Launch(
                        argv=argv,
                        death_signal=signal.SIGQUIT,
                        account=account.launch_form,
                        env={**environment, "LC_ALL": "C", "TZ": "UTC"},
                        cwd="/",
                        umask=0o077,
                        output_fd=log.fileno(),
                    )
                )

            cluster = str(folder / "data")
            initdb = launch(
                *(str(programs / "initdb"), "--pgdata", cluster, "--username", USER, "--auth", "trust"),
                *("--encoding", "UTF8", "--locale", "C", "--no-sync"),
            )
            if not initdb.wait(TIMEOUT_S) or initdb.poll() != 0:
                initdb.end()
                raise RuntimeError(f"initdb failed:\n{(folder / 'log').read_text()}")
            options = [word for name, value in (SETTINGS | settings).items() for word in ("-c", f"{name}={value}")]
            server = PostgresServer(
                folder, lambda: launch(str(programs / "postgres"), "-D", cluster, "-k", str(folder), *options)
            )
            try:
                yield server
            finally:
                server.process.end((signal.SIGINT, 20.0), (signal.SIGQUIT, 5.0))
    finally:
        shutil.rmtree(folder)


def _await(folder: Path, process: ChildProcess) -> None:
    for _ in range(int(TIMEOUT_S / 0.02)):
        try:
            lines = (folder / "data" / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            lines = []
        if len(lines) >= 8 and lines[7].strip() == "ready":
            return
        if process.wait(0.02):
            break
    log = (folder / "log").read_text()
    process.end((signal.SIGINT, 20.0), (signal.SIGQUIT, 5.0))
    raise RuntimeError(f"PostgreSQL did not start:\n{log}")


class ShiftedClock:
    """
    A database's own clock, set forward as a test wishes: it stands before the real one in the search path of `url`.

    The server has been up since `server_started_at` as far as its users can tell.
    """

    def __init__(self, url: str) -> None:
        self.url = f"{url}&options={quote('-c search_path=shifted,pg_catalog,public')}"
        self._dsn = dsn(url)
        self._shift = timedelta()
        with psycopg.connect(self._dsn) as connection:
            connection.execute(_SHIFTED)

    def now(self) -> datetime:
        return datetime.now(UTC) + self._shift

    async def pass_time(self, seconds: float) -> None:
        self._shift += timedelta(seconds=seconds)
        await self._set("shift", self._shift)

    async def restart_server(self) -> None:
        await self._set("server_started_at", self.now())

    async def _set(self, column: str, value: object) -> None:
        async with await psycopg.AsyncConnection.connect(self._dsn) as connection:
            statement = sql.SQL("UPDATE shifted.clock SET {} = %s").format(sql.Identifier(column))
            await connection.execute(statement, [value])


LOCK_AGENT = "SELECT FROM external_agent_rate_windows WHERE org_id = %s AND agent_id = %s FOR UPDATE"
"""Keeps every admission of an agent waiting."""


def dsn(url: str) -> str:
    """The URL as psycopg takes it."""
    return url.replace("+psycopg", "")


def as_role(url: str, role: str) -> str:
    """The URL for another role than the one that owns everything."""
    return url.replace(f"://{USER}@", f"://{role}@", 1)


async def wait_for_lock(url: str, waiters: int = 1) -> None:
    """Until so many statements in the database wait for a lock."""
    waiting = "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    async with (
        asyncio.timeout(TIMEOUT_S),
        await psycopg.AsyncConnection.connect(dsn(url), autocommit=True) as connection,
    ):
        while (await connection.execute(waiting)).rowcount < waiters:
            pass


_SHIFTED = """
    CREATE SCHEMA shifted;
    CREATE TABLE shifted.clock (shift interval NOT NULL, server_started_at timestamptz NOT NULL);
    INSERT INTO shifted.clock VALUES ('0', pg_postmaster_start_time() - interval '1 hour');
    GRANT USAGE ON SCHEMA shifted TO PUBLIC;
    GRANT SELECT ON shifted.clock TO PUBLIC;
    CREATE FUNCTION shifted.clock_timestamp() RETURNS timestamptz VOLATILE
        RETURN pg_catalog.clock_timestamp() + (SELECT shift FROM shifted.clock);
    CREATE FUNCTION shifted.pg_postmaster_start_time() RETURNS timestamptz STABLE
        RETURN (SELECT server_started_at FROM shifted.clock);
    DO $$
    DECLARE
        function regprocedure;
    BEGIN
        -- Those that run as the tables' owner have a search path of their own.
        FOR function IN
            SELECT oid FROM pg_proc WHERE prosecdef AND pronamespace = 'public'::regnamespace
        LOOP
            EXECUTE format('ALTER FUNCTION %s SET search_path = shifted, pg_catalog, public', function);
        END LOOP;
    END
    $$;
"""


def psql_dump(url: str) -> bytes:
    """Everything in a database, as text."""
    programs = Path(os.environ.get("EXTERNAL_AGENTS_TEST_PG_BIN") or binaries())
    return subprocess.run([str(programs / "pg_dump"), "--dbname", dsn(url)], check=True, capture_output=True).stdout
