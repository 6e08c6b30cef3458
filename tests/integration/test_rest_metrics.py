"""The route `/metrics`, and what is told of requests."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from external_agents.adapters.rest import API_PREFIX
from external_agents.adapters.rest.openapi import openapi_document
from external_agents.domain.catalog import BUILT_IN
from rest_api import AGENT, AGENTS, UNKNOWN_ID, Api, is_problem

TEXT = "text/plain; version=0.0.4; charset=utf-8"


class Exposition:
    """Counts how often it is asked, how many ask at a time, and where."""

    def __init__(self, work: Callable[[], object] = lambda: None) -> None:
        self.work = work
        self.asked = 0
        self.at_once = 0
        self.most_at_once = 0
        self.threads: set[int] = set()
        self.entered = threading.Event()

    def __call__(self) -> tuple[str, bytes]:
        self.asked += 1
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        self.threads.add(threading.get_ident())
        self.entered.set()
        shown = self.asked
        self.work()
        self.at_once -= 1
        return TEXT, f"asked {shown}\n".encode()


class TestTheRoute:
    async def test_it_is_open_to_anybody(self) -> None:
        async with Api(metrics=Exposition()) as api:
            answer = await api.call("GET", "/metrics", key=None)
            assert (answer.status_code, answer.text) == (200, "asked 1\n")
            assert answer.headers["content-type"] == TEXT
            assert answer.headers["cache-control"] == "no-store"
            head = await api.call("HEAD", "/metrics", key=None)
            assert (head.status_code, head.content) == (200, b"")
            assert int(head.headers["content-length"]) == len(answer.content)
            refused = await api.call("POST", "/metrics", key=None)
            assert is_problem(refused, 405, "method-not-allowed")
            assert refused.headers["allow"] == "GET, HEAD"

    async def test_without_metrics_there_is_none(self) -> None:
        async with Api(metrics=None) as api:
            assert is_problem(await api.call("GET", "/metrics", key=None), 404, "no-such-route")
            document = (await api.call("GET", "/openapi.json", key=None)).json()
        assert "/metrics" not in document["paths"]
        assert {**document["paths"], "/metrics": openapi_document(BUILT_IN)["paths"]["/metrics"]} == openapi_document(
            BUILT_IN
        )["paths"]

    async def test_a_failure_is_ours(self) -> None:
        def fail() -> None:
            raise RuntimeError("corrupt")

        async with Api(metrics=Exposition(fail)) as api:
            for _ in range(2):
                assert is_problem(await api.call("GET", "/metrics", key=None), 500, "internal")


class TestCollecting:
    async def test_it_does_not_hold_up_the_others(self) -> None:
        over = threading.Event()
        exposition = Exposition(over.wait)
        async with Api(metrics=exposition) as api:
            asked = asyncio.create_task(api.call("GET", "/metrics", key=None))
            await asyncio.to_thread(exposition.entered.wait, 20)
            assert (await api.call("GET", "/healthz", key=None)).status_code == 200
            over.set()
            assert (await asked).status_code == 200
        assert threading.get_ident() not in exposition.threads

    async def test_those_who_ask_meanwhile_share_the_next_one(self) -> None:
        over = threading.Event()
        exposition = Exposition(over.wait)
        async with Api(metrics=exposition) as api:
            first = asyncio.create_task(api.call("GET", "/metrics", key=None))
            await asyncio.to_thread(exposition.entered.wait, 20)
            later = [asyncio.create_task(api.call("GET", "/metrics", key=None)) for _ in range(50)]
            for _ in range(200):
                await asyncio.sleep(0)  # They all get as far as they can.
            over.set()
            texts = [answer.text for answer in await asyncio.gather(first, *later)]
        assert texts == ["asked 1\n", *["asked 2\n"] * 50]
        assert exposition.most_at_once == 1

    async def test_a_caller_who_leaves_takes_it_from_nobody(self) -> None:
        over = threading.Event()
        exposition = Exposition(over.wait)
        async with Api(metrics=exposition) as api:
            leaving, staying = (asyncio.create_task(api.call("GET", "/metrics", key=None)) for _ in range(2))
            await asyncio.to_thread(exposition.entered.wait, 20)
            leaving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await leaving
            again = asyncio.create_task(api.call("GET", "/metrics", key=None))
            over.set()
            assert [(await answer).text for answer in (staying, again)] == ["asked 1\n", "asked 2\n"]
        assert exposition.most_at_once == 1

    async def test_a_flood_takes_a_tenth_of_the_time(self) -> None:
        exposition = Exposition(lambda: time.sleep(0.02))
        began_s = time.monotonic()
        async with Api(metrics=exposition) as api:
            for _ in range(4):
                await api.call("GET", "/metrics", key=None)
        assert time.monotonic() - began_s >= 3 * 0.2 + 0.02
        assert exposition.asked == 4


class Requests(list[tuple[str, str | None, int | None]]):
    def __call__(self, method: str, route: str | None, status: int | None, duration_s: float) -> None:
        assert 0 <= duration_s < 60
        self.append((method, route, status))


INVOKE = f"{API_PREFIX}/{{agent_id}}/invoke"


class TestRequests:
    async def test_each_is_told_once(self) -> None:
        told = Requests()
        async with Api(on_request=told) as api:
            agent = await api.create()
            await api.invoke(agent)
            await api.call("GET", f"{AGENTS}/{UNKNOWN_ID}")
            await api.call("HEAD", f"{AGENTS}/{agent['id']}")
            await api.call("OPTIONS", f"{AGENTS}/{agent['id']}")
            await api.call("GET", AGENTS, key=None)
            await api.call("POST", AGENTS, json={**AGENT, "name": ""})
            await api.call("GET", "/healthz/", key=None)
        one = f"{API_PREFIX}/{{agent_id}}"
        assert told == [
            ("POST", API_PREFIX, 201),
            ("POST", INVOKE, 200),
            ("GET", one, 404),
            ("HEAD", one, 200),
            ("OPTIONS", one, 200),
            ("GET", API_PREFIX, 401),
            ("POST", API_PREFIX, 400),
            ("GET", "/healthz", 200),
        ]

    async def test_what_the_api_does_not_have_has_no_names(self) -> None:
        told = Requests()
        async with Api(on_request=told) as api:
            for method in ("PUT", "BREW", "X" * 1000):
                await api.call(method, AGENTS)
                await api.call(method, f"/{method}/nowhere")
            for path in ("/", "/metrics/x", f"{AGENTS}/a/b/c/d", "/%00%ff", "/docs/../x"):
                await api.call("GET", path)
        assert {(method, route) for method, route, _ in told} <= {
            ("other", None),
            ("other", API_PREFIX),
            ("GET", "/docs/{name}"),
        }
        assert len(told) == 11

    async def test_a_failure_of_ours_is_told(self) -> None:
        told = Requests()
        async with Api(on_request=told) as api:
            api.policy.error = RuntimeError("a bug")
            await api.call("GET", AGENTS)
        assert told == [("GET", API_PREFIX, 500)]

    async def test_it_is_told_before_the_caller_can_know(self) -> None:
        """So that whoever has the answer finds it counted."""
        told, known = Requests(), []
        api = Api(on_request=told)

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(event: dict[str, Any]) -> None:
            known.append(list(told))

        await api.app(scope("/healthz"), receive, send)
        assert known[0] == told == [("GET", "/healthz", 200)]

    async def test_a_caller_who_leaves_before_the_answer(self) -> None:
        told, entered = Requests(), asyncio.Event()

        async def wait_for_ever() -> dict[str, str | None]:
            entered.set()
            await asyncio.Event().wait()
            return {}

        async with Api(on_request=told, readiness=wait_for_ever) as api:
            asked = asyncio.create_task(api.call("GET", "/readyz", key=None))
            await entered.wait()
            asked.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asked
        assert told == [("GET", "/readyz", None)]


def scope(path: str) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [],
        "scheme": "http",
    }
