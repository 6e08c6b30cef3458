"""An application that is opened when its server starts, and closed when it stops."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

from external_agents.adapters.rest.asgi import AsgiApp, Receive, Scope, Send
from external_agents.domain.errors import ExternalAgentsError

_log = logging.getLogger(__name__)


class LifespanApp:
    """
    Opens an ASGI app at the server's start (ASGI lifespan protocol) and passes every request on to it.

    Where opening fails, the server is told so in one line and does not serve. Servers bound the time that closing may
    take; what is still open then is cancelled.
    """

    def __init__(self, open_app: Callable[[], AbstractAsyncContextManager[AsgiApp]]) -> None:
        self._open_app = open_app
        self._app: AsgiApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif self._app is None:
            raise RuntimeError("The application was not started: its server must speak the ASGI lifespan protocol.")
        else:
            await self._app(scope, receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        phase = "startup"
        try:
            async with self._open_app() as self._app:
                await send({"type": "lifespan.startup.complete"})
                phase = "shutdown"
                await receive()
        except Exception as error:
            await send({"type": f"lifespan.{phase}.failed", "message": _one_line(error)})
        else:
            await send({"type": "lifespan.shutdown.complete"})


def _one_line(error: Exception) -> str:
    if isinstance(error, ExternalAgentsError):
        return " ".join(str(error).split())
    _log.error("the application failed", exc_info=error)
    return f"{type(error).__name__}; the log tells more."
