"""Counting requests, and showing what was counted; by whom and how is the caller's choice."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, TypeAlias

from falcon.asgi import Request, Response

from external_agents.adapters.rest.asgi import Send
from external_agents.adapters.rest.incoming import Incoming
from external_agents.adapters.rest.resources import Resource

Exposition: TypeAlias = Callable[[], tuple[str, bytes]]
"""The media type and the text of all metrics. It is called in a thread, one at a time."""

RequestObserver: TypeAlias = Callable[[str, str | None, int | None, float], None]
"""
Told of every request as its answer begins: the method (`other`: one that the route does not have), the template of its
route (None: there is none), the status (None: the caller left before) and the seconds since it came. It must not raise.
"""

OTHER_METHOD = "other"
BUSY_SHARE = 0.1
PAUSE_MAX_S = 1.0


class PacedExposition:
    """
    The metrics for many who ask.

    However often it is asked, collecting them takes a tenth of the time at most. Those who ask meanwhile wait for the
    next collection and share it: what was counted when they asked is in it.
    """

    def __init__(self, exposition: Exposition) -> None:
        self._exposition = exposition
        self._turn = asyncio.Lock()
        self._next: asyncio.Task[tuple[str, bytes]] | None = None
        self._not_before_s = 0.0

    async def __call__(self) -> tuple[str, bytes]:
        if self._next is None:
            self._next = asyncio.create_task(self._collect())
        return await asyncio.shield(self._next)

    async def _collect(self) -> tuple[str, bytes]:
        async with self._turn:
            await asyncio.sleep(self._not_before_s - time.monotonic())
            self._next = None
            began_s = time.monotonic()
            try:
                return await asyncio.to_thread(self._exposition)
            finally:
                ended_s = time.monotonic()
                self._not_before_s = ended_s + min(PAUSE_MAX_S, (ended_s - began_s) * (1 / BUSY_SHARE - 1))


class Metrics(Resource):
    """The metrics, to anybody."""

    is_open = True

    def __init__(self, exposition: Exposition) -> None:
        self._exposition = PacedExposition(exposition)

    async def on_get(self, req: Request, resp: Response) -> None:
        resp.content_type, resp.data = await self._exposition()

    on_head = on_get


class Tally:
    """Tells of one request, once: when its answer begins, or when it has ended without one."""

    __slots__ = ("_began_s", "_incoming", "_observe", "_send", "_told")

    def __init__(self, observe: RequestObserver, incoming: Incoming, send: Send) -> None:
        self._observe = observe
        self._incoming = incoming
        self._send = send
        self._told = False
        self._began_s = time.perf_counter()

    async def send(self, event: dict[str, Any]) -> None:
        if event["type"] == "http.response.start":
            self._tell(event["status"])
        await self._send(event)

    def end(self) -> None:
        if not self._told:
            self._tell(None)

    def _tell(self, status: int | None) -> None:
        self._told = True
        incoming = self._incoming
        self._observe(incoming.method or OTHER_METHOD, incoming.route, status, time.perf_counter() - self._began_s)
