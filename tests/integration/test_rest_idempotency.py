"""Idempotency-Key over HTTP: the first answer again, and what stands against that."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from external_agents import Outcome
from external_agents.domain.idempotency import KEPT_FOR
from external_agents.testing.fakes import Gate
from rest_api import AGENT, AGENTS, REFUSED, TIMED_OUT, Api, is_problem, paths_of

KEY = "order-17"
JSON = {"Content-Type": "application/json"}
LIMITS = {
    "rate_limit_config": {"requests_per_minute": 3},
    "budget_config": {"max_cost_per_invocation": "0.1", "max_monthly_cost": 1},
}


@pytest.fixture
async def api() -> AsyncIterator[Api]:
    async with Api() as api:
        yield api


async def keyed(
    api: Api, agent: dict[str, Any], key: str | bytes = KEY, *, as_: str = "", **options: Any
) -> httpx.Response:
    """`as_`: whose API key."""
    headers = [("Idempotency-Key", key), *options.pop("headers", [])]
    return await api.invoke(agent, headers=headers, key=as_, **options)


async def usage(api: Api, agent: dict[str, Any]) -> Any:
    answer = await api.call("GET", f"{AGENTS}/{agent['id']}/usage")
    return answer.json()


@pytest.mark.parametrize(("outcome", "status"), [(None, 200), (REFUSED, 502), (TIMED_OUT, 504)])
async def test_the_first_answer_comes_again(api: Api, outcome: Outcome | None, status: int) -> None:
    agent = await api.create(max_attempts=1, **LIMITS)
    if outcome is not None:
        api.transport.script.append(outcome)
    first = await keyed(api, agent)
    assert first.status_code == status
    assert "idempotent-replayed" not in first.headers
    before = await usage(api, agent)
    for _ in range(5):
        again = await keyed(api, agent)
        assert (again.status_code, again.content) == (status, first.content)
        assert again.headers["idempotent-replayed"] == "true"
        assert again.headers["ratelimit"] == first.headers["ratelimit"]
        assert again.headers["ratelimit-policy"] == first.headers["ratelimit-policy"]
    assert len(api.transport.requests) == 1
    assert await usage(api, agent) == before
    listed = (await api.call("GET", f"{AGENTS}/{agent['id']}/invocations")).json()["items"]
    assert listed == [first.json() if status == 200 else first.json()["invocation"]]


async def test_the_agent_gets_our_key_not_the_callers(api: Api) -> None:
    invocation = (await keyed(api, await api.create())).json()
    assert api.transport.requests[0].headers["Idempotency-Key"] == invocation["id"]


async def test_equal_json_in_another_spelling(api: Api) -> None:
    agent = await api.create()
    first = await keyed(api, agent, content=b'{"a": [1, 2.50], "b": "\xc3\xbc"}', headers=list(JSON.items()))
    again = await keyed(api, agent, content=b'{"b":"\\u00fc","a":[1e0,25e-1]}', headers=list(JSON.items()))
    assert again.headers["idempotent-replayed"] == "true"
    assert again.content == first.content, "the payload as it came first"


async def test_the_key_with_another_payload_is_422(api: Api) -> None:
    agent = await api.create(**LIMITS)
    first = await keyed(api, agent)
    before = await usage(api, agent)
    refusal = await keyed(api, agent, json={"input": "bye"})
    assert is_problem(refusal, 422, "idempotency-key-reused")
    assert "retry-after" not in refusal.headers
    assert await usage(api, agent) == before
    assert (await keyed(api, agent)).content == first.content
    assert len(api.transport.requests) == 1


async def test_while_the_first_runs_it_is_409(api: Api) -> None:
    agent = await api.create(**LIMITS)
    gate = Gate()
    api.transport.script.append(gate)
    running = asyncio.create_task(keyed(api, agent))
    await gate.entered.wait()
    before = await usage(api, agent)
    for _ in range(2):
        refusal = await keyed(api, agent)
        assert is_problem(refusal, 409, "idempotency-key-in-flight")
        assert int(refusal.headers["retry-after"]) >= 1
    assert is_problem(await keyed(api, agent, json="another"), 422, "idempotency-key-reused")
    assert await usage(api, agent) == before
    gate.opened.set()
    assert (await keyed(api, agent)).content == (await running).content


async def test_of_many_at_once_one_reaches_the_agent(api: Api) -> None:
    agent = await api.create()
    answers = await asyncio.gather(*(keyed(api, agent) for _ in range(20)))
    assert {answer.status_code for answer in answers} <= {200, 409}
    assert len({answer.json()["id"] for answer in answers if answer.status_code == 200}) == 1
    assert len(api.transport.requests) == 1


async def test_what_stands_before_and_behind_a_key(api: Api) -> None:
    agent = await api.create(rate_limit_config={"requests_per_minute": 1})
    path = f"{AGENTS}/{agent['id']}"
    first = await keyed(api, agent)
    assert is_problem(await keyed(api, agent, "another"), 429, "rate-limited")
    assert (await keyed(api, agent)).content == first.content
    await api.call("PATCH", path, json={"rate_limit_config": None, "budget_config": {"max_monthly_cost": 0}})
    assert is_problem(await keyed(api, agent, "another"), 402, "budget-exceeded")
    assert (await keyed(api, agent)).content == first.content
    assert is_problem(await keyed(api, agent, json=[]), 422, "idempotency-key-reused")
    await api.call("PATCH", path, json={"status": "inactive"})
    assert is_problem(await keyed(api, agent), 409, "agent-inactive")
    await api.call("PATCH", path, json={"status": "active", "budget_config": None})
    assert "idempotent-replayed" not in (await keyed(api, agent, "another")).headers, "a refusal kept no key"
    await api.call("DELETE", path)
    assert is_problem(await keyed(api, agent), 404, "not-found")


async def test_a_key_is_one_agents_and_one_organisations(api: Api) -> None:
    mine, other = await api.create(), await api.create()
    theirs = (await api.call("POST", AGENTS, key=api.key_for("other"), json=AGENT)).json()
    answers = [await keyed(api, mine), await keyed(api, other), await keyed(api, theirs, as_=api.key_for("other"))]
    assert len({answer.json()["id"] for answer in answers}) == 3
    assert is_problem(await keyed(api, mine, as_=api.key_for("other")), 404, "not-found")


async def test_24_hours(api: Api) -> None:
    agent = await api.create()
    first = await keyed(api, agent)
    api.clock.advance(KEPT_FOR.total_seconds() - 1)
    assert (await keyed(api, agent)).content == first.content
    api.clock.advance(1)
    assert (await keyed(api, agent, json="another payload")).status_code == 200
    assert len(api.transport.requests) == 2


@pytest.mark.parametrize(
    "key", ["k", "x" * 255, '"quoted"', "a b", "a,b", "ключ".encode(), "ü".encode() * 255, b"\xfc" * 255]
)
async def test_keys(api: Api, key: str | bytes) -> None:
    agent = await api.create()
    first = await keyed(api, agent, key)
    assert first.status_code == 200, first.text
    assert (await keyed(api, agent, key)).headers["idempotent-replayed"] == "true"
    assert "idempotent-replayed" not in (await keyed(api, agent, "other")).headers


@pytest.mark.parametrize("keys", [[""], ["  "], ["x" * 256], ["ü".encode() * 256], ["a", "b"], ["a", "a"], ["a", ""]])
async def test_what_is_no_key(api: Api, keys: list[Any]) -> None:
    agent = await api.create(**LIMITS)
    answer = await api.invoke(agent, headers=[("Idempotency-Key", key) for key in keys])
    assert paths_of(answer) == ["Idempotency-Key"]
    both = await api.invoke(agent, headers=[("Idempotency-Key", ""), ("X-Lineage-Hop-Id", "x" * 201)])
    assert paths_of(both) == ["Idempotency-Key", "lineage_hop_id"]
    assert not api.transport.requests
    assert (await usage(api, agent))["rate_limit"]["minute"]["used"] == 0


async def test_without_a_key_every_call_is_one(api: Api) -> None:
    agent = await api.create()
    assert len({(await api.invoke(agent)).json()["id"] for _ in range(3)}) == 3
