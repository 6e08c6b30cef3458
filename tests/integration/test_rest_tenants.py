"""
Tenants apart, on every route that the app has: who gets 401, 403 and 404, and that another organisation's agents do not
exist. On a real PostgreSQL, with real API keys and policies; a route without a case fails the test of the table.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import falcon.inspect
import httpx
import pytest

from external_agents.adapters.identity.tokens import ApiKeyToken
from external_agents.adapters.rest import API_PREFIX
from external_agents.adapters.rest.resources import Resource
from external_agents.domain.access import PERMISSIONS
from rest_api import Api
from serve import agent_document, is_problem
from two_organisations import CANARY, ONE, ROUTES, UNKNOWN, World, case_of, parameters_of

OPEN = {"/healthz", "/readyz", "/metrics", "/openapi.json", "/docs", "/docs/{name}"}
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
