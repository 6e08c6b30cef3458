"""The API on a real PostgreSQL, with real API keys, Cedar and HTTP; what the database holds is read by SQL."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import attrs
import httpx
import pytest

from agents import Agent, Reply
from external_agents.adapters.rest import create_app
from external_agents.bootstrap import Installation, open_installation
from external_agents.settings import Settings
from serve import API, agent_document, bearer, is_problem, rows

ORG = "acme"
SECRET_KEYS = "k1:MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
UNKNOWN_ID = "019ab0c5-7a52-7f3e-9c1d-2b8f4a6e0d13"
NEW_AGENT = {
    "name": "Researcher",
    "description": "Looks things up.",
    "provider": "teams",
    "webhook_url": "https://agent.example.com/hook",
    "auth_type": "oauth2",
    "auth_config": {
        "client_id": "kaizen",
        "client_secret": "s3cret",
        "token_url": "https://issuer.example.com/token",
    },
    "platform_config": {"tenant_id": "contoso", "channel_id": "19:research"},
    "rate_limit_config": {"requests_per_minute": 60},
    "budget_config": {"max_cost_per_invocation": "0.25", "max_monthly_cost": 10, "currency": "EUR"},
    "tags": ["research", "beta"],
}


@attrs.frozen
class Api:
    """The app as it is served, in this process, on a database of the test's own."""

    installation: Installation
    database_url: str
    app: Any

    @asynccontextmanager
    async def user(self, *permissions: str, org_id: str = ORG) -> AsyncIterator[httpx.AsyncClient]:
        """An authenticated one; with no permission named, all of them."""
        key, _ = await self.installation.api_keys.issue(org_id, "tester", permissions or None)
        transport = httpx.ASGITransport(self.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://api.test", headers=bearer(key)) as client:
            yield client

    def sql(self, statement: str, *values: object) -> list[dict[str, Any]]:
        return rows(self.database_url, statement, *values)


@pytest.fixture
async def api(postgres_url: str) -> AsyncIterator[Api]:
    environment = {"SECRET_KEYS": SECRET_KEYS, "DATABASE_URL": postgres_url, "EGRESS_ALLOW": "loopback"}
    settings = Settings.from_env({f"EXTERNAL_AGENTS_{name}": text for name, text in environment.items()})
    async with open_installation(settings, postgres_url) as installation:
        app = create_app(
            installation.service, authenticator=installation.authenticator, readiness=installation.readiness
        )
        yield Api(installation, postgres_url, app)


async def create(client: httpx.AsyncClient, **changes: Any) -> dict[str, Any]:
    answer = await client.post(API, json={**NEW_AGENT, **changes})
    assert answer.status_code == 201, answer.text
    document: dict[str, Any] = answer.json()
    return document


async def test_post_creates_the_agent_in_the_database(api: Api) -> None:
    async with api.user("create:external_agent") as user:
        created = await create(user)
    [row] = api.sql("SELECT * FROM external_agents")
    assert str(row["id"]) == created["id"]
    assert row["org_id"] == created["org_id"] == ORG
    plain = ("name", "description", "provider", "webhook_url", "auth_type", "platform_config", "tags")
    assert {name: row[name] for name in plain} == {name: NEW_AGENT[name] for name in plain}
    assert row["rate_limit_config"] == NEW_AGENT["rate_limit_config"]
    assert row["budget_config"] == NEW_AGENT["budget_config"]
    assert row["auth_config"] == {"client_id": "kaizen", "token_url": "https://issuer.example.com/token"}
    assert (row["status"], row["version"], row["timeout_s"], row["max_attempts"]) == ("active", 1, 30, 3)
    assert row["created_by"] == row["updated_by"] == "tester"
    assert row["created_at"] == row["updated_at"]
    assert row["created_at"].isoformat() == created["created_at"].replace("Z", "+00:00")
    [secret] = api.sql("SELECT * FROM external_agent_secrets")
    assert (secret["field"], str(secret["agent_id"])) == ("auth_config.client_secret", created["id"])
    assert b"s3cret" not in secret["envelope"]


async def test_post_rejects_an_invalid_auth_config(api: Api) -> None:
    async with api.user() as user:
        incomplete = {"client_secret": "s3cret", "token_url": "https://issuer.example.com/token"}
        answer = await user.post(API, json={**NEW_AGENT, "auth_config": incomplete})
    problem = is_problem(answer, 400)
    [fault] = problem["errors"]
    assert fault["path"] == "auth_config.client_id"
    assert fault["message"]
    assert "s3cret" not in answer.text
    assert api.sql("SELECT FROM external_agents") == []


async def test_get_returns_paginated_results(api: Api) -> None:
    async with api.user("create:external_agent") as maker:
        ids = [(await create(maker, name=f"agent {n}"))["id"] for n in range(25)]
    async with api.user("read:external_agent") as user:
        first = await user.get(API, params={"page": 1, "limit": 10})
        third = await user.get(API, params={"page": 3, "limit": 10})
        beyond = await user.get(API, params={"page": 4, "limit": 10})
    assert first.status_code == third.status_code == beyond.status_code == 200
    assert [item["id"] for item in first.json()["items"]] == ids[:14:-1]
    assert [item["id"] for item in third.json()["items"]] == ids[4::-1]
    assert beyond.json() == {"items": [], "page": 4, "limit": 10, "total": 25, "pages": 3}
    assert first.json() == {"items": first.json()["items"], "page": 1, "limit": 10, "total": 25, "pages": 3}


async def test_get_returns_404_for_an_agent_that_does_not_exist(api: Api) -> None:
    async with api.user() as user:
        problem = is_problem(await user.get(f"{API}/{UNKNOWN_ID}"), 404)
        created = await create(user)
    assert problem["detail"] == "No such agent."
    async with api.user(org_id="other") as stranger:
        assert is_problem(await stranger.get(f"{API}/{created['id']}"), 404) == problem


async def test_patch_updates_the_record(api: Api) -> None:
    async with api.user("create:external_agent") as maker:
        created = await create(maker)
    [sealed] = api.sql("SELECT * FROM external_agent_secrets")
    patch = {
        "name": "Analyst",
        "status": "inactive",
        "platform_config": {"channel_id": "19:analysis"},
        "budget_config": None,
        "rate_limit_config": {"requests_per_day": 5},
        "tags": [],
    }
    async with api.user("update:external_agent") as user:
        answer = await user.patch(f"{API}/{created['id']}", json=patch)
        assert answer.status_code == 200, answer.text
    [row] = api.sql("SELECT * FROM external_agents")
    assert (row["name"], row["status"], row["tags"], row["version"]) == ("Analyst", "inactive", [], 2)
    assert row["platform_config"] == {"tenant_id": "contoso", "channel_id": "19:analysis"}
    assert row["budget_config"] is None
    assert row["rate_limit_config"] == {"requests_per_minute": 60, "requests_per_day": 5}, "a merge patch"
    assert row["description"] == NEW_AGENT["description"]
    assert row["updated_at"] > row["created_at"]
    [kept] = api.sql("SELECT * FROM external_agent_secrets")
    assert (kept["field"], kept["key_id"]) == (sealed["field"], sealed["key_id"]), "an omitted secret is kept"


async def test_delete_soft_deletes_the_record(api: Api) -> None:
    async with api.user() as user:
        created = await create(user)
    async with api.user("delete:external_agent") as user:
        answer = await user.delete(f"{API}/{created['id']}")
    assert (answer.status_code, answer.content) == (204, b"")
    [row] = api.sql("SELECT * FROM external_agents")
    assert (str(row["id"]), row["status"], row["name"]) == (created["id"], "deleted", "Researcher")
    assert api.sql("SELECT FROM external_agent_secrets") == [], "a deleted agent keeps no secret"


async def test_invoke_creates_an_invocation_record(api: Api, agent_server: Agent) -> None:
    agent_server.answers(Reply(body=b'{"answer":  "It rains.", "metadata": {"cost": "0.05"}}'))
    plain = agent_document(agent_server.url, auth_type="bearer", auth_config={"token": "s3cret"})
    async with api.user() as maker:
        created = await create(maker, **plain, platform_config={})
    async with api.user("invoke:external_agent") as user:
        answer = await user.post(
            f"{API}/{created['id']}/invoke",
            content=b'{"question":  "How is the weather?"}',
            headers={"Content-Type": "application/json", "X-Lineage-Hop-Id": "hop-1"},
        )
    assert answer.status_code == 200, answer.text
    [row] = api.sql(
        "SELECT *, request_payload::text AS request_text, response_payload::text AS response_text"
        " FROM external_agent_invocations"
    )
    assert str(row["id"]) == answer.json()["id"]
    assert str(row["external_agent_id"]) == created["id"]
    assert row["org_id"] == ORG
    assert row["request_text"] == '{"question":  "How is the weather?"}'
    assert row["response_text"] == '{"answer":  "It rains.", "metadata": {"cost": "0.05"}}'
    assert (row["status"], row["response_status"], row["initiated_by"]) == ("succeeded", 200, "tester")
    assert row["lineage_hop_id"] == "hop-1"
    assert (str(row["cost_amount"]), row["cost_currency"]) == ("0.05", "EUR")
    assert row["error_code"] is row["error_message"] is None
    assert row["created_at"] <= row["completed_at"]
    assert row["execution_time_ms"] >= 0
    assert [attempt["status"] for attempt in row["attempts"]] == [200]
    [seen] = agent_server.requests
    assert seen.headers["authorization"] == "Bearer s3cret"
    assert seen.body == row["request_text"].encode()


async def test_an_idempotency_key_gives_the_first_answer_again(api: Api, agent_server: Agent) -> None:
    agent_server.answers(Reply(body=b'{"answer":  1.50, "metadata": {"cost": "0.05"}}'))
    plain = agent_document(agent_server.url, rate_limit_config={"requests_per_minute": 2})
    async with api.user() as user:
        created = await create(user, **plain, auth_config={}, platform_config={})
        path, key = f"{API}/{created['id']}", {"Idempotency-Key": "order-17"}
        first = await user.post(f"{path}/invoke", json={"a": 1, "b": [2]}, headers=key)
        assert first.status_code == 200, first.text
        before = (await user.get(f"{path}/usage")).json()
        assert (before["rate_limit"]["minute"]["used"], before["budget"]["spent"]) == (1, "0.05")
        again = await user.post(f"{path}/invoke", json={"b": [2.0], "a": 1}, headers=key)
        assert (again.status_code, again.content) == (200, first.content)
        assert again.headers["idempotent-replayed"] == "true"
        assert '"minute";r=1;' in again.headers["ratelimit"]
        is_problem(await user.post(f"{path}/invoke", json={"a": 1}, headers=key), 422)
        assert (await user.get(f"{path}/usage")).json() == before
        assert (await user.post(f"{path}/invoke", json={}, headers={"Idempotency-Key": "18"})).status_code == 200
        is_problem(await user.post(f"{path}/invoke", json={}, headers={"Idempotency-Key": "19"}), 429)
    assert len(agent_server.requests) == 2
    assert len(api.sql("SELECT FROM external_agent_invocations")) == 2
    kept = api.sql("SELECT * FROM external_agent_idempotency_keys ORDER BY created_at")
    assert [row["key"] for row in kept] == ["order-17", "18"], "a refusal keeps none"
    assert str(kept[0]["invocation_id"]) == first.json()["id"]
    assert len(kept[0]["request_hash"]) == 32


@pytest.mark.parametrize("missing", ["create", "read", "update", "delete", "invoke"])
async def test_permission_checks_reject_unauthorized_users(api: Api, agent_server: Agent, missing: str) -> None:
    async with api.user() as maker:
        created = await create(maker, **agent_document(agent_server.url), auth_config={}, platform_config={})
    before = api.sql("SELECT * FROM external_agents")
    actions = {"create", "read", "update", "delete", "invoke"} - {missing}
    path = f"{API}/{created['id']}"
    async with api.user(*(f"{action}:external_agent" for action in actions)) as user:
        calls = {
            "create": lambda: user.post(API, json=NEW_AGENT),
            "read": lambda: user.get(path),
            "update": lambda: user.patch(path, json={"name": "Mine"}),
            "delete": lambda: user.delete(path),
            "invoke": lambda: user.post(f"{path}/invoke", json={}),
        }
        is_problem(await calls[missing](), 403)
    assert api.sql("SELECT * FROM external_agents") == before
    assert api.sql("SELECT FROM external_agent_invocations") == []
    assert not agent_server.requests
