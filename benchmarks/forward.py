"""
The ceiling: bare Falcon that passes a body on to the agent with raw aiohttp, and its answer back. No key, no policy,
no limit, no record.

    BENCHMARK_AGENT_URL=http://127.0.0.1:9000/hook gunicorn … 'benchmarks.forward:create_asgi_app()'
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import aiohttp
import falcon.asgi

INVOKE = "/api/external-agents/{agent_id}/invoke"
AGENT_URL = "BENCHMARK_AGENT_URL"


class Forward:
    def __init__(self, agent_url: str) -> None:
        self._agent_url = agent_url
        self._session: aiohttp.ClientSession

    async def process_startup(self, scope: Mapping[str, Any], event: Mapping[str, Any]) -> None:
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))

    async def process_shutdown(self, scope: Mapping[str, Any], event: Mapping[str, Any]) -> None:
        await self._session.close()

    async def on_post(self, req: falcon.asgi.Request, resp: falcon.asgi.Response, agent_id: str) -> None:
        body = await req.stream.read()
        headers = {"Content-Type": "application/json"}
        async with self._session.post(self._agent_url, data=body, headers=headers) as answer:
            resp.data = await answer.read()
        resp.content_type = "application/json"


class Health:
    async def on_get(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        resp.media = {}


def create_asgi_app() -> falcon.asgi.App[Any, Any]:
    forward = Forward(os.environ[AGENT_URL])
    app: falcon.asgi.App[Any, Any] = falcon.asgi.App(middleware=[forward])
    app.add_route(INVOKE, forward)
    app.add_route("/healthz", Health())
    return app
