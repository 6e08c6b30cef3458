"""Headers in and out: credentials, versions, traces, ids, limits."""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from rest_api import AGENTS, CANARY, UNKNOWN_ID, Api, is_problem, paths_of

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"


@pytest.fixture
async def api() -> AsyncIterator[Api]:
    async with Api() as api:
        yield api


class TestAuthorization:
    @pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "Bearer  "])
    async def test_the_scheme_is_told_in_any_case(self, api: Api, scheme: str) -> None:
        answer = await api.call("GET", AGENTS, key=None, headers={"Authorization": f"{scheme} {api.key}"})
        assert answer.status_code == 200

    @pytest.mark.parametrize(
        ("value", "sent_a_token"),
        [
            ("", False),
            ("Bearer", False),
            ("Bearer ", False),
            ("Basic dGVzdGVyOnRlc3Rlcg==", False),
            ("{key}", False),
            ("Bearer\t{key}", False),
            ("Bearer{key}", False),
            ("Bearer nope", True),
            ("Bearer {key} {key}", True),
            ("Bearer {key},", True),
            ('Bearer "{key}"', True),
            ("Bearer {key}x", True),
            ("Bearer \u00ff\u00fe", True),
            ("Bearer " + "x" * 8000, True),
        ],
    )
    async def test_anything_else_is_401(self, api: Api, value: str, sent_a_token: bool) -> None:
        headers = [("Authorization", value.replace("{key}", api.key).encode("latin-1"))]
        answer = await api.call("GET", AGENTS, key=None, headers=headers)
        assert is_problem(answer, 401, "unauthenticated")
        assert ("invalid_token" in answer.headers["www-authenticate"]) is sent_a_token
        assert api.key not in answer.text

    async def test_twice_is_401(self, api: Api) -> None:
        answer = await api.call("GET", AGENTS, headers={"Authorization": f"Bearer {api.key}"})
        assert is_problem(answer, 401, "unauthenticated")

    async def test_a_withdrawn_key_is_answered_like_an_unknown_one(self, api: Api) -> None:
        unknown = await api.call("GET", AGENTS, key="unknown")
        api.authenticator.withdraw(api.key)
        assert (await api.call("GET", AGENTS)).content == unknown.content


class TestEtags:
    async def test_every_answer_with_an_agent_has_one(self, api: Api) -> None:
        created = await api.call("POST", AGENTS, json={**_minimal(), "name": "a"})
        assert created.headers["etag"] == '"1"'
        assert created.headers["location"] == f"{AGENTS}/{created.json()['id']}"
        path = created.headers["location"]
        patched = await api.call("PATCH", path, json={"name": "b"})
        shown = await api.call("GET", path)
        assert patched.headers["etag"] == shown.headers["etag"] == '"2"'
        assert patched.json()["version"] == 2
        assert patched.content == shown.content

    @pytest.mark.parametrize(
        ("value", "status"),
        [
            ('"1"', 304),
            ('W/"1"', 304),
            ('"0", "1"', 304),
            ('"a,b" , ,W/"1",', 304),
            ("*", 304),
            ('"2"', 200),
            ('"01"', 200),
            ("1", 200),
            ('"1', 200),
            ('"1" "2"', 200),
            ("", 200),
        ],
    )
    async def test_if_none_match(self, api: Api, value: str, status: int) -> None:
        agent = await api.create()
        for method in ("GET", "HEAD"):
            answer = await api.call(method, f"{AGENTS}/{agent['id']}", headers={"If-None-Match": value})
            assert answer.status_code == status
            assert answer.headers["etag"] == '"1"'
            assert bool(answer.content) is (status == 200 and method == "GET")

    @pytest.mark.parametrize(
        ("value", "matches"),
        [
            ('"1"', True),
            ('"7", "1"', True),
            ("*", True),
            (None, True),
            ('W/"1"', False),
            ('"9"', False),
            ('"01"', False),
            ("1", False),
            ('"1', False),
            ('*, "1"', False),
            ('"' + "9" * 5000 + '"', False),
            ('"\u0661"', False),
            ("", False),
        ],
    )
    async def test_if_match(self, api: Api, value: str | None, matches: bool) -> None:
        path = f"{AGENTS}/{(await api.create())['id']}"
        headers = [] if value is None else [("If-Match", value.encode())]
        patched = await api.call("PATCH", path, json={"name": "b"}, headers=headers)
        assert patched.status_code == 200 if matches else is_problem(patched, 412, "stale-version")
        await api.call("PATCH", path, json={"name": "c"})
        deleted = await api.call("DELETE", path, headers=headers)
        assert deleted.status_code == (204 if value in {"*", None} else 412)
        assert not deleted.content or deleted.status_code == 412

    async def test_two_if_match_fields_are_one_list(self, api: Api) -> None:
        path = f"{AGENTS}/{(await api.create())['id']}"
        headers = [("If-Match", '"7"'), ("If-Match", '"1"')]
        assert (await api.call("PATCH", path, json={"name": "b"}, headers=headers)).status_code == 200

    async def test_if_match_of_an_unknown_agent_is_404(self, api: Api) -> None:
        answer = await api.call("DELETE", f"{AGENTS}/{UNKNOWN_ID}", headers={"If-Match": "*"})
        assert is_problem(answer, 404, "not-found")


class TestTraces:
    @pytest.mark.parametrize(
        "value",
        [
            f"00-{TRACE}-{PARENT}-01",
            f"00-{TRACE}-{PARENT}-00",
            f"01-{TRACE}-{PARENT}-ff",
            f"cc-{TRACE}-{PARENT}-01-more",
        ],
    )
    async def test_a_valid_one_is_taken_and_passed_on(self, api: Api, value: str) -> None:
        answer = await api.invoke(await api.create(), headers={"traceparent": value})
        assert answer.json()["trace_id"] == TRACE
        assert api.transport.requests[0].headers["traceparent"].startswith(f"00-{TRACE}-")

    @pytest.mark.parametrize(
        "value",
        [
            "",
            TRACE,
            f"00-{TRACE}-{PARENT}",
            f"00-{TRACE}-{PARENT}-01-more",
            f"00-{TRACE}-{PARENT}-01 ",
            f"ff-{TRACE}-{PARENT}-01",
            f"00-{TRACE.upper()}-{PARENT}-01",
            f"00-{'0' * 32}-{PARENT}-01",
            f"00-{TRACE}-{'0' * 16}-01",
            f"01-{TRACE}-{PARENT}-01more",
            f"00-{TRACE[:-1]}-{PARENT}-01",
            "00-\u00e9",
        ],
    )
    async def test_an_invalid_one_is_ignored(self, api: Api, value: str) -> None:
        headers = [("traceparent", value.encode("latin-1"))]
        seen = {(await api.invoke(await api.create(), headers=headers)).json()["trace_id"] for _ in range(2)}
        assert len(seen) == 2
        assert TRACE not in seen
        assert all(re.fullmatch("[0-9a-f]{32}", trace_id) for trace_id in seen)

    async def test_two_are_none(self, api: Api) -> None:
        headers = [("traceparent", f"00-{TRACE}-{PARENT}-01")] * 2
        assert (await api.invoke(await api.create(), headers=headers)).json()["trace_id"] != TRACE

    async def test_lineage(self, api: Api) -> None:
        agent = await api.create()
        assert (await api.invoke(agent)).json()["lineage_hop_id"] is None
        assert (await api.invoke(agent, headers={"X-Lineage-Hop-Id": ""})).json()["lineage_hop_id"] is None
        for value in ("hop-1", "x" * 200, "ключ", "ü" * 200):
            headers = [("X-Lineage-Hop-Id", value.encode())]
            assert (await api.invoke(agent, headers=headers)).json()["lineage_hop_id"] == value
        assert (await api.invoke(agent, headers=[("X-Lineage-Hop-Id", b"\xfc")])).json()["lineage_hop_id"] == "ü"
        calls = len(api.transport.requests)
        assert paths_of(await api.invoke(agent, headers={"X-Lineage-Hop-Id": "x" * 201})) == ["lineage_hop_id"]
        assert len(api.transport.requests) == calls


class TestRequestIds:
    @pytest.mark.parametrize("value", ["abc", "x" * 128, "req:1/2?3"])
    async def test_a_sane_one_is_kept(self, api: Api, value: str) -> None:
        for path in (AGENTS, "/healthz", "/nope"):
            assert (await api.call("GET", path, headers={"X-Request-Id": value})).headers["x-request-id"] == value

    @pytest.mark.parametrize("value", ["", "x" * 129, "a b", "\u00e9"])
    async def test_another_is_replaced(self, api: Api, value: str) -> None:
        answer = await api.call("GET", AGENTS, headers=[("X-Request-Id", value.encode("latin-1"))])
        assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])

    async def test_both_ids_surround_the_request(self) -> None:
        seen: list[Any] = []

        @contextlib.contextmanager
        def log_context(**ids: str) -> Iterator[None]:
            seen.append(ids)
            yield
            seen.append("left")

        async with Api(log_context=log_context) as api:
            headers = {"X-Request-Id": "req-1", "traceparent": f"00-{TRACE}-{PARENT}-01"}
            await api.call("GET", AGENTS, headers=headers)
        assert seen == [{"request_id": "req-1", "trace_id": TRACE}, "left"]


PATHS = [AGENTS, f"{AGENTS}/{UNKNOWN_ID}", "/healthz", "/readyz", "/metrics", "/openapi.json", "/docs", "/docs/"]
PATHS += ["/docs/init.js", "/docs/nope", "/nope", "/%00"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "TRACE", "BREW"])
async def test_security_headers_are_on_everything(api: Api, method: str, path: str) -> None:
    answer = await api.call(method, path)
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert not {"server", "x-powered-by", "set-cookie"} & set(answer.headers)


async def test_quotas_on_a_success(api: Api) -> None:
    limits = {"requests_per_minute": 3, "requests_per_hour": 10, "requests_per_day": 100}
    agent = await api.create(rate_limit_config=limits)
    answer = await api.invoke(agent)
    assert answer.headers["ratelimit-policy"] == '"minute";q=3;w=60, "hour";q=10;w=3600, "day";q=100;w=86400'
    assert re.fullmatch(r'"minute";r=2;t=\d+, "hour";r=9;t=\d+, "day";r=99;t=\d+', answer.headers["ratelimit"]), (
        answer.headers["ratelimit"]
    )
    assert "ratelimit" not in (await api.invoke(await api.create())).headers
    assert "ratelimit" not in (await api.call("GET", f"{AGENTS}/{agent['id']}")).headers


async def test_two_a_minute(api: Api) -> None:
    agent = await api.create(rate_limit_config={"requests_per_minute": 2})
    answers = [await api.invoke(agent) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    api.clock.advance(int(answers[-1].headers["retry-after"]))
    assert (await api.invoke(agent)).status_code == 200


async def test_a_limit_of_none_at_all(api: Api) -> None:
    agent = await api.create(rate_limit_config={"requests_per_hour": 0})
    answer = await api.invoke(agent)
    assert answer.headers["retry-after"] == "3600"
    assert answer.headers["ratelimit-policy"] == '"hour";q=0;w=3600'


def _minimal() -> dict[str, Any]:
    return {
        "provider": "custom",
        "webhook_url": "https://agent.example.com/hook",
        "auth_type": "bearer",
        "auth_config": {"token": CANARY},
    }
