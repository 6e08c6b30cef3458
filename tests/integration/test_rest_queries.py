"""Query parameters: filters, pages, cursors, and everything that is none of them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rest_api import AGENTS, UNKNOWN_ID, Api, is_problem, paths_of


@pytest.fixture
async def api() -> AsyncIterator[Api]:
    async with Api() as api:
        yield api


LISTS = [AGENTS, f"{AGENTS}/invocations"]
RESERVED = ["self", "principal", "agent_id", "unknown", "cls", "kwargs", "return", "_", ""]


@pytest.mark.parametrize("name", [*RESERVED, "colour", "Page", "%00", "%ff", "%ed%a0%80", "status[]"])
@pytest.mark.parametrize("path", LISTS)
async def test_unknown_parameters(api: Api, path: str, name: str) -> None:
    answer = await api.call("GET", f"{path}?{name}={UNKNOWN_ID}")
    [told] = paths_of(answer)
    if name.isidentifier():
        assert told == name


async def test_every_fault_at_once(api: Api) -> None:
    query = "limit=0&page=x&status=gone&provider=fax&colour=red&tag=a&tag=b&q=%00"
    assert paths_of(await api.call("GET", f"{AGENTS}?{query}")) == sorted(
        ["limit", "page", "status", "provider", "colour", "tag", "q"]
    )
    query = "limit=101&since=yesterday&until=2026-01-01T00:00:00&status=gone&cursor=~&colour=red&self=1"
    assert paths_of(await api.call("GET", f"{AGENTS}/invocations?{query}")) == sorted(
        ["limit", "since", "until", "status", "cursor", "colour", "self"]
    )


@pytest.mark.parametrize("path", LISTS)
@pytest.mark.parametrize("query", ["limit=1&limit=1", "status=%ff", "limit=%ff", "limit=", "limit=1.5", "limit=+1"])
async def test_values_that_are_not_one_value(api: Api, path: str, query: str) -> None:
    assert paths_of(await api.call("GET", f"{path}?{query}")) == [query.split("=", 1)[0]]


@pytest.mark.parametrize("query", ["colour=red", "limit=1&limit=2", "principal=x"])
async def test_permission_and_existence_come_before_faults(api: Api, query: str) -> None:
    powerless = api.key_for("acme", [])
    for path in LISTS:
        assert is_problem(await api.call("GET", f"{path}?{query}", key=powerless), 403, "not-permitted")
    answer = await api.call("GET", f"{AGENTS}/{UNKNOWN_ID}/invocations?{query}", key=powerless)
    assert is_problem(answer, 404, "not-found")


async def test_raw_bytes_in_the_query(api: Api) -> None:
    answers: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(event: dict[str, Any]) -> None:
        answers.append(event)

    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET", "root_path": ""}
    headers = [(b"authorization", f"Bearer {api.key}".encode())]
    await api.app({**scope, "path": AGENTS, "query_string": b"q=\xff\xfe&x\xe9=1", "headers": headers}, receive, send)
    assert answers[0]["status"] == 400
    assert b'"path":"q"' in answers[1]["body"]


async def test_pages(api: Api) -> None:
    created = [(await api.create(name=f"agent {number}"))["id"] for number in range(5)]
    first = (await api.call("GET", f"{AGENTS}?limit=2")).json()
    assert {name: first[name] for name in ("page", "limit", "total", "pages")} == {
        "page": 1,
        "limit": 2,
        "total": 5,
        "pages": 3,
    }
    listed = []
    for page in (1, 2, 3, 4):
        answer = await api.call("GET", f"{AGENTS}?limit=2&page={page}")
        assert answer.status_code == 200
        listed += [agent["id"] for agent in answer.json()["items"]]
    assert listed == created[::-1]
    empty = (await api.call("GET", f"{AGENTS}?tag=none")).json()
    assert empty == {"items": [], "page": 1, "limit": 20, "total": 0, "pages": 0}


async def test_filters(api: Api) -> None:
    teams = await api.create(
        provider="teams", platform_config={"tenant_id": "t", "channel_id": "c"}, tags=["a b", "ü"], name="100% Zürich_"
    )
    custom = await api.create(status="inactive", tags=["a"])
    deleted = await api.create()
    await api.call("DELETE", f"{AGENTS}/{deleted['id']}")

    async def found(query: str) -> list[str]:
        return [agent["id"] for agent in (await api.call("GET", f"{AGENTS}?{query}")).json()["items"]]

    assert await found("") == [custom["id"], teams["id"]]
    assert await found("status=inactive") == [custom["id"]]
    assert await found("status=deleted") == [deleted["id"]]
    assert await found("provider=teams&status=active") == [teams["id"]]
    assert await found(f"tag={quote('ü')}") == [teams["id"]]
    assert await found("tag=a+b") == await found("tag=a%20b") == [teams["id"]]
    assert await found(f"q={quote('zürich')}") == await found("q=0%25+Z") == await found("q=h_") == [teams["id"]]
    assert await found("q=%25") == [teams["id"]]
    assert await found("q=r_s") == []


async def test_invocations_by_cursor_and_time(api: Api) -> None:
    agent, other = await api.create(), await api.create()
    ids = []
    for _ in range(5):
        api.clock.advance(60)
        ids.append((await api.invoke(agent)).json()["id"])
    await api.invoke(other)
    path = f"{AGENTS}/{agent['id']}/invocations"
    listed, cursor = [], ""
    for _ in range(3):
        page = (await api.call("GET", f"{path}?limit=2{cursor}")).json()
        assert set(page) == {"items", "next_cursor"}
        listed += [item["id"] for item in page["items"]]
        cursor = f"&cursor={page['next_cursor']}"
    assert page["next_cursor"] is None
    assert listed == ids[::-1]
    everything = (await api.call("GET", f"{AGENTS}/invocations")).json()["items"]
    assert len(everything) == 6
    at = everything[2]["created_at"]
    since = (await api.call("GET", f"{path}?since={at}")).json()["items"]
    until = (await api.call("GET", f"{path}?until={quote(at.replace('Z', '+00:00'))}")).json()["items"]
    assert [item["id"] for item in since] == ids[:2:-1]
    assert [item["id"] for item in until] == ids[2::-1]
    assert (await api.call("GET", f"{path}?status=failed")).json() == {"items": [], "next_cursor": None}


names = st.sampled_from(["page", "limit", "status", "q", "tag", "since", "cursor", *RESERVED]) | st.text()
queries = st.lists(st.tuples(names, st.text() | st.binary()), max_size=5)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs=queries)
async def test_no_query_is_our_fault(api: Api, pairs: list[tuple[str, str | bytes]]) -> None:
    query = "&".join(
        f"{quote(name.encode('utf-8', 'surrogatepass'), safe='')}"
        f"={quote(value if isinstance(value, bytes) else value.encode('utf-8', 'surrogatepass'), safe='')}"
        for name, value in pairs
    )
    for path in LISTS:
        answer = await api.call("GET", f"{path}?{query}")
        assert answer.status_code in {200, 400}, answer.text
        answer.json()
