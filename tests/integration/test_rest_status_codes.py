"""Every status on every route, and the order in which they are decided."""

from __future__ import annotations

import itertools
import json
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import httpx
import pytest

from external_agents import SecretUnreadable, Unavailable
from rest_api import AGENT, AGENTS, BODY_LIMIT_BYTES, REFUSED, TIMED_OUT, UNKNOWN_ID, Api, is_problem

JSON = {"Content-Type": "application/json"}

ROUTES = {
    "create": ("POST", AGENTS, {**AGENT}),
    "list": ("GET", AGENTS, None),
    "list all invocations": ("GET", f"{AGENTS}/invocations", None),
    "get": ("GET", f"{AGENTS}/{{agent}}", None),
    "patch": ("PATCH", f"{AGENTS}/{{agent}}", {"name": "Other"}),
    "delete": ("DELETE", f"{AGENTS}/{{agent}}", None),
    "invoke": ("POST", f"{AGENTS}/{{agent}}/invoke", {"input": "hello"}),
    "usage": ("GET", f"{AGENTS}/{{agent}}/usage", None),
    "list invocations": ("GET", f"{AGENTS}/{{agent}}/invocations", None),
    "get invocation": ("GET", f"{AGENTS}/{{agent}}/invocations/{{invocation}}", None),
}
PERMISSION = {"create": "create", "patch": "update", "delete": "delete", "invoke": "invoke"}
WITH_BODY = ["create", "patch", "invoke"]
WITH_AGENT = [name for name, (_, path, _) in ROUTES.items() if "{agent}" in path]
LISTS = [name for name in ROUTES if name.startswith("list")]


class Scene:
    """An agent with an invocation, and the routes that lead to them."""

    def __init__(self, api: Api, agent: dict[str, Any], invocation: dict[str, Any]) -> None:
        self.api, self.agent, self.invocation = api, agent, invocation

    async def call(self, route: str, *, agent_id: str = "", suffix: str = "", **options: Any) -> httpx.Response:
        method, path, document = ROUTES[route]
        ids = {"agent": agent_id or self.agent["id"], "invocation": self.invocation["id"]}
        if document is not None and "content" not in options:
            options = {"json": document, **options}
        return await self.api.call(options.pop("method", method), path.format(**ids) + suffix, **options)


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    async with Api() as api:
        agent = await api.create()
        invocation = (await api.invoke(agent)).json()
        yield Scene(api, agent, invocation)


@pytest.mark.parametrize("route", ROUTES)
class TestEveryRoute:
    async def test_succeeds(self, scene: Scene, route: str) -> None:
        assert (await scene.call(route)).status_code == {"create": 201, "delete": 204}.get(route, 200)

    @pytest.mark.parametrize("key", [None, "unknown"])
    async def test_401(self, scene: Scene, route: str, key: str | None) -> None:
        answer = await scene.call(route, key=key)
        assert is_problem(answer, 401, "unauthenticated")
        reason = ', error="invalid_token"' if key else ""
        assert answer.headers["www-authenticate"] == f'Bearer realm="external-agents"{reason}'

    async def test_403(self, scene: Scene, route: str) -> None:
        needed = f"{PERMISSION.get(route, 'read')}:external_agent"
        others = {f"{action}:external_agent" for action in ("create", "read", "update", "delete", "invoke")} - {needed}
        assert is_problem(await scene.call(route, key=scene.api.key_for("acme", others)), 403, "not-permitted")
        assert (await scene.call(route, key=scene.api.key_for("acme", [needed]))).is_success

    @pytest.mark.parametrize("method", ["PUT", "TRACE", "PROPFIND", "SPELL"])
    async def test_405(self, scene: Scene, route: str, method: str) -> None:
        answer = await scene.call(route, method=method)
        assert is_problem(answer, 405, "method-not-allowed")
        assert ROUTES[route][0] in answer.headers["allow"].split(", ")

    async def test_405_comes_after_401(self, scene: Scene, route: str) -> None:
        assert (await scene.call(route, method="PUT", key=None)).status_code == 401

    async def test_500_tells_nothing(self, scene: Scene, route: str, caplog: pytest.LogCaptureFixture) -> None:
        scene.api.policy.error = RuntimeError('select "canary" at /srv/canary 10.0.0.1')
        answer = await scene.call(route, headers={"X-Request-Id": "req-17"})
        assert is_problem(answer, 500, "internal")
        assert not {"canary", "10.0.0.1", "Traceback", "RuntimeError"} & set(answer.text.replace('"', " ").split())
        assert "canary" not in answer.text
        assert "req-17" in caplog.text
        assert "canary" in caplog.text

    async def test_503(self, scene: Scene, route: str) -> None:
        scene.api.policy.error = Unavailable("The database", retry_after_s=7)
        answer = await scene.call(route)
        assert is_problem(answer, 503, "unavailable")
        assert answer.headers["retry-after"] == "7"
        assert "invocation_id" not in answer.json()

    async def test_503_of_a_secret(self, scene: Scene, route: str, caplog: pytest.LogCaptureFixture) -> None:
        scene.api.policy.error = SecretUnreadable("key id canary is not there")
        answer = await scene.call(route)
        assert is_problem(answer, 503, "secret-unreadable")
        assert answer.headers["retry-after"]
        assert "canary" not in answer.text
        assert "canary" in caplog.text

    async def test_options(self, scene: Scene, route: str) -> None:
        answer = await scene.call(route, method="OPTIONS")
        assert answer.status_code == 200
        assert ROUTES[route][0] in answer.headers["allow"]

    async def test_trailing_slash(self, scene: Scene, route: str) -> None:
        assert (await scene.call(route, suffix="/")).is_success

    async def test_head_is_get_without_the_body(self, scene: Scene, route: str) -> None:
        if ROUTES[route][0] == "GET":
            head, get = await scene.call(route, method="HEAD"), await scene.call(route)
            assert head.status_code == 200
            assert not head.content
            assert head.headers["content-length"] == str(len(get.content))


@pytest.mark.parametrize("route", WITH_BODY)
class TestRoutesWithABody:
    @pytest.mark.parametrize("content", [b"", b"{", b"nope", b"\xff", b"{} {}", b"NaN", b"[" * 600 + b"]" * 600])
    async def test_400_malformed(self, scene: Scene, route: str, content: bytes) -> None:
        assert is_problem(await scene.call(route, content=content, headers=JSON), 400, "malformed")

    async def test_413(self, scene: Scene, route: str) -> None:
        answer = await scene.call(route, content=b'"' + b"x" * BODY_LIMIT_BYTES + b'"', headers=JSON)
        assert is_problem(answer, 413, "too-large")

    async def test_415(self, scene: Scene, route: str) -> None:
        answer = await scene.call(route, content=b"{}", headers={"Content-Type": "text/plain"})
        assert is_problem(answer, 415, "unsupported-media-type")


@pytest.mark.parametrize("route", WITH_AGENT)
class TestRoutesToAnAgent:
    @pytest.mark.parametrize(
        "agent_id",
        [UNKNOWN_ID, "1", "nope", f"{{{UNKNOWN_ID}}}", UNKNOWN_ID.replace("-", ""), f"urn:uuid:{UNKNOWN_ID}", "%00"],
    )
    async def test_404_all_alike(self, scene: Scene, route: str, agent_id: str) -> None:
        answer = await scene.call(route, agent_id=agent_id)
        assert is_problem(answer, 404, "not-found")
        assert answer.json()["detail"] == "No such agent."

    async def test_an_id_in_capitals_is_the_same_id(self, scene: Scene, route: str) -> None:
        assert (await scene.call(route, agent_id=scene.agent["id"].upper())).is_success

    async def test_a_deleted_agent(self, scene: Scene, route: str) -> None:
        await scene.call("delete")
        answer = await scene.call(route)
        if route in {"list invocations", "get invocation"}:
            assert answer.status_code == 200
        else:
            assert is_problem(answer, 404, "not-found")


async def test_404_of_invocations(scene: Scene) -> None:
    other = await scene.api.create()
    for agent_id, invocation_id in [
        (scene.agent["id"], UNKNOWN_ID),
        (scene.agent["id"], "nope"),
        (other["id"], scene.invocation["id"]),
    ]:
        answer = await scene.api.call("GET", f"{AGENTS}/{agent_id}/invocations/{invocation_id}")
        assert is_problem(answer, 404, "not-found")
        assert answer.json()["detail"] == "No such invocation."


@pytest.mark.parametrize("path", ["/", "/nope", "/api", f"{AGENTS}x", f"{AGENTS}/{UNKNOWN_ID}/nope", "/metrics"])
async def test_404_where_nothing_is(scene: Scene, path: str) -> None:
    for key in (None, ""):
        assert is_problem(await scene.api.call("GET", path, key=key), 404, "no-such-route")


@pytest.mark.parametrize("route", LISTS)
async def test_400_of_a_query(scene: Scene, route: str) -> None:
    assert is_problem(await scene.call(route, suffix="?limit=0"), 400, "invalid")


async def test_400_names_every_fault(scene: Scene) -> None:
    answer = await scene.call("create", json={"provider": "teams", "auth_type": "oauth2", "auth_config": {}, "id": "x"})
    assert is_problem(answer, 400, "invalid")
    paths = {fault["path"] for fault in answer.json()["errors"]}
    assert {"name", "webhook_url", "auth_config.client_id", "auth_config.token_url", "platform_config", "id"} <= paths


class TestInvoking:
    async def test_409(self, scene: Scene) -> None:
        await scene.call("patch", json={"status": "inactive"})
        assert is_problem(await scene.call("invoke"), 409, "agent-inactive")

    async def test_429(self, scene: Scene) -> None:
        await scene.call("patch", json={"rate_limit_config": {"requests_per_minute": 1}})
        answer = await scene.call("invoke")
        assert is_problem(answer, 429, "rate-limited")
        assert 1 <= int(answer.headers["retry-after"]) <= 62
        assert answer.headers["ratelimit-policy"] == '"minute";q=1;w=60'
        assert answer.headers["ratelimit"] == f'"minute";r=0;t={answer.headers["retry-after"]}'

    async def test_402(self, scene: Scene) -> None:
        limits = {"rate_limit_config": {"requests_per_day": 5}, "budget_config": {"max_monthly_cost": 0}}
        await scene.call("patch", json=limits)
        answer = await scene.call("invoke")
        assert is_problem(answer, 402, "budget-exceeded")
        assert answer.headers["ratelimit-policy"] == '"day";q=5;w=86400'
        assert answer.headers["ratelimit"].startswith('"day";r=4;t=')

    @pytest.mark.parametrize(
        ("outcome", "status", "name"), [(REFUSED, 502, "agent-failed"), (TIMED_OUT, 504, "agent-timed-out")]
    )
    async def test_502_and_504_carry_the_invocation(self, scene: Scene, outcome: Any, status: int, name: str) -> None:
        await scene.call("patch", json={"rate_limit_config": {"requests_per_hour": 9}})
        scene.api.transport.otherwise = outcome
        answer = await scene.call("invoke")
        assert is_problem(answer, status, name)
        shown = answer.json()["invocation"]
        assert shown["status"] == "failed"
        path = f"{AGENTS}/{scene.agent['id']}/invocations/{shown['id']}"
        assert (await scene.api.call("GET", path)).json() == shown
        assert answer.headers["ratelimit"].startswith('"hour";r=7;t=')
        assert answer.headers["ratelimit-policy"] == '"hour";q=9;w=3600'

    async def test_the_last_attempt_decides(self, scene: Scene) -> None:
        busy = type(REFUSED)(error=REFUSED.error, status=503)
        scene.api.transport.script.extend([TIMED_OUT, TIMED_OUT, busy])
        assert is_problem(await scene.call("invoke"), 502, "agent-failed")
        scene.api.transport.script.extend([busy, busy, TIMED_OUT])
        assert is_problem(await scene.call("invoke"), 504, "agent-timed-out")

    async def test_503_with_the_id_of_what_has_run(self, scene: Scene) -> None:
        scene.api.policy.error = Unavailable("The ledger", invocation_id=UUID(UNKNOWN_ID))
        answer = await scene.call("invoke")
        assert is_problem(answer, 503, "unavailable")
        assert answer.json()["invocation_id"] == UNKNOWN_ID


ORDER = {
    "create": [401, 413, 415, "malformed", 403, "invalid"],
    "patch": [401, 413, 415, "malformed", 404, 403, 412, "invalid"],
    "invoke": [401, 413, 415, "malformed", 404, 403, "invalid", 409, 422, 429, 402],
    "delete": [401, 404, 403, 412],
    "usage": [401, 404, 403],
    "list": [401, 403, "invalid"],
    "list invocations": [401, 404, 403, "invalid"],
}


KEY = "order-17"


def faulty(scene: Scene, route: str, faults: frozenset[int | str]) -> dict[str, Any]:
    """A request that has all of these faults."""
    headers = dict(JSON)
    options: dict[str, Any] = {}
    if 401 in faults:
        options["key"] = None
    elif 403 in faults:
        options["key"] = scene.api.key_for("acme", [])
    if 404 in faults:
        options["agent_id"] = UNKNOWN_ID
    if 412 in faults:
        headers["If-Match"] = '"99"'
    if "invalid" in faults and route == "invoke":
        headers["X-Lineage-Hop-Id"] = "x" * 201
    if 422 in faults:
        headers["Idempotency-Key"] = KEY
    if "invalid" in faults and route.startswith("list"):
        options["suffix"] = "?limit=x&limit=y&colour=red"
    if ROUTES[route][2] is not None:
        content = json.dumps({"colour": "red"} if "invalid" in faults and route != "invoke" else ROUTES[route][2])
        content = content if "malformed" not in faults else content + "}"
        options["content"] = content.encode() + (b" " * BODY_LIMIT_BYTES if 413 in faults else b"")
        headers["Content-Type"] = "text/plain" if 415 in faults else "application/json"
    return {"headers": headers, **options}


@pytest.mark.parametrize("route", ORDER)
async def test_the_first_of_several_faults_is_told(scene: Scene, route: str) -> None:
    order = ORDER[route]
    pairs = [frozenset(pair) for pair in itertools.combinations(order, 2)]
    tails = [frozenset(order[start:]) for start in range(len(order))]
    for faults in pairs + tails:
        agent = await scene.api.create()
        await scene.api.invoke(agent, json="another payload", headers={"Idempotency-Key": KEY})
        changes = {
            "status": "inactive" if 409 in faults else "active",
            "rate_limit_config": {"requests_per_minute": 0 if 429 in faults else 1000},
            "budget_config": {"max_monthly_cost": 0 if 402 in faults else 1000},
        }
        await scene.call("patch", agent_id=agent["id"], json=changes)
        expected = next(fault for fault in order if fault in faults)
        answer = await scene.call(route, **{"agent_id": agent["id"], **faulty(scene, route, faults)})
        assert answer.status_code == (400 if isinstance(expected, str) else expected), (faults, answer.text)
        if isinstance(expected, str):
            assert answer.json()["type"].endswith(expected), faults


async def test_health(scene: Scene) -> None:
    answer = await scene.api.call("GET", "/healthz", key=None)
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


async def test_readiness(scene: Scene) -> None:
    answer = await scene.api.call("GET", "/readyz", key=None)
    ok = {"database": "ok", "schema": "ok", "keys": "ok"}
    assert (answer.status_code, answer.json()) == (200, {"status": "ready", "checks": ok})
    scene.api.checks["schema"] = "is behind: run external-agents migrate"
    answer = await scene.api.call("GET", "/readyz", key=None)
    assert is_problem(answer, 503, "not-ready")
    assert answer.json()["checks"] == {**ok, "schema": "is behind: run external-agents migrate"}
    assert "schema" in answer.json()["detail"]
    assert answer.headers["retry-after"]
    assert (await scene.api.call("GET", "/healthz", key=None)).status_code == 200


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/openapi.json", "/docs", "/docs/init.js"])
async def test_open_routes_take_no_other_method(scene: Scene, path: str) -> None:
    answer = await scene.api.call("POST", path, key=None)
    assert is_problem(answer, 405, "method-not-allowed")
    assert answer.headers["allow"] == "GET, HEAD"
    assert (await scene.api.call("HEAD", path, key=None)).status_code == 200
