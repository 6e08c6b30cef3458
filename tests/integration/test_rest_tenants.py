"""Another organisation's agents do not exist, on any route that there is."""

from __future__ import annotations

from typing import Any

import falcon.inspect
import httpx
import pytest

from rest_api import AGENT, AGENTS, UNKNOWN_ID, Api, is_problem

ROUTES = [
    (method.method, route.path)
    for route in falcon.inspect.inspect_routes(Api().app)
    for method in route.methods
    if route.path.startswith(AGENTS) and method.method not in {"OPTIONS", "WEBSOCKET"} and not method.internal
]
TO_ONE_AGENT = [(method, path) for method, path in ROUTES if "{agent_id}" in path]
BODIES: dict[str, Any] = {"POST": {"input": "hello"}, "PATCH": {"name": "Mine"}}


def test_the_table_is_whole() -> None:
    assert {(method, path.removeprefix(AGENTS)) for method, path in ROUTES if method != "HEAD"} == {
        ("POST", ""),
        ("GET", ""),
        ("GET", "/invocations"),
        ("GET", "/{agent_id}"),
        ("PATCH", "/{agent_id}"),
        ("DELETE", "/{agent_id}"),
        ("POST", "/{agent_id}/invoke"),
        ("GET", "/{agent_id}/usage"),
        ("GET", "/{agent_id}/invocations"),
        ("GET", "/{agent_id}/invocations/{invocation_id}"),
    }


def without_ids(answer: httpx.Response) -> tuple[Any, ...]:
    headers = {name: value for name, value in answer.headers.items() if name != "x-request-id"}
    return answer.status_code, headers, answer.content


@pytest.mark.parametrize(("method", "path"), TO_ONE_AGENT)
async def test_a_foreign_agent_is_answered_like_an_unknown_one(method: str, path: str) -> None:
    async with Api() as api:
        agent = await api.create()
        invocation = (await api.invoke(agent)).json()
        calls = len(api.transport.requests)
        stranger = {"key": api.key_for("umbrella")}

        async def ask(agent_id: str, invocation_id: str, **options: Any) -> httpx.Response:
            target = path.format(agent_id=agent_id, invocation_id=invocation_id)
            if method in BODIES:
                options["json"] = BODIES[method]
            return await api.call(method, target, **options)

        foreign = await ask(agent["id"], invocation["id"], **stranger)
        unknown = await ask(UNKNOWN_ID, invocation["id"], **stranger)
        assert foreign.status_code == 404
        if method != "HEAD":
            assert is_problem(foreign, 404, "not-found")
        assert without_ids(foreign) == without_ids(unknown)
        powerless = await ask(agent["id"], invocation["id"], key=api.key_for("umbrella", []))
        assert without_ids(powerless) == without_ids(unknown)
        assert len(api.transport.requests) == calls
        assert (await api.call("GET", f"{AGENTS}/{agent['id']}")).json() == agent
        assert (await ask(agent["id"], invocation["id"])).is_success


async def test_lists_hold_the_own_organisation_only() -> None:
    async with Api() as api:
        mine = await api.create()
        await api.invoke(mine)
        stranger = api.key_for("umbrella")
        theirs = (await api.call("POST", AGENTS, key=stranger, json=AGENT)).json()
        await api.invoke(theirs, key=stranger)
        for key, org_id, agent in [("", "acme", mine), (stranger, "umbrella", theirs)]:
            agents = (await api.call("GET", AGENTS, key=key)).json()
            assert [item["id"] for item in agents["items"]] == [agent["id"]]
            assert agents["total"] == 1
            invocations = (await api.call("GET", f"{AGENTS}/invocations", key=key)).json()
            assert [(item["org_id"], item["external_agent_id"]) for item in invocations["items"]] == [
                (org_id, agent["id"])
            ]


async def test_the_organisation_comes_from_the_credentials_alone() -> None:
    async with Api() as api:
        answer = await api.call("POST", AGENTS, json={**AGENT, "org_id": "umbrella"}, headers={"X-Org-Id": "umbrella"})
        assert [fault["path"] for fault in answer.json()["errors"]] == ["org_id"]
        assert (await api.create())["org_id"] == "acme"
