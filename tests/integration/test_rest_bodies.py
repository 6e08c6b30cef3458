"""What a body may be, and that it reaches the agent as it came."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rest_api import AGENT, AGENTS, BODY_LIMIT_BYTES, Api, is_problem

JSON = {"Content-Type": "application/json"}


@pytest.fixture
async def api() -> AsyncIterator[Api]:
    async with Api() as api:
        yield api


@pytest.mark.parametrize(
    "content_type",
    [
        "application/json",
        "APPLICATION/JSON",
        "application/json; charset=utf-8",
        'application/json;charset="UTF-8"',
        "application/json ; charset=utf-8 ; v=1",
        "application/json;",
        "application/merge-patch+json",
        "application/vnd.acme.v1+json",
    ],
)
async def test_types_that_are_json(api: Api, content_type: str) -> None:
    content = json.dumps(AGENT).encode()
    created = await api.call("POST", AGENTS, content=content, headers={"Content-Type": content_type})
    assert created.status_code == 201
    path = f"{AGENTS}/{created.json()['id']}"
    patched = await api.call("PATCH", path, content=b'{"name": "B"}', headers={"Content-Type": content_type})
    assert patched.json()["name"] == "B"
    assert (await api.call("POST", f"{path}/invoke", content=b"1", headers={"Content-Type": content_type})).is_success


@pytest.mark.parametrize("hostile", ["; " + " " * 10, ";a=", ';a="', ";" * 5, "; ", ';a="x"'])
async def test_no_content_type_takes_long_to_judge(api: Api, hostile: str) -> None:
    content_type = ("application/json" + hostile * 400)[:4000] + "@"
    async with asyncio.timeout(5):
        answer = await api.call("POST", AGENTS, content=b"{}", headers={"Content-Type": content_type})
    assert answer.status_code == 415


@pytest.mark.parametrize(
    "content_type",
    [
        "text/json",
        "text/plain",
        "application/x-www-form-urlencoded",
        "application/+json",
        "application/jsonx",
        "multipart/form-data; boundary=x",
        "application/json; charset=latin-1",
        "application/json; charset=utf-16",
        "application/json; charset=utf-8; charset=utf-16",
        "application/json, text/plain",
        "",
        "json",
        "\u00e9/json",
    ],
)
async def test_types_that_are_not(api: Api, content_type: str) -> None:
    headers = [("Content-Type", content_type.encode("latin-1"))]
    answer = await api.call("POST", AGENTS, content=json.dumps(AGENT).encode(), headers=headers)
    assert is_problem(answer, 415, "unsupported-media-type")
    assert answer.headers["accept"] == "application/json"


async def test_no_type_at_all(api: Api) -> None:
    agent = await api.create()
    for method, path in [
        ("POST", AGENTS),
        ("PATCH", f"{AGENTS}/{agent['id']}"),
        ("POST", f"{AGENTS}/{agent['id']}/invoke"),
    ]:
        assert is_problem(await api.call(method, path, content=b"{}"), 415, "unsupported-media-type")
        assert is_problem(await api.call(method, path), 400, "malformed")


async def test_two_types(api: Api) -> None:
    headers = [("Content-Type", "application/json"), ("Content-Type", "application/json")]
    answer = await api.call("POST", AGENTS, content=b"{}", headers=headers)
    assert is_problem(answer, 415, "unsupported-media-type")


async def test_compressed_bodies(api: Api) -> None:
    for coding in ("gzip", "br", "gzip, identity"):
        answer = await api.call("POST", AGENTS, json=AGENT, headers={"Content-Encoding": coding})
        assert is_problem(answer, 415, "unsupported-media-type")
        assert answer.headers["accept-encoding"] == "identity"
    assert (await api.call("POST", AGENTS, json=AGENT, headers={"Content-Encoding": "identity"})).status_code == 201


async def pieces(*sizes: int) -> AsyncIterator[bytes]:
    yield b'"'
    for size in sizes:
        yield b"x" * size
    yield b'"'


async def test_the_limit_is_exact_however_the_body_comes(api: Api) -> None:
    agent = await api.create()
    path = f"{AGENTS}/{agent['id']}/invoke"
    for size, status in [(BODY_LIMIT_BYTES - 2, 200), (BODY_LIMIT_BYTES - 1, 413)]:
        whole = await api.call("POST", path, content=b'"' + b"x" * size + b'"', headers=JSON)
        chunked = await api.call("POST", path, content=pieces(1000, 0, size - 1000), headers=JSON)
        assert [whole.status_code, chunked.status_code] == [status, status]
    assert len(api.transport.requests) == 2


async def test_a_declared_length_over_the_limit_is_refused_unread(api: Api) -> None:
    answers: list[Any] = []
    reads = 0

    async def receive() -> dict[str, Any]:
        nonlocal reads
        reads += 1
        return {"type": "http.disconnect"}

    async def send(event: dict[str, Any]) -> None:
        answers.append((event, reads))

    headers = [(b"authorization", f"Bearer {api.key}".encode()), (b"content-length", b"99999999999")]
    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "headers": headers}
    await api.app({**scope, "path": AGENTS, "query_string": b"", "root_path": ""}, receive, send)
    start, reads_before_the_answer = answers[0]
    assert start["status"] == 413
    assert (b"connection", b"close") in start["headers"]
    assert reads_before_the_answer == 0


async def test_a_body_that_is_cut_off_reaches_no_agent(api: Api) -> None:
    agent = await api.create()
    events = [{"type": "http.request", "body": b"12", "more_body": True}, {"type": "http.disconnect"}]
    statuses = []

    async def receive() -> dict[str, Any]:
        return events.pop(0)

    async def send(event: dict[str, Any]) -> None:
        statuses.append(event.get("status"))

    headers = [
        (b"authorization", f"Bearer {api.key}".encode()),
        (b"content-type", b"application/json"),
        (b"content-length", b"4"),
    ]
    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "headers": headers}
    path = f"{AGENTS}/{agent['id']}/invoke"
    await api.app({**scope, "path": path, "query_string": b"", "root_path": ""}, receive, send)
    assert statuses[0] == 400
    assert api.transport.requests == []


async def test_a_dripping_body_is_given_up_though_the_server_loses_the_cancellation() -> None:
    """As `asyncio.wait_for` does, and with it gunicorn, when a piece comes at the same moment."""
    statuses = []

    async def receive() -> dict[str, Any]:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(3_600)
        return {"type": "http.request", "body": b" ", "more_body": True}

    async def send(event: dict[str, Any]) -> None:
        statuses.append(event.get("status"))

    async with Api(body_grace_s=0.1) as api, asyncio.timeout(20):
        headers = [
            (b"authorization", f"Bearer {api.key}".encode()),
            (b"content-type", b"application/json"),
            (b"transfer-encoding", b"chunked"),
        ]
        scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST"}
        await api.app(
            {**scope, "headers": headers, "path": AGENTS, "query_string": b"", "root_path": ""}, receive, send
        )
    assert statuses[0] == 408


PAYLOADS = [
    b"null",
    b"0",
    b' {"a" :\t1,\r\n "a": 2 } ',
    b"12345678901234567890123456789.000000000000000000001",
    b"1e400",
    b"-0.0",
    b'"\\u0000\\ud800"',
    '{"ключ": "✓ \U0001f600"}'.encode(),
    b"[" * 512 + b"]" * 512,
]


@pytest.mark.parametrize("payload", PAYLOADS)
async def test_payloads_pass_byte_for_byte_and_are_shown_as_they_came(api: Api, payload: bytes) -> None:
    agent = await api.create()
    answer = await api.call("POST", f"{AGENTS}/{agent['id']}/invoke", content=payload, headers=JSON)
    assert answer.status_code == 200
    assert api.transport.requests[-1].body.text.encode() == payload
    assert b'"request_payload":' + payload + b',"response_payload":{"output":"world"}' in answer.content
    shown = await api.call("GET", f"{AGENTS}/{agent['id']}/invocations/{answer.json()['id']}")
    assert shown.content == answer.content


@pytest.mark.parametrize(
    ("document", "path"),
    [
        (b'{"name": "a", "name": "b"}', "name"),
        (b'{"name": "\\u0000"}', "name"),
        (b'{"name": "\\ud800"}', "name"),
        (b'{"timeout_s": 1e400}', "timeout_s"),
        (b'{"timeout_s": 1e99999999999999999999}', "timeout_s"),
        (b'{"timeout_s": 1e-99999999999999999999}', "timeout_s"),
        (b'{"platform_config": ' + b'{"a":' * 64 + b"1" + b"}" * 64 + b"}", ""),
        (b'{"\\ud800": 1}', "\\ud800"),
        (b'{"\\u0000": 1}', "\\u0000"),
        (b"[]", ""),
        (b"7", ""),
        (b"null", ""),
    ],
)
async def test_values_that_cannot_be_stored_are_faults(api: Api, document: bytes, path: str) -> None:
    agent = await api.create()
    for method, target in [("POST", AGENTS), ("PATCH", f"{AGENTS}/{agent['id']}")]:
        answer = await api.call(method, target, content=document, headers=JSON)
        assert is_problem(answer, 400, "invalid")
        assert path in [fault["path"] for fault in answer.json()["errors"]]


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(float("1e308"))
values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)
documents = st.dictionaries(
    st.sampled_from([*AGENT, "rate_limit_config", "budget_config", "tags", "timeout_s"]), values
)
bodies = (
    st.binary(max_size=200)
    | st.builds(lambda value: json.dumps(value).encode("utf-8", "surrogatepass"), values)
    | st.builds(lambda changes: json.dumps({**AGENT, **changes}).encode("utf-8", "surrogatepass"), documents)
    | st.from_regex(r"-?[0-9]{1,500}(\.[0-9]{1,30})?([eE][+-]?[0-9]{1,30})?", fullmatch=True).map(
        lambda number: f'{{"timeout_s":{number},"budget_config":{{"max_monthly_cost":{number}}}}}'.encode()
    )
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=bodies)
async def test_no_body_is_our_fault(api: Api, body: bytes) -> None:
    agent = await api.create()
    path = f"{AGENTS}/{agent['id']}"
    for method, target in [("POST", AGENTS), ("PATCH", path), ("POST", f"{path}/invoke")]:
        answer = await api.call(method, target, content=body, headers=JSON)
        assert answer.status_code < 500, answer.text
        json.loads(answer.content)
