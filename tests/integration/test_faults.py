"""
`serve` while what it stands on is gone, hangs, or is full: told within seconds, nothing lost or doubled, and all well
again by itself soon after.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import attrs
import httpx
import psutil
import psycopg
import pytest
from psycopg import sql

from agents import Agent, Reply
from external_agents.adapters.postgres.embedded.account import account_for
from postgres_server import PostgresServer, dsn, running_postgres
from redis_server import RedisServer, running_redis
from serve import (
    API,
    Serve,
    agent_document,
    agent_in_thread,
    bearer,
    eventually,
    home_folder,
    is_problem,
    processes_of,
    rows,
    run,
    serving,
)

TOLD_WITHIN_S = 5.0
BACK_WITHIN_S = 10.0
BUSY_MACHINE_S = 1.5
"""What a test machine may take on top."""
UNREACHABLE = {"database": "the database cannot be reached", "schema": "unknown: the database cannot be reached"}


@attrs.frozen
class Scene:
    """
    A serving API on servers of its own.

    Attributes:
        agent_path: Of an agent that has every limit.
    """

    serve: Serve
    key: str
    postgres: PostgresServer
    url: str
    redis: RedisServer
    agent: Agent
    agent_path: str

    def client(self) -> httpx.Client:
        return self.serve.client(self.key)

    def refused(self, *calls: Call) -> None:
        """Each of these calls, many times at once: 503 in time, with the time after which to come again."""

        def answered(call: Call) -> tuple[httpx.Response, float]:
            with self.client() as client:
                began_s = time.monotonic()
                return call(client, self), time.monotonic() - began_s

        with ThreadPoolExecutor(max_workers=32) as pool:
            for answer, took_s in pool.map(answered, calls * 4):
                is_problem(answer, 503)
                assert 1 <= int(answer.headers["Retry-After"]) <= 5
                assert took_s < TOLD_WITHIN_S + BUSY_MACHINE_S, answer.request

    def not_ready(self) -> dict[str, str]:
        """What /readyz says is wrong; the process itself is well."""
        with self.client() as client:
            assert client.get("/healthz").status_code == 200
            checks = is_problem(client.get("/readyz"), 503)["checks"]
        return {name: state for name, state in checks.items() if state != "ok"}

    def is_back(self) -> None:
        """Soon, by itself, and in every worker."""

        def all_well() -> bool:
            with self.client() as client:
                answers = [client.get("/readyz"), *(call(client, self) for call in CALLS)]
            return all(answer.is_success for answer in answers)

        eventually(lambda: all(all_well() for _ in range(4)), BACK_WITHIN_S + BUSY_MACHINE_S)

    def nothing_is_lost_or_doubled(self) -> None:
        """The agent was called once for each invocation that was begun, and each of these has ended well."""
        stored = "SELECT id::text AS id, status FROM external_agent_invocations"
        eventually(lambda: all(row["status"] != "running" for row in rows(self.url, stored)), BACK_WITHIN_S)
        ended = {row["id"]: row["status"] for row in rows(self.url, stored)}
        called = [seen.headers["idempotency-key"] for seen in self.agent.requests]
        assert len(called) == len(set(called))
        assert set(called) == {id_ for id_, status in ended.items() if status == "succeeded"}
        assert set(ended.values()) <= {"succeeded", "unknown"}


Call = Callable[[httpx.Client, Scene], httpx.Response]


def invoke(client: httpx.Client, scene: Scene) -> httpx.Response:
    return client.post(f"{scene.agent_path}/invoke", json={"large": "x" * 20_000})


def read(client: httpx.Client, scene: Scene) -> httpx.Response:
    return client.get(scene.agent_path)


def read_all(client: httpx.Client, scene: Scene) -> httpx.Response:
    return client.get(API)


def read_record(client: httpx.Client, scene: Scene) -> httpx.Response:
    return client.get(f"{scene.agent_path}/invocations")


def change(client: httpx.Client, scene: Scene) -> httpx.Response:
    return client.patch(scene.agent_path, json={"description": "x" * 2000})


def create(client: httpx.Client, scene: Scene) -> httpx.Response:
    return client.post(API, json=agent_document(scene.agent.url, description="x" * 2000))


CALLS: tuple[Call, ...] = (invoke, read, read_all, read_record, change, create)


@contextmanager
def small_disk(size: str) -> Iterator[Path | None]:
    """A folder on a file system of its own that PostgreSQL may use; None where none can be mounted."""
    folder = Path(tempfile.mkdtemp(prefix="xa-disk-"))
    try:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            yield None
            return
        try:
            account = account_for(folder)
            if account.kind == "account":
                os.chown(folder, account.uid, account.gid)
            yield folder
        finally:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
    finally:
        folder.rmdir()


@pytest.fixture(scope="module")
def disk() -> Iterator[Path | None]:
    with small_disk("64m") as folder:
        yield folder


@pytest.fixture(scope="module")
def scene(disk: Path | None) -> Iterator[Scene]:
    """Its database's tables lie on a disk of their own, where there is one; the server's log of changes does not."""
    with ExitStack() as stack:
        home = stack.enter_context(home_folder())
        agent = stack.enter_context(agent_in_thread())
        redis = stack.enter_context(running_redis())
        postgres = stack.enter_context(running_postgres(synchronous_commit="on", max_connections="30"))
        if disk is not None:
            postgres.execute(sql.SQL("CREATE TABLESPACE small LOCATION {}").format(sql.Literal(str(disk))))
        postgres.execute(sql.SQL("CREATE DATABASE faults TABLESPACE {}").format(
            sql.Identifier("pg_default" if disk is None else "small")
        ))  # fmt: skip
        url = postgres.url("faults")
        env = {
            "DATABASE_URL": url,
            "REDIS_URL": redis.url,
            "SECRET_KEYS": f"k1:{base64.b64encode(bytes(32)).decode()}",
            "EGRESS_ALLOW": "loopback",
        }
        assert run("migrate", home=home, env=env).returncode == 0
        made = run("keys", "create", "--org", "acme", "--subject", "tests", "--json", home=home, env=env)
        key = json.loads(made.stdout)["key"]
        serve = stack.enter_context(serving(home, env=env))
        document = agent_document(
            agent.url,
            max_attempts=1,
            rate_limit_config={"requests_per_day": 1_000_000},
            budget_config={"max_cost_per_invocation": "0.01", "max_monthly_cost": 1_000_000},
        )
        with serve.client(key) as client:
            created = client.post(API, json=document)
        assert created.status_code == 201, created.text
        scene = Scene(serve, key, postgres, url, redis, agent, f"{API}/{created.json()['id']}")
        scene.is_back()
        yield scene
        assert "Traceback" not in serve.stdout + serve.stderr


class TestPostgres:
    def test_it_is_killed(self, scene: Scene) -> None:
        scene.postgres.crash()
        scene.refused(*CALLS)
        assert scene.not_ready() == UNREACHABLE
        scene.postgres.restart()
        scene.is_back()
        scene.nothing_is_lost_or_doubled()

    def test_it_stands_still(self, scene: Scene) -> None:
        """Its connections stay open and new ones are taken; nothing is ever answered."""
        with scene.postgres.standing_still():
            scene.refused(*CALLS)
            assert scene.not_ready() == UNREACHABLE
            scene.refused(*CALLS)
        scene.is_back()
        scene.nothing_is_lost_or_doubled()

    def test_it_is_killed_while_an_agent_works(self, scene: Scene) -> None:
        may_answer = asyncio.Event()
        scene.agent.answers(Reply(wait_for=may_answer), Reply())
        before = len(scene.agent.requests)
        with ThreadPoolExecutor() as pool, scene.client() as client:
            running = pool.submit(invoke, client, scene)
            eventually(lambda: len(scene.agent.requests) > before, TOLD_WITHIN_S)
            scene.postgres.crash()
            began_s = time.monotonic()
            may_answer._loop.call_soon_threadsafe(may_answer.set)  # type: ignore[attr-defined]
            problem = is_problem(running.result(), 503)
            assert time.monotonic() - began_s < TOLD_WITHIN_S + BUSY_MACHINE_S
            scene.postgres.restart()
            path = f"{scene.agent_path}/invocations/{problem['invocation_id']}"
            eventually(lambda: client.get(path).is_success, BACK_WITHIN_S)
            eventually(lambda: client.get(path).json()["status"] == "succeeded", BACK_WITHIN_S)
        assert len(scene.agent.requests) == before + 1
        scene.is_back()
        scene.nothing_is_lost_or_doubled()

    def test_it_has_no_connection_left(self, scene: Scene) -> None:
        with all_connections_taken(scene.url):
            scene.refused(*CALLS)
            assert scene.not_ready() == UNREACHABLE
        scene.is_back()
        scene.nothing_is_lost_or_doubled()

    def test_its_disk_is_full(self, scene: Scene, disk: Path | None) -> None:
        if disk is None:
            pytest.skip("no file system can be mounted here")
        filler = disk / "filler"
        fill(filler)
        try:
            until_no_page_has_room(scene)
            scene.refused(invoke, create)
            says_that_its_disk_is_full(scene)
            with scene.client() as client:
                assert read(client, scene).status_code == 200
        finally:
            filler.unlink()
        scene.is_back()
        scene.nothing_is_lost_or_doubled()

    def test_it_says_that_its_disk_is_full(self, scene: Scene) -> None:
        """The server's own error, for machines on which no file system can be mounted."""
        full = """
            CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN RAISE EXCEPTION 'could not extend file' USING ERRCODE = 'disk_full'; END $$;
            CREATE TRIGGER full_disk BEFORE INSERT ON external_agent_invocations EXECUTE FUNCTION full_disk();
            CREATE TRIGGER full_disk BEFORE INSERT ON external_agents EXECUTE FUNCTION full_disk()
        """
        with psycopg.connect(dsn(scene.url), autocommit=True) as connection:
            connection.execute(full)
            try:
                scene.refused(invoke, create)
                says_that_its_disk_is_full(scene)
            finally:
                connection.execute("DROP FUNCTION full_disk CASCADE")
        scene.is_back()
        scene.nothing_is_lost_or_doubled()


class TestRedis:
    def test_it_is_killed(self, scene: Scene) -> None:
        scene.redis.kill()
        scene.refused(invoke)
        assert scene.not_ready() == {"redis": "Redis cannot be reached"}
        self.what_needs_no_limit_goes_on(scene)
        scene.redis.start()
        scene.is_back()
        scene.nothing_is_lost_or_doubled()

    def test_it_stands_still(self, scene: Scene) -> None:
        scene.redis.pause()
        try:
            scene.refused(invoke)
            assert scene.not_ready() == {"redis": "Redis cannot be reached"}
            self.what_needs_no_limit_goes_on(scene)
        finally:
            scene.redis.resume()
        scene.is_back()
        scene.nothing_is_lost_or_doubled()

    def what_needs_no_limit_goes_on(self, scene: Scene) -> None:
        with scene.client() as client:
            for call in (read, read_all, read_record, change, create):
                assert call(client, scene).is_success


def test_the_embedded_database_is_killed() -> None:
    """It comes back; and where it cannot, all ends clearly, instead of a `serve` that answers 503 for ever."""
    with home_folder() as home, agent_in_thread() as agent, serving(home, "--dev") as serve:
        with serve.client() as client:
            path = f"{API}/{client.post(API, json=agent_document(agent.url)).json()['id']}/invoke"
            for round_ in range(2):
                assert client.post(path, json={}).status_code == 200
                os.kill(postmaster_of(home), signal.SIGKILL)
                eventually(
                    lambda: client.get("/readyz").is_success and client.post(path, json={}).is_success,
                    BACK_WITHIN_S + BUSY_MACHINE_S,
                )
                assert serve.stderr.count("is started again") == round_ + 1
        [stored] = serve.sql("SELECT count(*) FROM external_agent_invocations WHERE status = 'succeeded'")
        assert stored == {"count": len(agent.requests)}

        (home / "postgres/data/PG_VERSION").write_text("8.4\n")
        os.kill(postmaster_of(home), signal.SIGKILL)
        assert serve.wait(within_s=60) == 1
        assert "The embedded PostgreSQL could not be started again" in serve.stderr
        assert "Traceback" not in serve.stderr
        assert processes_of(home) == []


def postmaster_of(home: Path) -> int:
    pid = int((home / "postgres/data/postmaster.pid").read_text().split()[0])
    assert psutil.pid_exists(pid)
    return pid


@contextmanager
def all_connections_taken(url: str) -> Iterator[None]:
    """By another application, and the API's own are gone: as after a failover to a server that others reach first."""
    end_ours = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'external-agents'"
    with ExitStack() as held:
        superuser = held.enter_context(psycopg.connect(dsn(url), autocommit=True))
        for _ in range(3):
            superuser.execute(end_ours)
            with suppress(psycopg.OperationalError):
                while True:
                    held.enter_context(psycopg.connect(dsn(url), connect_timeout=10))
        yield


def says_that_its_disk_is_full(scene: Scene) -> None:
    """Any worker that was just refused."""
    full = {"database": "the database has no disk space left"}

    def said() -> bool:
        with scene.client() as client:
            is_problem(create(client, scene), 503)
            checks = client.get("/readyz").json()["checks"]
        return {name: state for name, state in checks.items() if state != "ok"} == full

    eventually(said, TOLD_WITHIN_S)


def fill(file: Path) -> None:
    """To the last byte of its file system."""
    with file.open("wb", buffering=0) as filler, suppress(OSError):
        while True:
            filler.write(bytes(65536))


def until_no_page_has_room(scene: Scene) -> None:
    """Pages that exist already take some rows yet, and every connection of the server has its own."""

    def status(call: Call) -> int:
        with scene.client() as client:
            return call(client, scene).status_code

    with ThreadPoolExecutor(max_workers=32) as pool:
        eventually(lambda: set(pool.map(status, (invoke, create) * 16)) == {503}, 30.0, every_s=0.0)


def test_an_unknown_key_is_refused_without_the_database(scene: Scene) -> None:
    with scene.postgres.standing_still(), scene.client() as client:
        assert client.get(API, headers=bearer("xa_nobody")).status_code == 401
