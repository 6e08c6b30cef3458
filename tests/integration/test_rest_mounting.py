"""The API inside another application, and inside a server that opens it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from external_agents.adapters.memory import MemoryAuthenticator, memory_service
from external_agents.adapters.rest import LifespanApp, create_app
from external_agents.domain.access import PERMISSIONS, Principal
from external_agents.domain.errors import ConfigurationError
from external_agents.testing.fakes import ScriptedTransport
from rest_api import AGENT, AGENTS, Api, is_problem

App = Callable[[dict[str, Any], Any, Any], Awaitable[None]]


def mounted(app: App, prefix: str, *, strips: bool) -> App:
    """Starlette's Mount: since 0.33 the path keeps the prefix, as ASGI has it; before, it did not."""

    async def host(scope: dict[str, Any], receive: Any, send: Any) -> None:
        path = scope["path"]
        assert path.startswith(prefix + "/")
        inner = {**scope, "root_path": prefix, "app_root_path": "", "path": path[len(prefix) :] if strips else path}
        await app(inner, receive, send)

    return host


async def test_the_service_s_own_authenticator_is_the_default() -> None:
    authenticator = MemoryAuthenticator()
    key = authenticator.issue(Principal("acme", "tester", PERMISSIONS))
    app = create_app(memory_service(ScriptedTransport(), authenticator=authenticator))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://host.test") as client:
        assert (await client.get(AGENTS)).status_code == 401
        assert (await client.get(AGENTS, headers={"Authorization": f"Bearer {key}"})).status_code == 200
        assert (await client.get("/readyz")).status_code == 200


def test_without_anybody_who_recognises_callers_there_is_no_app() -> None:
    with pytest.raises(ConfigurationError):
        create_app(memory_service(ScriptedTransport()))


@pytest.mark.parametrize(
    ("prefix", "strips"), [("/governed", False), ("/governed", True), ("/a/b", False), ("/a/b", True), ("/api", False)]
)
async def test_mounted(prefix: str, strips: bool) -> None:
    async with Api() as api:
        transport = httpx.ASGITransport(mounted(api.app, prefix, strips=strips))
        headers = {"Authorization": f"Bearer {api.key}"}
        async with httpx.AsyncClient(transport=transport, base_url="http://host.test", headers=headers) as client:
            created = await client.post(f"{prefix}{AGENTS}", json=AGENT)
            assert created.status_code == 201
            assert created.headers["location"] == f"{prefix}{AGENTS}/{created.json()['id']}"
            assert (await client.get(created.headers["location"])).json() == created.json()
            assert (await client.post(created.headers["location"] + "/invoke", json=1)).status_code == 200
            assert (await client.get(f"{prefix}/healthz")).status_code == 200
            assert (await client.get(f"{prefix}/docs/init.js")).status_code == 200
            document = (await client.get(f"{prefix}/openapi.json")).json()
            assert [server["url"] for server in document["servers"]] == ["./"]
            assert is_problem(await client.get(f"{prefix}/nope"), 404, "no-such-route")


class Server:
    """What a server does with the ASGI lifespan protocol."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.sent: list[dict[str, Any]] = []
        self._answered = asyncio.Event()

    async def tell(self, event: str) -> dict[str, Any]:
        self._answered.clear()
        await self._events.put({"type": event})
        if event == "lifespan.startup":
            self.task = asyncio.create_task(self._app({"type": "lifespan"}, self._events.get, self._send))
        async with asyncio.timeout(5):
            await self._answered.wait()
        return self.sent[-1]

    async def _send(self, event: dict[str, Any]) -> None:
        self.sent.append(event)
        self._answered.set()


async def test_opened_and_closed_with_the_server() -> None:
    life: list[str] = []

    @asynccontextmanager
    async def opened() -> AsyncIterator[Any]:
        life.append("opened")
        async with Api() as api:
            yield api.app
        life.append("closed")

    app = LifespanApp(opened)
    client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://host.test")
    with pytest.raises(RuntimeError, match="not started"):
        await client.get("/healthz")
    server = Server(app)
    assert await server.tell("lifespan.startup") == {"type": "lifespan.startup.complete"}
    assert (await client.get("/healthz")).status_code == 200
    assert life == ["opened"]
    assert await server.tell("lifespan.shutdown") == {"type": "lifespan.shutdown.complete"}
    await server.task
    assert life == ["opened", "closed"]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ConfigurationError("The database\n is behind."), "The database is behind."),
        (OSError("canary at /srv\nTraceback"), "OSError; the log tells more."),
    ],
)
@pytest.mark.parametrize("phase", ["startup", "shutdown"])
async def test_failures_are_told_in_one_line(
    error: Exception, told: str, phase: str, caplog: pytest.LogCaptureFixture
) -> None:
    @asynccontextmanager
    async def opened() -> AsyncIterator[Any]:
        if phase == "startup":
            raise error
        yield Api().app
        raise error

    server = Server(LifespanApp(opened))
    answer = await server.tell("lifespan.startup")
    if phase == "shutdown":
        answer = await server.tell("lifespan.shutdown")
    assert answer == {"type": f"lifespan.{phase}.failed", "message": told}
    await server.task
    assert ("canary" in caplog.text) is isinstance(error, OSError)


async def test_a_server_that_gives_up_closing_cancels_it() -> None:
    cleaned = asyncio.Event()

    @asynccontextmanager
    async def opened() -> AsyncIterator[Any]:
        try:
            yield Api().app
        finally:
            cleaned.set()

    server = Server(LifespanApp(opened))
    await server.tell("lifespan.startup")
    server.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await server.task
    assert cleaned.is_set()


async def test_the_app_itself_lives_without_a_lifespan_and_takes_one() -> None:
    server = Server(Api().app)
    scope = {"type": "lifespan", "asgi": {"version": "3.0"}}
    server._app = lambda _, receive, send: Api().app(scope, receive, send)
    assert (await server.tell("lifespan.startup"))["type"] == "lifespan.startup.complete"
    assert (await server.tell("lifespan.shutdown"))["type"] == "lifespan.shutdown.complete"


async def test_a_websocket_is_refused() -> None:
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    async def send(event: dict[str, Any]) -> None:
        sent.append(event)

    scope = {"type": "websocket", "asgi": {"version": "3.0"}, "path": AGENTS, "query_string": b"", "headers": []}
    await Api().app(scope, receive, send)
    assert sent == [{"type": "websocket.close"}]


async def test_a_caller_who_goes_away_is_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    """Servers cancel the handler then. The invocation runs to its end."""
    caplog.set_level(logging.WARNING)
    async with Api() as api:
        agent = await api.create()
        entered, proceed = asyncio.Event(), asyncio.Event()

        async def slow(request: Any) -> Any:
            entered.set()
            await proceed.wait()
            return outcome

        outcome = api.transport.otherwise
        api.transport.otherwise = slow
        caller = asyncio.create_task(api.invoke(agent))
        await entered.wait()
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        [running] = (await api.call("GET", f"{AGENTS}/invocations")).json()["items"]
        assert running["status"] == "running"
        assert (running["completed_at"], running["attempts"], running["execution_time_ms"]) == (None, [], None)
        proceed.set()
        assert await api.service.drain(5) == 0
        [ended] = (await api.call("GET", f"{AGENTS}/invocations")).json()["items"]
        assert ended["status"] == "succeeded"
    assert caplog.text == ""
