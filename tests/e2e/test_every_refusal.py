"""What is refused, and how: a problem that names every fault, and never a 500, whatever is sent."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from agents import Agent, Reply
from serve import API, Serve, agent_document, bearer, is_problem

pytestmark = pytest.mark.xdist_group("e2e")

JSON = {"Content-Type": "application/json"}


async def create(api: httpx.AsyncClient, agent: Agent, **changes: Any) -> str:
    answer = await api.post(API, json=agent_document(agent.url, **changes))
    assert answer.status_code == 201, answer.text
    return f"{API}/{answer.json()['id']}"


async def test_all_faults_are_named_at_once(api: httpx.AsyncClient) -> None:
    document = {
        "name": "",
        "provider": "teams",
        "platform_config": {"channel_id": 7},
        "webhook_url": "ftp://agent.example.com/#part",
        "auth_type": "oauth2",
        "auth_config": {"client_secret": "s3cret", "token_url": "https://issuer.example.com/", "password": "s3cret"},
        "rate_limit_config": {"requests_per_minute": -1, "requests_per_second": 1},
        "budget_config": {"max_monthly_cost": "-0.1", "currency": "euro"},
        "tags": ["fine", ""],
        "timeout_s": 31,
        "max_attempts": 0,
        "org_id": "other",
        "status": "deleted",
    }
    answer = await api.post(API, json=document)
    problem = is_problem(answer, 400)
    assert {
        "name",
        "platform_config.tenant_id",
        "platform_config.channel_id",
        "webhook_url",
        "auth_config.client_id",
        "auth_config.password",
        "rate_limit_config.requests_per_minute",
        "rate_limit_config.requests_per_second",
        "budget_config.max_monthly_cost",
        "budget_config.currency",
        "tags[1]",
        "timeout_s",
        "max_attempts",
        "org_id",
        "status",
    } == {fault["path"] for fault in problem["errors"]}
    assert all(fault["message"] for fault in problem["errors"])
    assert "s3cret" not in answer.text


async def test_who_is_not_known(serve: Serve) -> None:
    async with httpx.AsyncClient(base_url=serve.address) as nobody:
        for method, path in (("GET", API), ("POST", API), ("GET", f"{API}/invocations"), ("DELETE", f"{API}/x")):
            problem = await nobody.request(method, path)
            is_problem(problem, 401)
            assert problem.headers["www-authenticate"].startswith("Bearer")
            is_problem(await nobody.request(method, path, headers=bearer(serve.key[:-1] + "?")), 401)
        assert (await nobody.get("/healthz")).status_code == 200
        assert (await nobody.get("/readyz")).json()["checks"] == {"database": "ok", "schema": "ok", "keys": "ok"}
        assert (await nobody.get("/docs")).status_code == 200
        assert (await nobody.get("/openapi.json")).json()["openapi"].startswith("3.1")


async def test_what_is_not_there_or_not_done(api: httpx.AsyncClient, agent: Agent) -> None:
    path = await create(api, agent)
    is_problem(await api.get("/nothing/here"), 404)
    for wrong in ("no-uuid", "%00", "..%2f..", path.rpartition("/")[2] + "0", "%EF%BC%90" * 36):
        is_problem(await api.get(f"{API}/{wrong}"), 404)
    for method, where in (("PUT", path), ("DELETE", API), ("GET", f"{path}/invoke"), ("POST", "/healthz")):
        answer = await api.request(method, where)
        is_problem(answer, 405)
        assert answer.headers["allow"]


async def test_what_an_inactive_agent_and_a_failing_one_answer(api: httpx.AsyncClient, agent: Agent) -> None:
    path = await create(api, agent, status="inactive", timeout_s=1, max_attempts=2)
    for answer in await asyncio.gather(*(api.post(f"{path}/invoke", json={}) for _ in range(20))):
        is_problem(answer, 409)
    assert (await api.patch(path, json={"status": "active"})).status_code == 200

    agent.answers(Reply(418))
    failed = is_problem(await api.post(f"{path}/invoke", json={}), 502)["invocation"]
    assert (failed["status"], failed["error_code"], failed["response_status"]) == ("failed", "http_status", 418)
    assert len(failed["attempts"]) == 1, "418 is not retried"

    agent.answers(Reply(503), Reply(body=b"plain words"))
    mended = (await api.post(f"{path}/invoke", json={})).json()
    assert [attempt["status"] for attempt in mended["attempts"]] == [503, 200]
    assert mended["response_payload"] == "plain words"

    assert (await api.patch(path, json={"max_attempts": 1})).status_code == 200
    agent.answers(Reply(delay_s=30))
    late = is_problem(await api.post(f"{path}/invoke", json={}), 504)["invocation"]
    assert (late["error_code"], len(late["attempts"])) == ("timeout", 1)

    listed = (await api.get(f"{path}/invocations")).json()["items"]
    assert listed == [late, mended, failed], "409 made none"
    assert (await api.get(f"{path}/invocations", params={"status": "failed"})).json()["items"] == [late, failed]


async def test_bodies_that_are_too_large_or_no_json(api: httpx.AsyncClient, agent: Agent) -> None:
    path = await create(api, agent)
    large = json.dumps({"description": "x" * 1_048_576}).encode()
    for where in (API, f"{path}/invoke"):
        is_problem(await api.post(where, content=large, headers=JSON), 413)
        is_problem(await api.post(where, content=b"{}"), 415)
        is_problem(await api.post(where, content=b"{}", headers={"Content-Type": "text/plain"}), 415)
        is_problem(await api.post(where, content=b"", headers=JSON), 400)
    assert not agent.requests


HOSTILE = {
    "NUL": b'"\\u0000"',
    "a lone surrogate": b'"\\ud800"',
    "surrogates the wrong way round": b'"\\udc00\\ud800"',
    "NaN": b"NaN",
    "Infinity": b"-Infinity",
    "more than a double": b"1e400",
    "a depth of 65": b"[" * 65 + b"]" * 65,
    "a depth of 100,000": b"[" * 100_000 + b"]" * 100_000,
    "an unclosed depth of 100,000": b"[" * 100_000,
    "a member twice": b'{"a": 1, "a": 2}',
    "bytes that are no UTF-8": b'"\xff\xfe"',
    "a surrogate in UTF-8": b'"\xed\xa0\x80"',
    "a control character": b'"\x01"',
}


def _documents_with(name: str, value: bytes) -> Iterator[tuple[str, bytes]]:
    yield f"{name} in auth_config", _document(b'"auth_type": "custom", "auth_config": {"value": %b}' % value)
    yield f"{name} in platform_config", _document(b'"platform_config": {"value": %b}' % value)
    yield f"{name} as description", _document(b'"description": %b' % value)
    yield f"{name} in tags", _document(b'"tags": [%b]' % value)


def _documents() -> Iterator[tuple[str, bytes]]:
    for name, value in HOSTILE.items():
        yield from _documents_with(name, value)
    yield "NUL in a member's name", _document(b'"platform_config": {"\\u0000": 1}')
    yield "a surrogate in a member's name", _document(b'"platform_config": {"\\ud800": 1}')
    yield "an unknown member with a surrogate", _document(b'"\\ud800": 1')
    yield "UTF-16", _document(b'"tags": []').decode().encode("utf-16")
    yield "a byte order mark", b"\xef\xbb\xbf" + _document(b'"tags": []')
    for body in (b" ", b"{} {}", b"[]", b"null", b"{'a': 1}"):
        yield repr(body), body


def _document(members: bytes) -> bytes:
    """Of an agent, with these members too."""
    plain = agent_document("https://agent.example.com/")
    if b'"auth_type"' in members:
        del plain["auth_type"]
    return b"%b, %b}" % (json.dumps(plain)[:-1].encode(), members)


async def test_documents_that_are_not_hostile_are_taken(api: httpx.AsyncClient) -> None:
    for name, body in _documents_with("text", b'"text"'):
        answer = await api.post(API, content=body, headers=JSON)
        assert answer.status_code == 201, (name, answer.text)


@pytest.mark.parametrize("body", [pytest.param(body, id=name) for name, body in _documents()])
async def test_hostile_documents_are_refused(api: httpx.AsyncClient, agent: Agent, body: bytes) -> None:
    is_problem(await api.post(API, content=body, headers=JSON), 400)


async def test_hostile_patches_change_nothing(api: httpx.AsyncClient, agent: Agent) -> None:
    path = await create(api, agent)
    before = (await api.get(path)).json()
    for name, body in _documents():
        answer = await api.patch(path, content=body, headers={"Content-Type": "application/merge-patch+json"})
        assert answer.status_code == 400, (name, answer.text)
        is_problem(answer, 400)
    assert (await api.get(path)).json() == before


@pytest.mark.parametrize(
    "body",
    [b"NaN", b"[NaN]", b"-Infinity", b"{", b"\xff", b"'a'", b"{} {}", b"[" * 513 + b"]" * 513, b"[" * 200_000, b"\x00"],
    ids=lambda body: repr(body[:8]),
)
async def test_what_is_no_json_is_no_payload(api: httpx.AsyncClient, agent: Agent, body: bytes) -> None:
    path = await create(api, agent)
    is_problem(await api.post(f"{path}/invoke", content=body, headers=JSON), 400)
    assert not agent.requests


@pytest.mark.parametrize(
    "body",
    [
        b'{"a": 1, "a": 2}',
        b'"\\u0000 \\ud800"',
        b"1e400",
        b"[123456789012345678901234567890, 0.10, -0]",
        b"[" * 512 + b"]" * 512,
        b'  {"spaces" : "kept"}\n',
        b"null",
    ],
    ids=lambda body: repr(body[:8]),
)
async def test_every_json_passes_through_untouched(
    serve: Serve, api: httpx.AsyncClient, agent: Agent, body: bytes
) -> None:
    path = await create(api, agent)
    agent.answers(Reply(body=body))
    answer = await api.post(f"{path}/invoke", content=body, headers=JSON)
    assert answer.status_code == 200, answer.text
    assert [seen.body for seen in agent.requests] == [body]
    kept = body.strip()
    assert answer.content.count(kept) >= 2, "in the request and in the response"
    [row] = serve.sql(
        "SELECT request_payload::text, response_payload::text FROM external_agent_invocations"
        " WHERE external_agent_id = %s",
        path.rpartition("/")[2],
    )
    assert {text.strip().encode() for text in row.values()} == {kept}


@pytest.mark.parametrize(
    "query",
    ["q=%00", "tag=%00", "q=%ff", "tag=%ed%a0%80", "page=0", "page=x", "limit=101", "limit=-1", "status=gone",
     "provider=nope", "nonsense=1", "page=1&page=2", "page=99999999999999999999", "limit=%EF%BC%91"],
)  # fmt: skip
async def test_hostile_queries(api: httpx.AsyncClient, query: str) -> None:
    is_problem(await api.get(f"{API}?{query}"), 400)


@pytest.mark.parametrize(
    "query",
    ["since=yesterday", "since=2026-01-01T00:00:00", "until=0000-01-01T00:00:00Z", "cursor=%00", "cursor=nonsense",
     "status=active", "limit=0", "since=9999-12-31T23:59:59-23:59"],
)  # fmt: skip
async def test_hostile_queries_of_the_record(api: httpx.AsyncClient, agent: Agent, query: str) -> None:
    path = await create(api, agent)
    for where in (f"{path}/invocations", f"{API}/invocations"):
        answer = await api.get(f"{where}?{query}")
        assert answer.status_code in (200, 400) if query.startswith("since=9999") else answer.status_code == 400
