"""The commands that work on the database: beside a running `serve`, and alone."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest

from agents import Reply
from serve import API, Serve, agent_in_thread, bearer, eventually, home_folder, is_problem, processes_of, run, serving

REVOKED_WITHIN_S = 2.0
LOOPBACK = {"EGRESS_ALLOW": "loopback"}
UNKNOWN_ID = "019ab0c5-7a52-7f3e-9c1d-2b8f4a6e0d13"
PERMISSIONS = [f"{action}:external_agent" for action in ("create", "delete", "invoke", "read", "update")]

beside = pytest.mark.xdist_group("cli beside serve")


@pytest.fixture(scope="module")
def serve() -> Iterator[Serve]:
    with home_folder() as home, serving(home, "--dev") as running:
        yield running


@pytest.fixture
def home() -> Iterator[Path]:
    with home_folder() as folder:
        yield folder


def succeed(*arguments: str, home: Path, stdin: str = "", env: dict[str, str] | None = None) -> str:
    """What the command printed."""
    done = run(*arguments, home=home, stdin=stdin, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def succeed_json(*arguments: str, home: Path, stdin: str = "", env: dict[str, str] | None = None) -> dict[str, Any]:
    done = run(*arguments, "--json", home=home, stdin=stdin, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1, "one line, for programs"
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def fields_of(shown: str) -> dict[str, str]:
    """What a command without --json shows, one field a line."""
    return {name: value.lstrip() for name, _, value in (line.partition(" ") for line in shown.splitlines())}


def failure(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of a command that failed."""
    assert (done.returncode, done.stdout) == (1, "")
    [line] = done.stderr.splitlines()
    assert line.startswith("external-agents: ")
    return line


@beside
def test_keys_are_made_listed_and_revoked_beside_a_running_serve(serve: Serve) -> None:
    made = succeed_json(
        *("keys", "create", "--org", "acme", "--subject", "ci", "--expires-in", "90d"),
        *("--permission", "read:external_agent", "--permission", "create:external_agent"),
        *("--attribute", "team=ops", "--attribute", "note=a=b"),
        home=serve.home,
    )
    expires_at = datetime.fromisoformat(made["expires_at"])
    assert abs(expires_at - datetime.now(UTC) - timedelta(days=90)) < timedelta(minutes=10)
    assert made == {
        "id": str(UUID(made["id"])),
        "key": made["key"],
        "org_id": "acme",
        "subject": "ci",
        "permissions": ["create:external_agent", "read:external_agent"],
        "attributes": {"team": "ops", "note": "a=b"},
        "expires_at": made["expires_at"],
    }
    with serve.client(made["key"]) as client:
        assert client.get(API).status_code == 200
        is_problem(client.post(f"{API}/{UNKNOWN_ID}/invoke", json={}), 404)

        plain = run("keys", "create", "--org", "acme", "--subject", "all", home=serve.home)
        assert plain.returncode == 0
        [key] = plain.stdout.splitlines()
        assert "shown this once" in plain.stderr
        assert key not in plain.stderr
        assert client.get(API, headers={"Authorization": f"Bearer {key}"}).status_code == 200

        listed = succeed_json("keys", "list", "--org", "acme", home=serve.home)["items"]
        assert [item["subject"] for item in listed] == ["all", "ci"], "newest first"
        assert listed[0]["permissions"] == PERMISSIONS
        assert listed[0]["expires_at"] is None
        described = {name: value for name, value in made.items() if name != "key"}
        used_at = eventually(lambda: _last_used(serve, made["id"]), 30)
        assert abs(datetime.fromisoformat(used_at) - datetime.now(UTC)) < timedelta(minutes=10)
        assert listed[1] == {**described, "revoked_at": None, "last_used_at": listed[1]["last_used_at"]}

        assert succeed("keys", "revoke", made["id"], home=serve.home) == ""
        eventually(lambda: client.get(API).status_code == 401, REVOKED_WITHIN_S)
    for _ in range(20):  # each over a connection of its own, so over all workers
        assert httpx.get(f"{serve.address}{API}", headers=bearer(made["key"])).status_code == 401

    table = succeed("keys", "list", "--org", "acme", home=serve.home).splitlines()
    assert table[0].split() == ["id", "subject", "permissions", "expires", "revoked", "used"]
    assert [line.split()[:2] for line in table[1:]] == [[listed[0]["id"], "all"], [made["id"], "ci"]]
    assert "never" in table[1]
    assert made["key"] not in "".join(table)
    assert "No such API key" in failure(run("keys", "revoke", UNKNOWN_ID, home=serve.home))


def _last_used(serve: Serve, key_id: str) -> str | None:
    listed = succeed_json("keys", "list", "--org", "acme", home=serve.home)["items"]
    [used_at] = [item["last_used_at"] for item in listed if item["id"] == key_id]
    return str(used_at) if used_at else None


@beside
def test_agents_are_registered_changed_and_deleted_beside_a_running_serve(serve: Serve, tmp_path: Path) -> None:
    home = serve.home
    document = {
        "name": "Räuber [bold]",
        "provider": "slack",
        "platform_config": {"webhook_url": "https://slack.example.com/s3cret", "channel": "#x"},
        "webhook_url": "https://agent.example.com/",
        "auth_type": "bearer",
        "auth_config": {"token": "s3cret"},
        "signing_secret": f"whsec_s3cret{'A' * 26}",
    }
    (tmp_path / "agent.json").write_text(json.dumps(document))
    made = succeed_json("agents", "create", "--org", "dev", f"@{tmp_path / 'agent.json'}", home=home)
    assert made["created_by"].startswith("operator:")
    assert "s3cret" not in str(made)
    agent_id = made["id"]
    with serve.client() as client:
        assert client.get(f"{API}/{agent_id}").json() == made, "the API and the terminal show the same"

    fields = fields_of(succeed("agents", "show", agent_id, "--org", "dev", home=home))
    assert fields["name"] == "Räuber [bold]"
    assert json.loads(fields["platform_config"]) == {"channel": "#x"}
    assert set(fields) == set(made)

    listed = run("agents", "list", "--org", "dev", "--provider", "slack", home=home)
    header, row = listed.stdout.splitlines()
    assert header.split() == ["id", "name", "provider", "status", "webhook_url"]
    assert row.split() == [agent_id, "Räuber", "[bold]", "slack", "active", "https://agent.example.com/"]
    assert listed.stderr == "page 1 of 1, 1 in all\n"
    assert succeed_json("agents", "list", "--org", "other", home=home)["items"] == []

    changes = f'{{"status": "inactive", "signing_secret": "whsec_s3cret{"B" * 26}"}}'
    changed = succeed_json("agents", "update", agent_id, "--org", "dev", changes, home=home)
    assert (changed["status"], changed["version"]) == ("inactive", 2)
    assert "s3cret" not in str(changed)
    sealed = serve.sql("SELECT field FROM external_agent_secrets WHERE agent_id = %s", agent_id)
    assert {"signing_secret", "signing_secret.previous"} <= {row["field"] for row in sealed}
    assert "inactive" in failure(run("invoke", agent_id, "--org", "dev", "{}", home=home))

    assert "No such agent" in failure(run("agents", "show", agent_id, "--org", "other", home=home))
    assert succeed("agents", "delete", agent_id, "--org", "dev", home=home) == ""
    assert "No such agent" in failure(run("agents", "delete", agent_id, "--org", "dev", home=home))
    deleted = succeed_json("agents", "list", "--org", "dev", "--status", "deleted", home=home)
    assert [item["id"] for item in deleted["items"]] == [agent_id]


@beside
def test_a_faulty_document_is_one_line_for_each_fault(serve: Serve) -> None:
    done = run("agents", "create", "--org", "dev", '{"name": "", "provider": "teams"}', home=serve.home)
    assert (done.returncode, done.stdout) == (1, "")
    paths = {line.split(": ")[1] for line in done.stderr.splitlines()}
    assert paths == {"name", "webhook_url", "auth_type", "auth_config", "platform_config"}


@beside
def test_agents_are_invoked_and_the_record_read_beside_a_running_serve(serve: Serve) -> None:
    home, org = serve.home, f"shell-{uuid4().hex}"
    with agent_in_thread(Reply(body=b'{"big": 12345678901234567890123}')) as agent:
        document = {"name": "E", "provider": "custom", "webhook_url": agent.url, "auth_type": "none", "max_attempts": 1}
        create = ("agents", "create", "--org", org)
        made = succeed_json(*create, home=home, stdin=json.dumps(document), env=LOOPBACK)
        invoke = ("invoke", made["id"], "--org", org)
        assert succeed(*invoke, '{"a":  1}', home=home, env=LOOPBACK) == '{"big": 12345678901234567890123}\n'
        record = succeed_json(*invoke, home=home, stdin="[1.10]", env=LOOPBACK)
        assert [seen.body for seen in agent.requests] == [b'{"a":  1}', b"[1.10]"]
        agent.answers(Reply(500, body=b'"broken"'))
        failed = run(*invoke, "{}", home=home, env=LOOPBACK)
        assert (failed.returncode, failed.stdout) == (1, '"broken"\n'), "what it answered is a result all the same"
        [line] = failed.stderr.splitlines()
        assert "http_status" in line
        refused = failure(run(*invoke, "{}", home=home))
        assert "egress_refused" in refused
        assert "EXTERNAL_AGENTS_EGRESS_ALLOW" in refused, "it counts for the command, not for the serve beside it"
        assert len(agent.requests) == 3
        keyed = ("--idempotency-key", "order-17", *invoke[1:], '{"a": 1}')
        agent.answers(Reply(body=b'"first"'), Reply(body=b'"second"'))
        assert succeed("invoke", *keyed, home=home, env=LOOPBACK) == '"first"\n'
        again = run("invoke", *keyed, home=home, env=LOOPBACK)
        assert (again.returncode, again.stdout) == (0, '"first"\n')
        assert "was not called" in again.stderr
        assert len(agent.requests) == 4
        assert "another payload" in failure(run("invoke", *keyed[:-1], "{}", home=home, env=LOOPBACK))

    usage = ("agents", "usage", made["id"], "--org", org)
    assert succeed_json(*usage, home=home) == {
        "rate_limit": {"minute": None, "hour": None, "day": None},
        "budget": None,
    }
    assert fields_of(succeed(*usage, home=home)) == {"minute": "null", "hour": "null", "day": "null", "budget": "null"}
    listed = succeed_json("invocations", "list", "--org", org, "--limit", "4", home=home)
    assert [item["status"] for item in listed["items"]] == ["succeeded", "failed", "failed", "succeeded"]
    assert listed["items"][3] == record
    more = ("invocations", "list", "--org", org, "--cursor", listed["next_cursor"])
    assert [item["request_payload"] for item in succeed_json(*more, home=home)["items"]] == [{"a": 1}]
    table = run("invocations", "list", "--org", org, "--status", "succeeded", home=home).stdout.splitlines()
    assert table[0].split() == ["id", "agent", "status", "created", "ms", "cost"]
    assert [line.split()[2] for line in table[1:]] == ["succeeded", "succeeded", "succeeded"]
    show = ("invocations", "show", made["id"], record["id"], "--org", org)
    assert succeed_json(*show, home=home) == record
    fields = fields_of(succeed(*show, home=home))
    assert fields["response_payload"] == '{"big": 12345678901234567890123}'
    assert set(fields) == set(record)
    assert "No such invocation" in failure(run("invocations", "show", made["id"], UNKNOWN_ID, "--org", org, home=home))
    assert "since" in failure(run("invocations", "list", "--org", org, "--since", "yesterday", home=home))


@beside
def test_migrate_and_check_beside_a_running_serve(serve: Serve) -> None:
    assert succeed("migrate", "--check", home=serve.home) == "up to date\n"
    assert succeed("migrate", home=serve.home) == "up to date\n"
    looked = succeed("check", home=serve.home).splitlines()
    assert {line.split()[1] for line in looked} >= {"settings", "database", "schema", "keys", "policies"}
    assert {line.split()[0] for line in looked} == {"ok"}
    wrong = run("check", home=serve.home, env={"DATABSE_URL": "postgresql://typo", "POLICY_DIR": "/nonexistent"})
    assert wrong.returncode == 1
    verdicts = {line.split()[1]: line for line in wrong.stdout.splitlines()}
    assert verdicts["settings"].startswith("WRONG")
    assert "EXTERNAL_AGENTS_DATABSE_URL" in verdicts["settings"]
    assert verdicts["policies"].startswith("WRONG")
    assert verdicts["database"].startswith("ok")


def test_alone_a_command_starts_the_database_and_stops_it(home: Path) -> None:
    looked = succeed("check", home=home)
    assert "WRONG" not in looked
    made = succeed_json("keys", "create", "--org", "acme", "--subject", "ci", home=home)
    assert processes_of(home) == []
    assert [item["id"] for item in succeed_json("keys", "list", "--org", "acme", home=home)["items"]] == [made["id"]]
    assert processes_of(home) == []
    assert (home / "secret-keys").stat().st_mode & 0o777 == 0o600


def test_two_commands_alone_at_once_both_succeed(home: Path) -> None:
    def make(subject: str) -> dict[str, Any]:
        return succeed_json("keys", "create", "--org", "acme", "--subject", subject, home=home)

    with ThreadPoolExecutor() as pool:
        made = list(pool.map(make, ("one", "two")))
    listed = succeed_json("keys", "list", "--org", "acme", home=home)["items"]
    assert {item["id"] for item in listed} == {item["id"] for item in made}
    with serving(home) as serve:
        for item in made:
            with serve.client(item["key"]) as client:
                assert client.get(API).status_code == 200, "they were made with the same secret key"
