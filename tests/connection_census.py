"""An ASGI app that answers with the id of its process, and the number of connections that this still knows."""

from __future__ import annotations

import gc
import os
from typing import Any

from gunicorn.asgi.protocol import ASGIProtocol  # type: ignore[import-untyped]


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        while (event := (await receive())["type"]) != "lifespan.shutdown":
            await send({"type": f"{event}.complete"})
        await send({"type": "lifespan.shutdown.complete"})
        return
    gc.collect()
    known = sum(isinstance(thing, ASGIProtocol) for thing in gc.get_objects())
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"17")]})
    await send({"type": "http.response.body", "body": b"%8d %8d" % (os.getpid(), known)})
