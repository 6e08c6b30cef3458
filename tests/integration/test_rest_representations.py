"""What agents and invocations look like, and what is never seen of them."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import pytest

from external_agents import JsonText, Outcome
from external_agents.domain.auth import AUTH_SCHEMES, EVERYTHING
from external_agents.domain.platform import PLATFORMS
from rest_api import AGENT, AGENTS, CANARY, REFUSED, TIMED_OUT, Api

JSON = {"Content-Type": "application/json"}
MOMENT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")


@pytest.fixture
async def api() -> AsyncIterator[Api]:
    async with Api() as api:
        yield api


async def test_an_agent_with_defaults(api: Api) -> None:
    agent = await api.create()
    assert (
        list(agent)
        == (
            "id org_id name description provider webhook_url auth_type auth_config platform_config rate_limit_config"
            " budget_config tags timeout_s max_attempts status created_by updated_by created_at updated_at version"
        ).split()
    )
    assert UUID(agent["id"]).version == 7
    assert MOMENT.fullmatch(agent["created_at"])
    assert agent["created_at"] == agent["updated_at"]
    assert {**agent, "id": "", "created_at": "", "updated_at": ""} == {
        **AGENT,
        "id": "",
        "org_id": "acme",
        "description": "",
        "auth_config": {"header_name": "X-Key"},
        "platform_config": {},
        "rate_limit_config": None,
        "budget_config": None,
        "tags": [],
        "timeout_s": 30,
        "max_attempts": 3,
        "status": "active",
        "created_by": "tester",
        "updated_by": "tester",
        "created_at": "",
        "updated_at": "",
        "version": 1,
    }


async def test_numbers_keep_their_digits(api: Api) -> None:
    document = (
        b'{"name": "n", "provider": "custom", "webhook_url": "https://agent.example.com/", "auth_type": "none",'
        b' "timeout_s": 2.50, "platform_config": {"big": 12345678901234567890123, "fine": 0.1000000000000000055511},'
        b' "budget_config": {"max_cost_per_invocation": 0.10, "max_monthly_cost": "5.00"},'
        b' "rate_limit_config": {"requests_per_day": 1000000000}}'
    )
    answer = await api.call("POST", AGENTS, content=document, headers=JSON)
    assert answer.status_code == 201
    for text in (
        '"platform_config":{"big":12345678901234567890123,"fine":0.1000000000000000055511}',
        '"budget_config":{"max_cost_per_invocation":0.10,"max_monthly_cost":"5.00"}',
        '"rate_limit_config":{"requests_per_day":1000000000}',
        '"timeout_s":2.5,',
    ):
        assert text in answer.text
    shown = await api.call("GET", f"{AGENTS}/{answer.json()['id']}")
    assert shown.content == answer.content


async def test_whole_seconds_are_integers(api: Api) -> None:
    for text, shown in [("1", "1"), ("30", "30"), ("2.0", "2"), ("1.25", "1.25")]:
        content = json.dumps(AGENT)[:-1].encode() + f', "timeout_s": {text}}}'.encode()
        assert f'"timeout_s":{shown},' in (await api.call("POST", AGENTS, content=content, headers=JSON)).text


async def test_an_invocation_that_succeeded(api: Api) -> None:
    agent = await api.create(budget_config={"max_cost_per_invocation": "0.0500", "currency": "EUR"})
    answer = await api.invoke(agent, headers={"X-Lineage-Hop-Id": "hop-1"})
    invocation = answer.json()
    assert (
        list(invocation)
        == (
            "id org_id external_agent_id lineage_hop_id initiated_by status request_payload response_payload"
            " response_status attempts execution_time_ms error_code error_message cost cost_overrun trace_id created_at"
            " completed_at"
        ).split()
    )
    assert UUID(invocation["id"]).version == 7
    [attempt] = invocation["attempts"]
    for moment in (invocation["created_at"], invocation["completed_at"], attempt.pop("at")):
        assert MOMENT.fullmatch(moment)
    assert attempt == {"status": 200, "duration_ms": 0}
    ours = {"id", "attempts", "created_at", "completed_at", "trace_id"}
    assert {name: value for name, value in invocation.items() if name not in ours} == {
        "org_id": "acme",
        "external_agent_id": agent["id"],
        "lineage_hop_id": "hop-1",
        "initiated_by": "tester",
        "status": "succeeded",
        "request_payload": {"input": "hello"},
        "response_payload": {"output": "world"},
        "response_status": 200,
        "execution_time_ms": 0,
        "error_code": None,
        "error_message": None,
        "cost": {"amount": "0.05", "currency": "EUR"},
        "cost_overrun": False,
    }


async def test_an_invocation_that_failed(api: Api) -> None:
    agent = await api.create(max_attempts=2)
    api.transport.script.extend([TIMED_OUT, REFUSED])
    invocation = (await api.invoke(agent)).json()["invocation"]
    assert [{**attempt, "at": ""} for attempt in invocation["attempts"]] == [
        {"at": "", "error": "timeout", "duration_ms": 0},
        {"at": "", "status": 418, "duration_ms": 0},
    ]
    assert invocation["error_code"] == "http_status"
    assert invocation["response_status"] == 418
    assert invocation["response_payload"] is None
    assert invocation["cost"] is None


async def test_answers_keep_their_digits(api: Api) -> None:
    text = '{"n":12345678901234567890123.10,"metadata":{"cost":"0.3000000001e"}, "z":"\\u0000"}'
    api.transport.otherwise = Outcome(status=200, answer=JsonText(text))
    answer = await api.invoke(await api.create())
    assert f'"response_payload":{text},' in answer.text


def with_canaries(schema: Any, secret_fields: frozenset[str]) -> dict[str, Any]:
    """The schema's own example, with every secret in it replaced."""
    example = schema["examples"][0]
    if secret_fields == EVERYTHING:
        return {"headers": {"X-Token": CANARY}, "nested": {"deep": [CANARY]}}
    named = dict.fromkeys(secret_fields, CANARY)
    return {**example, **{name: value for name, value in named.items() if name in schema["properties"]}}


AUTH_CASES = {
    f"auth_type {each.auth_type}": {
        "auth_type": each.auth_type,
        "auth_config": with_canaries(each.schema, each.secret_fields),
    }
    for each in AUTH_SCHEMES
}
PLATFORM_CASES = {
    f"provider {each.provider}": {
        "provider": each.provider,
        "platform_config": with_canaries(each.schema, each.secret_fields),
    }
    for each in PLATFORMS
}
CASES = {**AUTH_CASES, **PLATFORM_CASES}


@pytest.mark.parametrize("name", CASES)
async def test_secrets_are_in_no_answer(api: Api, name: str, caplog: pytest.LogCaptureFixture) -> None:
    config = copy.deepcopy(CASES[name])
    for field in ("webhook_url", "avatar_url"):
        if config.get("platform_config", {}).get(field) == CANARY:
            config["platform_config"][field] = f"https://hooks.example.com/{CANARY}"
    answers = [await api.call("POST", AGENTS, json={**AGENT, **config})]
    agent = answers[0].json()
    assert answers[0].status_code == 201, answers[0].text
    path = f"{AGENTS}/{agent['id']}"
    answers += [
        await api.call("GET", path),
        await api.call("GET", AGENTS),
        await api.call("PATCH", path, json={"name": "Other", **config}),
        await api.call("PATCH", path, json={"webhook_url": "https://other.example.com/"}),
        await api.call("PATCH", path, json={"auth_config": {"colour": CANARY, "key": {"x": CANARY}}, "tags": CANARY}),
        await api.call("POST", AGENTS, json={**AGENT, **config, "name": 7, "tags": [CANARY] * 2, "colour": CANARY}),
        await api.call("POST", AGENTS, content=f'{{"key": "{CANARY}"'.encode(), headers=JSON),
        await api.invoke(agent),
        await api.call("GET", f"{path}/invocations"),
    ]
    for outcome in (REFUSED, TIMED_OUT):
        api.transport.otherwise = outcome
        answers.append(await api.invoke(agent))
    api.policy.error = RuntimeError("out of order")
    answers.append(await api.call("GET", path))
    answers.append(await api.call("GET", path, key=CANARY))
    for answer in answers:
        assert CANARY not in answer.text, (answer.request.method, answer.request.url)
        assert CANARY not in str(answer.headers)
    assert CANARY not in caplog.text
    if name in {"auth_type custom", "auth_type none"}:
        assert agent["auth_config"] == {}
