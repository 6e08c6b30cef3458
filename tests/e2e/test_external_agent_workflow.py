"""The whole way of an agent, against a running `serve`: what phase 1 asks for, and what its issue calls done."""

from __future__ import annotations

import asyncio
import base64
import time
from collections import Counter
from typing import Any
from uuid import uuid4

import httpx
import pytest

from agents import Agent, Issuer, Reply
from serve import API, Serve, agent_document, bearer, is_problem

pytestmark = pytest.mark.xdist_group("e2e")

TEAMS = {"tenant_id": "contoso", "channel_id": "19:research@thread.tacv2"}
SLOW_AGENT_S = 1.0

PLATFORMS: dict[str, dict[str, Any]] = {
    "teams": {**TEAMS, "webhook_url": "https://contoso.example.com/workflow/s3cret"},
    "discord": {"webhook_url": "https://discord.example.com/api/webhooks/1/s3cret", "username": "Researcher"},
    "slack": {"webhook_url": "https://slack.example.com/services/s3cret", "channel": "#research"},
    "telegram": {"bot_token": "12345:s3cret", "chat_id": -100123},
    "notion": {"token": "s3cret", "database_id": "2f26ee68df304251aad48ddc420cba3d"},
    "custom": {"queue": {"name": "research", "depth": 3}},
}
PLATFORM_SECRETS = {"webhook_url", "bot_token", "token"}

AUTH: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "api_key": ({"key": "s3cret", "header_name": "X-API-Key"}, {"x-api-key": "s3cret"}),
    "bearer": ({"token": "s3cret"}, {"authorization": "Bearer s3cret"}),
    "basic": (
        {"username": "kaizen", "password": "s3cret"},
        {"authorization": f"Basic {base64.b64encode(b'kaizen:s3cret').decode()}"},
    ),
    "custom": ({"headers": {"X-One": "s3cret-1", "X-Two": "s3cret-2"}}, {"x-one": "s3cret-1", "x-two": "s3cret-2"}),
    "none": ({}, {}),
}


async def create(api: httpx.AsyncClient, agent: Agent, **changes: Any) -> dict[str, Any]:
    answer = await api.post(API, json=agent_document(agent.url, **changes))
    assert answer.status_code == 201, answer.text
    document: dict[str, Any] = answer.json()
    return document


async def test_complete_registration_and_invocation_workflow(
    serve: Serve, api: httpx.AsyncClient, agent: Agent
) -> None:
    agent.answers(Reply(body=b'{"answer": "It rains."}'))
    tag = uuid4().hex
    teams = {
        "provider": "teams",
        "platform_config": TEAMS,
        "auth_type": "api_key",
        "auth_config": {"key": "s3cret", "header_name": "X-API-Key"},
        "tags": [tag],
    }

    created = await api.post(API, json=agent_document(agent.url, **teams))
    assert created.status_code == 201, created.text
    agent_id = created.json()["id"]
    assert created.headers["location"] == f"{API}/{agent_id}"
    assert created.json()["platform_config"] == TEAMS
    assert created.json()["auth_config"] == {"header_name": "X-API-Key"}

    listed = await api.get(API, params={"tag": tag})
    assert listed.status_code == 200
    assert [item["id"] for item in listed.json()["items"]] == [agent_id]

    payload = b'{"question":"How is the weather?",  "big":12345678901234567890123}'
    headers = {"Content-Type": "application/json", "X-Lineage-Hop-Id": "hop-7"}
    invoked = await api.post(f"{API}/{agent_id}/invoke", content=payload, headers=headers)
    assert invoked.status_code == 200, invoked.text
    invocation = invoked.json()
    assert invocation["status"] == "succeeded"
    assert invocation["response_payload"] == {"answer": "It rains."}

    logged = await api.get(f"{API}/{agent_id}/invocations")
    assert logged.status_code == 200
    assert logged.json() == {"items": [invocation], "next_cursor": None}

    [seen] = agent.requests
    assert seen.method == "POST"
    assert seen.body == payload
    assert seen.headers["x-api-key"] == "s3cret"
    assert seen.headers["content-type"] == "application/json"
    assert seen.headers["idempotency-key"] == invocation["id"]
    assert seen.headers["traceparent"].split("-")[1] == invocation["trace_id"]
    assert "authorization" not in seen.headers, "the caller's own credentials are nothing for the agent"

    [row] = serve.sql("SELECT * FROM external_agents WHERE id = %s", agent_id)
    assert (row["org_id"], row["provider"], row["status"]) == ("dev", "teams", "active")
    [row] = serve.sql("SELECT * FROM external_agent_invocations WHERE external_agent_id = %s", agent_id)
    assert (str(row["id"]), row["status"], row["lineage_hop_id"]) == (invocation["id"], "succeeded", "hop-7")
    assert row["initiated_by"] == "dev"


async def test_deletion_prevents_further_invocations(serve: Serve, api: httpx.AsyncClient, agent: Agent) -> None:
    agent_id = (await create(api, agent))["id"]
    assert (await api.post(f"{API}/{agent_id}/invoke", json={})).status_code == 200

    deleted = await api.delete(f"{API}/{agent_id}")
    assert (deleted.status_code, deleted.content) == (204, b"")

    is_problem(await api.post(f"{API}/{agent_id}/invoke", json={}), 404)
    is_problem(await api.get(f"{API}/{agent_id}"), 404)
    is_problem(await api.patch(f"{API}/{agent_id}", json={"name": "again"}), 404)
    is_problem(await api.delete(f"{API}/{agent_id}"), 404)
    assert len(agent.requests) == 1, "the second invocation was never sent"
    assert len((await api.get(f"{API}/{agent_id}/invocations")).json()["items"]) == 1, "the record stays"
    [row] = serve.sql("SELECT status FROM external_agents WHERE id = %s", agent_id)
    assert row["status"] == "deleted"
    assert not serve.sql("SELECT FROM external_agent_secrets WHERE agent_id = %s", agent_id)


@pytest.mark.parametrize("provider", PLATFORMS)
async def test_an_agent_of_each_provider(api: httpx.AsyncClient, agent: Agent, provider: str) -> None:
    tag = uuid4().hex
    created = await create(api, agent, provider=provider, platform_config=PLATFORMS[provider], tags=[tag])
    path = f"{API}/{created['id']}"
    shown = {name: value for name, value in PLATFORMS[provider].items() if name not in PLATFORM_SECRETS}
    assert created["platform_config"] == shown

    assert (await api.get(API, params={"tag": tag, "provider": provider})).json()["total"] == 1
    got = await api.get(path)
    assert got.json() == created
    assert (await api.get(path, headers={"If-None-Match": got.headers["etag"]})).status_code == 304

    patch = {"name": "Renamed", "timeout_s": 7, "tags": [tag, "more"]}
    patched = await api.patch(path, json=patch, headers={"If-Match": got.headers["etag"]})
    assert patched.status_code == 200, patched.text
    ours = ("updated_at", "version")
    expected = {name: value for name, value in {**created, **patch}.items() if name not in ours}
    assert {name: value for name, value in patched.json().items() if name not in ours} == expected
    assert patched.json()["version"] == created["version"] + 1
    is_problem(await api.patch(path, json={"name": "Late"}, headers={"If-Match": got.headers["etag"]}), 412)

    assert (await api.post(f"{path}/invoke", json={"input": provider})).status_code == 200
    assert [seen.json for seen in agent.requests] == [{"input": provider}]
    assert [item["status"] for item in (await api.get(f"{path}/invocations")).json()["items"]] == ["succeeded"]
    assert (await api.delete(path)).status_code == 204
    is_problem(await api.post(f"{path}/invoke", json={}), 404)


@pytest.mark.parametrize("auth_type", AUTH)
async def test_an_agent_of_each_auth_type(api: httpx.AsyncClient, agent: Agent, auth_type: str) -> None:
    config, headers = AUTH[auth_type]
    created = await create(api, agent, auth_type=auth_type, **({"auth_config": config} if config else {}))
    path = f"{API}/{created['id']}"
    assert (await api.patch(path, json={"name": "Renamed"})).status_code == 200, "an omitted secret is kept"
    answer = await api.post(f"{path}/invoke", json={"input": "hello"})
    assert answer.status_code == 200, answer.text
    [seen] = agent.requests
    assert {name: seen.headers.get(name) for name in headers} == headers
    if auth_type == "none":
        assert "authorization" not in seen.headers
    assert "s3cret" not in str(created) + answer.text


async def test_an_oauth2_agent_gets_a_token_from_its_token_endpoint(api: httpx.AsyncClient, agent: Agent) -> None:
    token_url = agent.at("/token", Issuer(client_id="kaizen", client_secret="s3cret"))
    agent.at("/hook", lambda seen: Reply(200 if seen.headers.get("authorization") == "Bearer token-1" else 401))
    config = {"client_id": "kaizen", "client_secret": "s3cret", "token_url": token_url, "scope": "invoke"}
    created = await create(api, agent, auth_type="oauth2", auth_config=config)
    assert created["auth_config"] == {name: value for name, value in config.items() if name != "client_secret"}
    path = f"{API}/{created['id']}"
    for _ in range(2):
        answer = await api.post(f"{path}/invoke", json={})
        assert answer.status_code == 200, answer.text
    tokens = agent.requests_at("/token")
    assert 1 <= len(tokens) <= 2, "each worker process asks once"
    assert {seen.form["grant_type"] for seen in tokens} == {"client_credentials"}
    assert {seen.form["scope"] for seen in tokens} == {"invoke"}

    wrong = await api.patch(path, json={"auth_config": {"client_secret": "wr0ng"}})
    assert wrong.status_code == 200, wrong.text
    refused = is_problem(await api.post(f"{path}/invoke", json={}), 502)
    assert refused["invocation"]["error_code"] == "agent_auth_failed"
    assert "wr0ng" not in str(refused)


async def test_a_limit_of_two_a_minute(serve: Serve, api: httpx.AsyncClient, agent: Agent) -> None:
    created = await create(api, agent, rate_limit_config={"requests_per_minute": 2})
    answers = [await api.post(f"{API}/{created['id']}/invoke", json={}) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    is_problem(answers[2], 429)
    assert 1 <= int(answers[2].headers["retry-after"]) <= 62
    assert answers[0].headers["ratelimit-policy"] == '"minute";q=2;w=60'
    assert [answer.headers["ratelimit"].split(";")[1] for answer in answers] == ["r=1", "r=0", "r=0"]
    assert len(agent.requests) == count_of(serve, created) == 2


async def test_a_cap_of_three_tenths_at_a_tenth_each(serve: Serve, api: httpx.AsyncClient, agent: Agent) -> None:
    budget = {"max_cost_per_invocation": "0.1", "max_monthly_cost": 0.3, "currency": "EUR"}
    created = await create(api, agent, budget_config=budget)
    assert created["budget_config"] == budget, "shown as sent"
    answers = [await api.post(f"{API}/{created['id']}/invoke", json={}) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 402]
    is_problem(answers[3], 402)
    assert answers[0].json()["cost"] == {"amount": "0.1", "currency": "EUR"}
    assert len(agent.requests) == count_of(serve, created) == 3
    [account] = serve.sql("SELECT * FROM external_agent_budgets WHERE agent_id = %s", created["id"])
    assert (str(account["spent"]), account["reserved"]) == ("0.3", 0)


@pytest.mark.parametrize(
    ("limits", "admitted", "refusal"),
    [
        ({"rate_limit_config": {"requests_per_day": 7}}, 7, 429),
        ({"budget_config": {"max_cost_per_invocation": "0.1", "max_monthly_cost": "0.5"}}, 5, 402),
    ],
    ids=["rate limit", "budget"],
)
async def test_limits_hold_however_many_come_at_once(
    serve: Serve, api: httpx.AsyncClient, agent: Agent, limits: dict[str, Any], admitted: int, refusal: int
) -> None:
    created = await create(api, agent, **limits)
    answers = await asyncio.gather(*(api.post(f"{API}/{created['id']}/invoke", json=n) for n in range(40)))
    assert Counter(answer.status_code for answer in answers) == {200: admitted, refusal: 40 - admitted}
    assert len(agent.requests) == count_of(serve, created) == admitted


async def test_a_hundred_at_once(serve: Serve, api: httpx.AsyncClient, agent: Agent) -> None:
    agent.answers(Reply(delay_s=SLOW_AGENT_S))
    created = await create(api, agent)
    began = time.monotonic()
    answers = await asyncio.gather(*(api.post(f"{API}/{created['id']}/invoke", json=n) for n in range(100)))
    print(f"100 invocations of an agent that takes {SLOW_AGENT_S} s: {time.monotonic() - began:.2f} s")
    assert Counter(answer.status_code for answer in answers) == {200: 100}
    found = serve.sql("SELECT id, status FROM external_agent_invocations WHERE external_agent_id = %s", created["id"])
    assert Counter(row["status"] for row in found) == {"succeeded": 100}
    assert sorted(seen.headers["idempotency-key"] for seen in agent.requests) == sorted(str(row["id"]) for row in found)


async def test_a_key_without_the_permission(
    serve: Serve, api: httpx.AsyncClient, agent: Agent, reader_key: str
) -> None:
    created = await create(api, agent)
    path, reader = f"{API}/{created['id']}", bearer(reader_key)
    assert (await api.get(path, headers=reader)).status_code == 200
    assert (await api.get(API, headers=reader)).status_code == 200
    assert (await api.get(f"{path}/invocations", headers=reader)).status_code == 200
    is_problem(await api.post(API, headers=reader, json=agent_document(agent.url)), 403)
    is_problem(await api.patch(path, headers=reader, json={"name": "Mine"}), 403)
    is_problem(await api.delete(path, headers=reader), 403)
    is_problem(await api.post(f"{path}/invoke", headers=reader, json={}), 403)
    assert (await api.get(path)).json() == created
    assert not agent.requests
    assert count_of(serve, created) == 0


async def test_another_organisation_sees_and_reaches_nothing(
    serve: Serve, api: httpx.AsyncClient, agent: Agent, other_key: str
) -> None:
    created = await create(api, agent)
    invocation = (await api.post(f"{API}/{created['id']}/invoke", json={})).json()
    other = bearer(other_key)

    async def told(agent_id: str) -> list[tuple[int, bytes]]:
        path = f"{API}/{agent_id}"
        answers = [
            await api.get(path, headers=other),
            await api.patch(path, headers=other, json={"name": "Mine"}),
            await api.delete(path, headers=other),
            await api.post(f"{path}/invoke", headers=other, json={}),
            await api.get(f"{path}/invocations", headers=other),
            await api.get(f"{path}/invocations/{invocation['id']}", headers=other),
        ]
        return [(is_problem(answer, 404)["status"], answer.content) for answer in answers]

    assert await told(created["id"]) == await told(str(uuid4())), "told apart from an id that does not exist"
    assert (await api.get(API, headers=other)).json()["total"] == 0
    assert (await api.get(f"{API}/invocations", headers=other)).json()["items"] == []
    assert (await api.get(f"{API}/{created['id']}")).json() == created
    assert len(agent.requests) == count_of(serve, created) == 1


def count_of(serve: Serve, created: dict[str, Any]) -> int:
    statement = "SELECT count(*) FROM external_agent_invocations WHERE external_agent_id = %s"
    return int(serve.sql(statement, created["id"])[0]["count"])
