"""
Tenants apart, on every route that the app has: who gets 401, 403 and 404, and that another organisation's agents do not
exist. On a real PostgreSQL, with real API keys and policies; a route without a case here fails the test of the table.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import AsyncIterator, Iterator, Mapping
from datetime import timedelta
from typing import Any

import attrs
import falcon.inspect
import httpx
import pytest

from agents import Agent
from external_agents.adapters.identity.tokens import ApiKeyToken
from external_agents.adapters.rest import API_PREFIX, create_app
from external_agents.adapters.rest.resources import Resource
from external_agents.bootstrap import Installation, open_installation
from external_agents.domain.access import PERMISSIONS, Action
from external_agents.settings import Settings
from postgres_server import PostgresServer
from rest_api import Api
from serve import agent_document, bearer, is_problem, rows

CANARY = "canary-8f2e71"
AGENT, INVOCATION = "{agent_id}", "{agent_id}/invocations/{invocation_id}"
ONE = f"{API_PREFIX}/{AGENT}"
UNKNOWN = {"agent_id": "019ab0c5-7a52-7f3e-9c1d-2b8f4a6e0d13", "invocation_id": "019ab0c6-01d4-7b20-8f6a-5c3e9d7a1b42"}
SETTINGS = {"SECRET_KEYS": "k1:MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=", "EGRESS_ALLOW": "loopback"}
_numbers = itertools.count(1)
OPEN = {"/healthz", "/readyz", "/metrics", "/openapi.json", "/docs", "/docs/{name}"}


@attrs.frozen
class Case:
    """What a route needs, and a body that it takes."""

    action: Action
    body: Any = None


CASES = {
    ("POST", API_PREFIX): Case(Action.CREATE, agent_document("https://agent.example.com/")),
    ("GET", API_PREFIX): Case(Action.READ),
    ("GET", f"{API_PREFIX}/invocations"): Case(Action.READ),
    ("GET", ONE): Case(Action.READ),
    ("PATCH", ONE): Case(Action.UPDATE, {"name": "Mine"}),
    ("DELETE", ONE): Case(Action.DELETE),
    ("POST", f"{ONE}/invoke"): Case(Action.INVOKE, {"input": "hello"}),
    ("GET", f"{ONE}/usage"): Case(Action.READ),
    ("GET", f"{ONE}/invocations"): Case(Action.READ),
    ("GET", f"{API_PREFIX}/{INVOCATION}"): Case(Action.READ),
}
ROUTES = sorted(CASES | {("HEAD", path): case for (method, path), case in CASES.items() if method == "GET"})


def case_of(method: str, path: str) -> Case:
    return CASES["GET" if method == "HEAD" else method, path]


def parameters_of(path: str) -> list[str]:
    return re.findall(r"\{(\w+)\}", path)


TO_IDS = [(method, path) for method, path in ROUTES if parameters_of(path)]


def test_every_route_of_the_app_has_a_case() -> None:
    guarded = {
        (method.method, route.path)
        for route in falcon.inspect.inspect_routes(Api().app)
        for method in route.methods
        if route.path not in OPEN and not method.internal and method.method not in {"OPTIONS", "WEBSOCKET"}
    }
    assert guarded == set(ROUTES)
    assert {name for _, path in ROUTES for name in parameters_of(path)} == set(UNKNOWN), "ids to put there"


def test_nothing_is_open_that_is_not_meant_to_be() -> None:
    router = Api().app._router
    for route in falcon.inspect.inspect_routes(Api().app):
        resource, *_ = router.find(route.path)
        assert isinstance(resource, Resource)
        assert resource.is_open == (route.path in OPEN)


@attrs.frozen
class World:
    """
    Two organisations with the same kind of things.

    Attributes:
        ids: By organisation, what path parameters may be filled with.
        keys: By organisation, a key with every permission.
    """

    installation: Installation
    client: httpx.AsyncClient
    url: str
    agent: Agent
    victim: str
    stranger: str
    ids: dict[str, dict[str, str]] = attrs.field(factory=dict)
    keys: dict[str, str] = attrs.field(factory=dict)

    async def key(self, org_id: str, permissions: Any = None, expires_in: timedelta | None = None) -> str:
        key, _ = await self.installation.api_keys.issue(org_id, "tester", permissions, expires_in=expires_in)
        return key

    async def populate(self, org_id: str, word: str) -> None:
        self.keys[org_id] = await self.key(org_id)
        document = agent_document(self.agent.url, name=word, description=word, tags=[word])
        document |= {"rate_limit_config": {"requests_per_day": 9}, "budget_config": {"max_monthly_cost": 9}}
        made = await self.ask("POST", API_PREFIX, key=self.keys[org_id], json=document)
        ids = {"agent_id": made.json()["id"]}
        options = {"json": {"input": word}, "headers": {"Idempotency-Key": "order-17"}}
        invoked = await self.ask("POST", f"{ONE}/invoke", ids, key=self.keys[org_id], **options)
        assert invoked.status_code == 200, invoked.text
        self.ids[org_id] = {**ids, "invocation_id": invoked.json()["id"]}

    async def ask(
        self, method: str, path: str, ids: Mapping[str, str] = UNKNOWN, *, key: str | None, **options: Any
    ) -> httpx.Response:
        fields = {**(bearer(key) if key is not None else {}), **options.pop("headers", {})}
        return await self.client.request(method, path.format(**ids), headers=fields, **options)

    async def route(
        self, method: str, path: str, ids: Mapping[str, str], key: str | None, **headers: str
    ) -> httpx.Response:
        """Asked with a body that is fine."""
        body = case_of(method, path).body
        return await self.ask(method, path, ids, key=key, headers=headers, **({} if body is None else {"json": body}))

    def belongings(self, org_id: str) -> dict[str, Any]:
        """All that the database holds of an organisation, beside its keys; and what its agent was asked."""
        tables = rows(
            self.url, "SELECT DISTINCT table_name FROM information_schema.columns WHERE column_name = 'org_id'"
        )
        names = sorted(table["table_name"] for table in tables if "api_key" not in table["table_name"])
        assert "external_agents" in names
        found = {name: rows(self.url, f"SELECT * FROM {name} WHERE org_id = %s", org_id) for name in names}
        return {**{name: sorted(map(str, held)) for name, held in found.items()}, "asked": len(self.agent.requests)}


@pytest.fixture(scope="module")
async def installed(
    postgres_server: PostgresServer, postgres_url_template: str
) -> AsyncIterator[tuple[Installation, httpx.AsyncClient, str]]:
    """One installation for all tests here: each has organisations of its own."""
    environment = {f"EXTERNAL_AGENTS_{name}": text for name, text in SETTINGS.items()}
    with postgres_server.database(postgres_url_template) as name:
        url = postgres_server.url(name)
        settings = Settings.from_env({**environment, "EXTERNAL_AGENTS_DATABASE_URL": url})
        async with open_installation(settings, url) as installation:
            app = create_app(installation.service, authenticator=installation.authenticator)
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://api.test") as client:
                yield installation, client, url


@pytest.fixture
async def world(installed: tuple[Installation, httpx.AsyncClient, str], agent_server: Agent) -> World:
    number = next(_numbers)
    world = World(*installed, agent_server, victim=f"acme-{number}", stranger=f"umbrella-{number}")
    await world.populate(world.victim, CANARY)
    await world.populate(world.stranger, "plain")
    return world


def whole(answer: httpx.Response) -> tuple[Any, ...]:
    """All of an answer but the request's own id."""
    return answer.status_code, {**answer.headers, "x-request-id": ""}, answer.content


def problem(answer: httpx.Response, status: int) -> None:
    if answer.request.method == "HEAD":
        assert answer.status_code == status
    else:
        is_problem(answer, status)


def aims(path: str, own: Mapping[str, str], others: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """The ids of a path with some of them, then all, from `others`."""
    names = parameters_of(path)
    for count in range(1, len(names) + 1):
        for chosen in itertools.combinations(names, count):
            yield {**own, **{name: others[name] for name in chosen}}


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_nobody_without_good_credentials_learns_anything(world: World, method: str, path: str) -> None:
    before = world.belongings(world.victim)
    good = await world.key(world.victim)
    revoked = await world.key(world.victim)
    token = ApiKeyToken.parse(revoked)
    assert token is not None
    assert await world.installation.api_keys.revoke(token.key_id)
    expired = await world.key(world.victim, expires_in=timedelta(microseconds=1))
    unknown = good[:-1] + ("A" if good[-1] != "A" else "B")
    for key in (None, "", "nonsense", "a b", unknown, revoked, expired):
        answers = [
            await world.route(method, path, ids, key)
            for ids in (world.ids[world.victim], UNKNOWN, dict.fromkeys(UNKNOWN, "x"))
        ]
        for answer in answers:
            problem(answer, 401)
            assert whole(answer) == whole(answers[0]), "401 comes before everything else"
    headers = {"Content-Type": "text/plain"}
    problem(await world.ask(method, path, world.ids[world.victim], key=expired, content=b"{", headers=headers), 401)
    assert world.belongings(world.victim) == before


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_each_permission_is_needed_where_it_is_and_nowhere_else(world: World, method: str, path: str) -> None:
    needed = case_of(method, path).action.permission
    ids = world.ids[world.victim]
    before = world.belongings(world.victim)
    for permissions in [set(PERMISSIONS) - {needed}, *({each} for each in PERMISSIONS if each != needed), set()]:
        key = await world.key(world.victim, permissions)
        problem(await world.route(method, path, ids, key), 403)
        if parameters_of(path):
            problem(await world.route(method, path, UNKNOWN, key), 404)
        if case_of(method, path).body is not None and path != f"{ONE}/invoke":
            problem(await world.ask(method, path, ids, key=key, json={"unknown": 1}), 403)
    assert world.belongings(world.victim) == before
    assert (await world.route(method, path, ids, await world.key(world.victim, {needed}))).is_success


@pytest.mark.parametrize(("method", "path"), TO_IDS)
async def test_what_is_anothers_is_answered_like_what_is_not_there(world: World, method: str, path: str) -> None:
    before = world.belongings(world.victim)
    own, others = world.ids[world.stranger], world.ids[world.victim]
    all_powerful = world.keys[world.stranger]
    for key in (all_powerful, await world.key(world.stranger, set())):
        for foreign, unknown in zip(aims(path, own, others), aims(path, own, UNKNOWN), strict=True):
            for headers in ({}, {"If-Match": '"9"'}, {"If-None-Match": "*"}, {"Idempotency-Key": "order-17"}):
                answers = [await world.route(method, path, ids, key, **headers) for ids in (foreign, unknown)]
                problem(answers[0], 404)
                assert whole(answers[0]) == whole(answers[1])
                assert CANARY not in answers[0].text
    if case_of(method, path).body is not None:
        for content, content_type, status in [(b"{", "application/json", 400), (b"{}", "text/plain", 415)]:
            answers = [
                await world.ask(
                    method, path, ids, key=all_powerful, content=content, headers={"Content-Type": content_type}
                )
                for ids in (others, UNKNOWN)
            ]
            problem(answers[0], status)
            assert whole(answers[0]) == whole(answers[1])
    assert world.belongings(world.victim) == before
    assert (await world.route(method, path, own, all_powerful)).is_success, "the same call on what is its own"


@pytest.mark.parametrize("path", [path for method, path in ROUTES if method == "GET" and path.count("{") < 2])
async def test_no_list_shows_or_counts_what_is_anothers(world: World, path: str) -> None:
    """Whatever is asked for."""
    key, own, before = world.keys[world.stranger], world.ids[world.stranger], world.belongings(world.victim)
    queries: list[dict[str, Any]] = [
        {},
        {"limit": 100},
        {"q": CANARY},
        {"tag": CANARY},
        {"q": "%"},
        {"status": "active"},
    ]
    after_everything = "_" * 21 + "w"
    queries += [{"cursor": after_everything}, {"status": "succeeded"}, {"status": "deleted"}]
    for query in queries:
        answer = await world.ask("GET", path, own, key=key, params=query)
        assert answer.status_code in {200, 400}
        assert not [word for word in (world.victim, *world.ids[world.victim].values()) if word in answer.text]
        assert "total" not in answer.json() or answer.json()["total"] <= 1
    assert world.belongings(world.victim) == before


async def test_an_idempotency_key_of_another_organisation_gives_no_answer_of_its(world: World) -> None:
    options = {"json": {"input": CANARY}, "headers": {"Idempotency-Key": "order-18"}}
    theirs = await world.ask("POST", f"{ONE}/invoke", world.ids[world.victim], key=world.keys[world.victim], **options)
    ours = await world.ask(
        "POST", f"{ONE}/invoke", world.ids[world.stranger], key=world.keys[world.stranger], **options
    )
    assert ours.status_code == 200
    assert "idempotent-replayed" not in ours.headers
    assert ours.json()["id"] != theirs.json()["id"]
    assert ours.json()["org_id"] == world.stranger


async def test_the_organisation_comes_from_the_credentials_alone(world: World) -> None:
    document = agent_document(world.agent.url)
    headers = {"X-Org-Id": world.victim}
    key = world.keys[world.stranger]
    refused = await world.ask("POST", API_PREFIX, key=key, json={**document, "org_id": world.victim}, headers=headers)
    assert [fault["path"] for fault in is_problem(refused, 400)["errors"]] == ["org_id"]
    made = await world.ask("POST", API_PREFIX, key=key, json=document, headers=headers)
    assert made.json()["org_id"] == world.stranger
