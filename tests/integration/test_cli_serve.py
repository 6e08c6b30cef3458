"""`serve` and its neighbours: external databases, refusals, egress, a server of the operator's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from external_agents.adapters.postgres.schema import pending
from own_gunicorn import end, own_gunicorn, start_gunicorn
from postgres_server import PostgresServer
from serve import (
    API,
    START_S,
    agent_document,
    agent_in_thread,
    bearer,
    home_folder,
    is_problem,
    run,
    serving,
)

SECRET_KEYS = "k1:MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="


@pytest.fixture
def home() -> Iterator[Path]:
    with home_folder() as folder:
        yield folder


@pytest.fixture
def empty_url(postgres_server: PostgresServer) -> Iterator[str]:
    """A database without our schema."""
    with postgres_server.database() as name:
        yield postgres_server.url(name)


def test_an_external_database_is_migrated_by_migrate_alone(home: Path, empty_url: str) -> None:
    env = {"DATABASE_URL": empty_url.replace("+psycopg", ""), "SECRET_KEYS": SECRET_KEYS}

    behind = run("migrate", "--check", home=home, env=env)
    assert (behind.returncode, behind.stderr) == (1, "")
    assert behind.stdout.startswith("behind by ")

    refused = run("serve", "--port", "0", home=home, env=env)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "external-agents migrate" in refused.stderr.splitlines()[-1]
    checked = run("check", home=home, env=env)
    assert checked.returncode == 1
    assert "external-agents migrate" in checked.stdout
    assert pending(empty_url), "nothing but `migrate` has migrated it"

    migrated = run("migrate", home=home, env=env)
    assert migrated.returncode == 0, migrated.stderr
    assert migrated.stdout.startswith("migrated: ")
    for command in ("migrate", "--check"), ("migrate",):
        done = run(*command, home=home, env=env)
        assert (done.returncode, done.stdout) == (0, "up to date\n")

    with serving(home, env=env) as serve:
        assert httpx.get(f"{serve.address}/readyz").status_code == 200
        assert "--dev" not in serve.stdout
        assert "export KEY" not in serve.stdout
    assert not home.exists(), "an external database needs no HOME"


def test_a_second_serve_and_a_port_in_use_are_refused_in_one_line(home: Path) -> None:
    with serving(home) as serve:
        second = run("serve", "--port", "0", home=home)
        assert (second.returncode, second.stdout) == (1, "")
        [line] = second.stderr.splitlines()
        assert "serve already runs" in line
        assert str(serve.pid) in line
        assert "EXTERNAL_AGENTS_HOME" in line
        assert httpx.get(f"{serve.address}/readyz").status_code == 200
        with home_folder() as other:
            port = serve.address.rpartition(":")[2]
            taken = run("serve", "--port", port, home=other)
            assert (taken.returncode, taken.stdout) == (1, "")
            [line] = taken.stderr.splitlines()
            assert port in line
            assert "--port" in line
            assert not (other / "postgres").exists(), "it looks before it makes a database"


def test_without_dev_agents_on_this_machine_are_refused(home: Path) -> None:
    """Also where they were registered while they were allowed: what is allowed is judged at every call."""
    with agent_in_thread() as agent:
        made = run(
            *("agents", "create", "--org", "acme", "--json"),
            home=home,
            env={"EGRESS_ALLOW": "loopback"},
            stdin=f'{{"name": "Echo", "provider": "custom", "webhook_url": "{agent.url}", "auth_type": "none"}}',
        )
        assert made.returncode == 0, made.stderr
        agent_id = made.stdout.split('"id":"')[1][:36]
        with serving(home) as serve:
            key = run("keys", "create", "--org", "acme", "--subject", "ci", home=home).stdout.strip()
            with serve.client(key) as client:
                for url in (
                    agent.url,
                    "https://127.0.0.1/",
                    "https://localhost/",
                    "https://10.0.0.1/",
                    "https://[::1]/",
                ):
                    problem = is_problem(client.post(API, json=agent_document(url)), 400)
                    assert [fault["path"] for fault in problem["errors"]] == ["webhook_url"], url
                problem = is_problem(client.post(f"{API}/{agent_id}/invoke", json={}), 502)
                invocation = problem["invocation"]
                assert (invocation["status"], invocation["error_code"]) == ("failed", "egress_refused")
                assert invocation["cost"] is None
                assert len(invocation["attempts"]) == 1, "refused egress is not tried again"
        assert agent.connections == 0, "nothing was even connected to"


def test_gunicorn_beside_a_running_embedded_serve(home: Path) -> None:
    with serving(home, "--dev") as serve, own_gunicorn(home) as address:
        answer = httpx.get(f"{address}{API}", headers=bearer(serve.key))
        assert (answer.status_code, answer.json()["total"]) == (200, 0)
        with serve.client() as client:
            assert client.post(API, json=agent_document("http://127.0.0.1:1/")).status_code == 201
        assert httpx.get(f"{address}{API}", headers=bearer(serve.key)).json()["total"] == 1


def test_gunicorn_with_an_external_database(home: Path, postgres_url: str) -> None:
    env = {"DATABASE_URL": postgres_url, "SECRET_KEYS": SECRET_KEYS}
    key = run("keys", "create", "--org", "acme", "--subject", "ci", home=home, env=env).stdout.strip()
    with own_gunicorn(home, env) as address:
        assert httpx.get(f"{address}{API}", headers=bearer(key)).status_code == 200
        assert httpx.get(f"{address}/readyz").status_code == 200


def test_gunicorn_without_a_running_database_says_so(home: Path) -> None:
    process, _, log = start_gunicorn(home, {})
    try:
        assert process.wait(START_S) != 0
        text = log.read_text()
        assert "start `external-agents serve`, or set EXTERNAL_AGENTS_DATABASE_URL" in text
        assert "Traceback" not in text
    finally:
        end(process)
