"""A canary in every secret field is searched in all that anybody can see: answers, logs, terminals, the database."""

from __future__ import annotations

import base64
import json
import re
from typing import Any

import httpx
import pytest

from agents import Agent, Reply
from external_agents.adapters.postgres.embedded import running_url
from postgres_server import psql_dump
from serve import API, Serve, agent_document, everything, run

CANARY = "canary-of-the-coal-mine"
"""Every secret here begins with it, and nothing else has it."""
MARK = "in-plain-sight"
"""What is no secret, planted beside them: where it is not found, the search itself is broken."""

AUTH: dict[str, dict[str, Any]] = {
    "oauth2": {"client_id": "kaizen", "client_secret": f"{CANARY}-client-secret", "token_url": "TOKEN_URL"},
    "api_key": {"key": f"{CANARY}-key", "header_name": "X-API-Key"},
    "bearer": {"token": f"{CANARY}-token"},
    "basic": {"username": "kaizen", "password": f"{CANARY}-password"},
    "custom": {"headers": {"X-Secret": f"{CANARY}-header"}, "more": [{"deep": f"{CANARY}-deep"}], f"{CANARY}-name": 1},
}
PLATFORMS: dict[str, dict[str, Any]] = {
    "teams": {"tenant_id": MARK, "channel_id": MARK, "webhook_url": f"https://teams.example.com/{CANARY}-teams"},
    "discord": {"webhook_url": f"https://discord.example.com/{CANARY}-discord", "username": MARK},
    "slack": {"webhook_url": f"https://slack.example.com/{CANARY}-slack", "channel": MARK},
    "telegram": {"bot_token": f"12345:{CANARY}-telegram", "chat_id": MARK},
    "notion": {"token": f"{CANARY}-notion", "database_id": MARK},
}
SIGNING = ["whsec_" + base64.b64encode(f"{CANARY}-{letter}".encode()).decode() for letter in "AB"]
"""The second in place of the first, which then stands beside it."""
WRONG: list[dict[str, Any]] = [
    {"auth_type": "api_key", "auth_config": {"key": f"{CANARY}\n-line", "header_name": "X-API-Key"}},
    {"auth_type": "api_key", "auth_config": {"key": f"{CANARY}-host", "header_name": "Host"}},
    {"auth_type": "bearer", "auth_config": {"token": [f"{CANARY}-list"]}},
    {"auth_type": "bearer", "auth_config": {"tokn": f"{CANARY}-misspelt"}},
    {"auth_type": "basic", "auth_config": {"username": "k", "password": {"a": f"{CANARY}-object"}}},
    {"auth_type": "custom", "auth_config": {"headers": {"X-Secret": [f"{CANARY}-in-list"]}}},
    {"auth_type": "custom", "auth_config": f"{CANARY}-text"},
    {"provider": "slack", "platform_config": {"webhook_url": f"http://10.0.0.1:{CANARY}", "channel": "#x"}},
    {"provider": "telegram", "platform_config": {"bot_token": f"{CANARY}/../x", "chat_id": 1.5}},
    {"signing_secret": f"whsec_{CANARY}"},
    {"signing_secret": [f"whsec_{CANARY}"]},
]

ECHOES = [
    Reply(raw=f"HTTP/1.1 {CANARY}-status\r\n\r\n".encode(), close=True),
    Reply(raw=f"HTTP/1.1 200 OK\r\nContent-Length: {CANARY}-length\r\n\r\n".encode(), close=True),
    Reply(raw=f"HTTP/1.1 200 OK\r\nContent-Encoding: {CANARY}-encoding\r\n\r\n".encode(), close=True),
    Reply(302, headers=(("Location", f"https://{CANARY}-location.example.com/"),), body=b""),
]
"""What an agent that is not well may do with what it was sent. (What it says in a body is its answer, and is kept.)"""

pytestmark = pytest.mark.xdist_group("e2e")


@pytest.fixture
def answers(api: httpx.AsyncClient) -> list[str]:
    """All that the API says to `api`, as it comes."""
    said: list[str] = []

    async def listen(answer: httpx.Response) -> None:
        await answer.aread()
        said.append(f"{answer.status_code} {answer.headers} {answer.text}")

    api.event_hooks = {"response": [listen]}
    return said


async def test_no_secret_is_seen_anywhere(
    serve: Serve, api: httpx.AsyncClient, agent: Agent, answers: list[str]
) -> None:
    agent_ids = [
        *[await _live(api, agent, auth_type=name, auth_config=config) for name, config in AUTH.items()],
        *[await _live(api, agent, provider=name, platform_config=config) for name, config in PLATFORMS.items()],
        await _live(api, agent, signing_secret=SIGNING[0]),
    ]
    for changes in WRONG:
        assert (await api.post(API, json=agent_document(agent.url, **changes))).status_code == 400, changes
        await api.patch(f"{API}/{agent_ids[0]}", json=changes)
    for body in (f'{{"token": "{CANARY}-broken"', f"{CANARY}-no-json", f'{{"token": "{CANARY}", "token": 1}}'):
        malformed = await api.post(API, content=body.encode(), headers={"Content-Type": "application/json"})
        assert malformed.status_code == 400
    refused = await api.get(API, headers={"Authorization": f"Bearer {CANARY}-api-key"})
    assert refused.status_code == 401
    await _echoed(api, agent)
    for path in ("/metrics", "/readyz", "/healthz", "/openapi.json", "/docs"):
        await api.get(path)
    await api.get(f"{API}/{agent_ids[0]}/usage")
    await api.get(API, params={"tag": MARK})
    await api.get(f"{API}/invocations", params={"limit": 100})

    said = "\n".join(answers)
    shown = _commands(serve, agent_ids)
    url = running_url(serve.home)
    assert url is not None
    stored = everything(url)
    for place, text in {"answers": said, "terminal": shown, "tables": stored, "dump": psql_dump(url).decode()}.items():
        assert MARK in text, f"the search in {place} finds nothing at all"
        _assert_no_secret(place, text, serve.key)
    assert all(agent_id in serve.stderr for agent_id in agent_ids), "the log tells of every agent"
    _assert_no_secret("log", serve.stderr, serve.key)
    assert any(seen.headers.get("authorization") == f"Bearer {CANARY}-token" for seen in agent.requests)
    assert any(seen.headers.get("webhook-signature", "").count("v1,") == 2 for seen in agent.requests)


async def test_no_secret_is_in_the_files_of_the_database(serve: Serve, api: httpx.AsyncClient, agent: Agent) -> None:
    await _live(api, agent, auth_type="bearer", auth_config=AUTH["bearer"], signing_secret=SIGNING[0])
    serve.sql("SELECT pg_switch_wal()")
    files = [path for path in (serve.home / "postgres").rglob("*") if path.is_file()]
    with_mark = [path for path in files if MARK.encode() in path.read_bytes()]
    assert with_mark, "the search finds nothing at all"
    secret_keys = (serve.home / "secret-keys").read_bytes().split(b":")[1].strip()
    signing_keys = [base64.b64decode(secret.removeprefix("whsec_")) for secret in SIGNING]
    for path in files:
        content = path.read_bytes()
        for secret in (CANARY.encode(), serve.key.encode(), secret_keys, *signing_keys):
            assert secret not in content, path


def _assert_no_secret(place: str, text: str, key: str) -> None:
    found = re.findall(rf".{{0,80}}(?:{'|'.join(_disguises(CANARY))}).{{0,40}}", text)
    assert not found, f"{place}: {found}"
    assert key not in text, f"{place} shows an API key"


def _disguises(secret: str) -> list[str]:
    """In clear, in hexadecimal as a dump shows bytes, and in base64 wherever it begins."""
    in_base64 = [base64.b64encode(b" " * lead + secret.encode()).decode()[4:-4] for lead in range(3)]
    disguises = [secret, secret.encode().hex(), *in_base64]
    assert min(map(len, disguises)) > 20, "none is found by chance"
    return [re.escape(disguise) for disguise in disguises]


async def _echoed(api: httpx.AsyncClient, agent: Agent) -> None:
    """Failures in whose causes a secret is found: they tell what failed, and not with which words."""
    created = await api.post(API, json=agent_document(agent.url, max_attempts=1))
    path = f"{API}/{created.json()['id']}"
    for echo in ECHOES:
        agent.answers(echo)
        assert (await api.post(f"{path}/invoke", json={"input": MARK})).status_code == 502
    agent.answers(Reply())
    for refusal in (
        Reply(400, body=f'{{"error": "invalid_client", "error_description": "{CANARY}-echo"}}'.encode()),
        Reply(body=f'{{"access_token": ["{CANARY}-list"]}}'.encode()),
        Reply(body=f"{CANARY}-text".encode()),
    ):
        config = {**AUTH["oauth2"], "token_url": agent.at("/token", refusal)}
        patch = {"auth_type": "oauth2", "auth_config": config}
        assert (await api.patch(path, json=patch)).status_code == 200
        assert (await api.post(f"{path}/invoke", json={"input": MARK})).status_code == 502
    await api.get(f"{path}/invocations")


async def _live(api: httpx.AsyncClient, agent: Agent, **changes: Any) -> str:
    """An agent that is made, shown, changed, invoked well and badly, listed; its id."""
    changes = {"tags": [MARK], **changes}
    if changes.get("auth_type") == "oauth2":
        token_url = agent.at(
            "/token", Reply(body=f'{{"access_token": "{CANARY}-access", "token_type": "Bearer"}}'.encode())
        )
        changes["auth_config"] = {**changes["auth_config"], "token_url": token_url}
    created = await api.post(API, json=agent_document(agent.url, **changes))
    assert created.status_code == 201, created.text
    path = f"{API}/{created.json()['id']}"
    again = {name: changes[name] for name in ("auth_config", "platform_config") if name in changes}
    if "signing_secret" in changes:
        again["signing_secret"] = SIGNING[1]
    assert (await api.patch(path, json={**again, "timeout_s": 1, "max_attempts": 1})).status_code == 200
    assert (await api.post(f"{path}/invoke", json={"input": MARK})).status_code == 200
    for failure in (Reply(401), Reply(raw=b"no HTTP\r\n\r\n", close=True)):
        agent.answers(failure)
        assert (await api.post(f"{path}/invoke", json={"input": MARK})).status_code == 502
    agent.answers(Reply())
    await api.get(path)
    await api.get(f"{path}/invocations")
    return str(created.json()["id"])


def _commands(serve: Serve, agent_ids: list[str]) -> str:
    commands = [
        ("agents", "list", "--org", "dev", "--tag", MARK, "--limit", "100"),
        ("agents", "list", "--org", "dev", "--tag", MARK, "--limit", "100", "--json"),
        ("agents", "show", agent_ids[0], "--org", "dev"),
        ("invocations", "list", "--org", "dev", "--agent", agent_ids[0], "--json"),
        ("invoke", agent_ids[0], "--org", "dev", "--json", json.dumps({"input": MARK})),
        ("agents", "create", "--org", "dev", json.dumps(agent_document("https://agent.example.com/", **WRONG[4]))),
        ("agents", "update", agent_ids[0], "--org", "dev", f'{{"auth_config": "{CANARY}", {CANARY}'),
        ("keys", "list", "--org", "dev"),
        ("keys", "rewrap"),
        ("check",),
    ]
    return "\n".join(done.stdout + done.stderr for done in (run(*command, home=serve.home) for command in commands))
