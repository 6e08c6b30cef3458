"""An operator with two roles: the owner migrates, the lesser one serves, confined to one organisation at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator

import attrs
import psycopg
import pytest
from psycopg import sql

from agents import Agent
from key_rotation import secret_keys
from postgres_server import PostgresServer, as_role, dsn
from serve import API, agent_document, agent_in_thread, bearer, eventually, home_folder, is_problem, rows, run, serving

SECRET_KEYS = f"k1:{'A' * 43}="


@attrs.frozen
class Estate:
    owner_url: str
    role: str
    env: dict[str, str]


@pytest.fixture
def estate(postgres_server: PostgresServer) -> Iterator[Estate]:
    with postgres_server.role() as role, postgres_server.database() as name:
        url = postgres_server.url(name)
        env = {
            "DATABASE_URL": dsn(as_role(url, role)),
            "MIGRATION_DATABASE_URL": dsn(url),
            "ROW_SECURITY": "on",
            "SECRET_KEYS": SECRET_KEYS,
            "EGRESS_ALLOW": "loopback",
        }
        yield Estate(url, role, env)


@pytest.fixture
def agent() -> Iterator[Agent]:
    with agent_in_thread() as agent:
        yield agent


def test_two_organisations_on_a_confined_service(estate: Estate, agent: Agent) -> None:
    with home_folder() as home:
        migrated = run("migrate", home=home, env=estate.env)
        assert (migrated.returncode, migrated.stderr) == (0, "")
        assert estate.role in migrated.stdout
        keys = [
            run("keys", "create", "--org", org, "--subject", "s", home=home, env=estate.env).stdout.strip()
            for org in ("acme", "other")
        ]
        with serving(home, env=estate.env) as serve, serve.client(keys[0]) as acme, serve.client(keys[1]) as other:
            assert acme.get("/readyz").json()["checks"]["role"] == "ok"
            budget = {"budget_config": {"max_cost_per_invocation": 1, "max_monthly_cost": 10}}
            own = [
                user.post(API, json=agent_document(agent.url, **budget)).json()["id"] for user in (acme, other, other)
            ]
            for user, id in zip((acme, other, other), own, strict=True):
                answer = user.post(f"{API}/{id}/invoke", json={"a": 1}, headers={"Idempotency-Key": "k"})
                assert answer.status_code == 200, answer.text
                again = user.post(f"{API}/{id}/invoke", json={"a": 1}, headers={"Idempotency-Key": "k"})
                assert again.headers["Idempotent-Replayed"] == "true"
                assert user.get(f"{API}/{id}/usage").json()["budget"]["spent"] == "1"
            assert [user.get(API).json()["total"] for user in (acme, other)] == [1, 2]
            assert [len(user.get(f"{API}/invocations").json()["items"]) for user in (acme, other)] == [1, 2]
            assert acme.patch(f"{API}/{own[0]}", json={"name": "New"}).json()["name"] == "New"
            for path in ("", "/usage", "/invocations"):
                is_problem(acme.get(f"{API}/{own[1]}{path}"), 404)
            is_problem(acme.post(f"{API}/{own[1]}/invoke", json=1), 404)
            assert other.delete(f"{API}/{own[2]}").status_code == 204
        listed = run("agents", "list", "--org", "other", "--json", home=home, env=estate.env)
        assert own[1] in listed.stdout
        assert own[0] not in listed.stdout
        checked = run("check", home=home, env=estate.env)
        assert checked.returncode == 0, checked.stdout
        assert "sees one organisation at a time" in checked.stdout
        assert "3 accounts equal the sums of 3 invocations" in checked.stdout
        alone = {name: text for name, text in estate.env.items() if name != "MIGRATION_DATABASE_URL"}
        assert run("check", home=home, env=alone).stdout.count("only the owner of the tables") == 2
    assert rows(estate.owner_url, "SELECT count(*) FROM external_agent_invocations") == [{"count": 3}]


def test_secret_keys_are_changed_over_all_organisations(estate: Estate, agent: Agent) -> None:
    old, both, new = ({**estate.env, "SECRET_KEYS": secret_keys(*ids)} for ids in (("k1",), ("k2", "k1"), ("k2",)))
    alone = {name: text for name, text in both.items() if name != "MIGRATION_DATABASE_URL"}
    with home_folder() as home:
        run("migrate", home=home, env=old)
        keys = [
            run("keys", "create", "--org", org, "--subject", "s", home=home, env=old).stdout.strip()
            for org in ("acme", "other")
        ]
        with serving(home, env=new) as serve, serve.client(keys[0]) as acme, serve.client(keys[1]) as other:
            assert "k1" in acme.get("/readyz").json()["checks"]["keys"]
            assert acme.get(API).status_code == 401
            document = json.dumps(agent_document(agent.url, auth_type="bearer", auth_config={"token": "entrusted"}))
            for org in ("acme", "other"):
                made = run("agents", "create", "--org", org, document, home=home, env=old)
                assert made.returncode == 0, made.stderr
            missed = run("check", home=home, env={**alone, "SECRET_KEYS": new["SECRET_KEYS"]})
            assert missed.returncode == 1
            assert "the secret key k1 is in use and not configured" in missed.stdout
            for env, told in (
                (alone, "set EXTERNAL_AGENTS_MIGRATION_DATABASE_URL"),
                ({**both, "MIGRATION_DATABASE_URL": both["DATABASE_URL"]}, "name the owner's there"),
            ):
                refused = run("keys", "rewrap", home=home, env=env)
                assert (refused.returncode, refused.stdout) == (1, "")
                assert told in refused.stderr
            done = json.loads(run("keys", "rewrap", "--json", home=home, env=both).stdout)
            assert (done["resealed"], done["retirable"]) == (2, ["k1"])
            assert done["after"] == {"k2": {"secrets": 2, "api_keys": 2}, "k1": {"secrets": 0, "api_keys": 0}}
            eventually(lambda: acme.get("/readyz").status_code == 200, 30)
            for user in (acme, other):
                eventually(lambda user=user: user.get(API).status_code == 200, 30)  # type: ignore[misc]
                [made_agent] = user.get(API).json()["items"]
                assert user.post(f"{API}/{made_agent['id']}/invoke", json=1).status_code == 200
        checked = run("check", home=home, env=new)
        assert checked.returncode == 0, checked.stdout
        assert "by secret key: k2: 2 secrets, 2 API keys" in checked.stdout
        for org in ("acme", "other"):
            [listed] = json.loads(run("keys", "list", "--org", org, "--json", home=home, env=new).stdout)["items"]
            assert listed["last_used_at"] is not None


def test_a_role_that_row_security_would_not_hold_does_not_serve(estate: Estate) -> None:
    owner = {**estate.env, "DATABASE_URL": estate.env["MIGRATION_DATABASE_URL"]}
    with home_folder() as home:
        assert run("migrate", home=home, env=owner).returncode == 0
        for command in (("serve", "--port", "0"), ("agents", "list", "--org", "acme"), ("check",)):
            done = run(*command, home=home, env=owner)
            assert done.returncode == 1, command
            assert "owns the tables" in done.stdout + done.stderr, command


def test_a_lesser_role_without_row_security_does_not_serve(estate: Estate) -> None:
    off = {**estate.env, "ROW_SECURITY": "off"}
    with home_folder() as home:
        refused = run("serve", "--port", "0", home=home, env=estate.env)
        assert (refused.returncode, refused.stdout) == (1, "")
        run("migrate", home=home, env=off)
        for command in (("serve", "--port", "0"), ("check",)):
            done = run(*command, home=home, env=off)
            assert done.returncode == 1, command
            assert "does not own the tables" in done.stdout + done.stderr, command


def test_a_role_that_has_lost_its_rights_is_told(estate: Estate) -> None:
    with home_folder() as home:
        run("migrate", home=home, env=estate.env)
        key = run("keys", "create", "--org", "acme", "--subject", "s", home=home, env=estate.env).stdout.strip()
        with serving(home, env=estate.env) as serve, serve.client(key) as user:
            with psycopg.connect(dsn(estate.owner_url)) as owner:
                owner.execute(sql.SQL("REVOKE ALL ON external_agents FROM {}").format(sql.Identifier(estate.role)))
            assert "rights" in is_problem(user.get(API, headers=bearer(key)), 503)["detail"]
            assert run("migrate", home=home, env=estate.env).stdout.startswith("up to date")
            assert user.get(API).status_code == 200
