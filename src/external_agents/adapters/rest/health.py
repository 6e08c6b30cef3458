"""Whether the process lives, and whether it can serve."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import TypeAlias

from falcon.asgi import Request, Response

from external_agents.adapters.rest.errors import NotReady, checks_json
from external_agents.adapters.rest.resources import Resource, show

Readiness: TypeAlias = Callable[[], Awaitable[Mapping[str, str | None]]]
"""What the service stands on, by name: None where it is fine, else what is wrong, in one line without addresses."""


async def always_ready() -> Mapping[str, str | None]:
    """For hosts that answer for their own readiness elsewhere."""
    return {}


class Health(Resource):
    is_open = True

    async def on_get(self, req: Request, resp: Response) -> None:
        show(resp, {"status": "ok"})

    on_head = on_get


class Ready(Resource):
    is_open = True

    def __init__(self, readiness: Readiness) -> None:
        self._readiness = readiness

    async def on_get(self, req: Request, resp: Response) -> None:
        checks = await self._readiness()
        if any(checks.values()):
            raise NotReady(checks)
        show(resp, {"status": "ready", "checks": checks_json(checks)})

    on_head = on_get
