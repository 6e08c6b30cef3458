"""
`/metrics` on an address of its own: nothing else, for few callers, and none of them can hold it.

It stands in the process of the supervisor, or beside the API in a worker, and takes no part in what they do.
"""

from __future__ import annotations

import asyncio
import http.client
import logging
import re
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress

from external_agents.adapters.rest.metrics import Exposition, PacedExposition

PATH = b"/metrics"
BACKLOG = 128
HEAD_BYTES_MAX = 16_384
EXCHANGE_S = 10.0
"""From the connection to the end of its answer."""
CONNECTIONS_MAX = 64
PROBE_S = 2.0
PROBE_BYTES_MAX = 65_536
OURS = b"external_agents_"
END_S = 5.0
"""For a collection that is under way when all ends."""

_REQUEST_LINE = re.compile(rb"(?P<method>[!-~]+) (?P<path>/[!->@-~]*)(?:\?[!-~]*)? HTTP/1\.[01]\r\n")

_log = logging.getLogger(__name__)


def listening(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """
    A socket that listens there.

    Args:
        shared: Other sockets of the same user may listen there as well; the kernel spreads callers over them.

    Raises:
        OSError: It is taken, or not to be had.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(shared))
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def shows_metrics(host: str, port: int) -> bool:
    """Whether metrics of ours are shown there."""
    connection = http.client.HTTPConnection(host, port, timeout=PROBE_S)
    try:
        connection.request("GET", PATH.decode())
        return OURS in connection.getresponse().read(PROBE_BYTES_MAX)
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


@asynccontextmanager
async def metrics_served(listener: socket.socket, exposition: Exposition) -> AsyncIterator[None]:
    """For the length of the block, which also closes `listener`. `exposition` is called in a thread."""
    exchanges = _Exchanges(PacedExposition(exposition))
    server = await asyncio.start_server(exchanges.serve, sock=listener, limit=HEAD_BYTES_MAX)
    try:
        yield
    finally:
        server.close()
        await exchanges.end()


@contextmanager
def metrics_served_in_thread(listener: socket.socket, exposition: Exposition) -> Iterator[None]:
    """`metrics_served` for a program without an event loop."""
    loop, over = asyncio.new_event_loop(), asyncio.Event()

    async def live() -> None:
        async with metrics_served(listener, exposition):
            await over.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(live(),), name="metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join(END_S)
        if not thread.is_alive():
            loop.close()


class _Exchanges:
    """
    The connections of the moment, each for one request.

    Where there are too many, the one goes that has been silent for longest: who has something to ask is let in.
    """

    def __init__(self, exposition: PacedExposition) -> None:
        self._exposition = exposition
        self._silent: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self._asking: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(self._silent) + len(self._asking) >= CONNECTIONS_MAX:
            self._let_one_go()
        self._silent[task] = writer
        try:
            async with asyncio.timeout(EXCHANGE_S):
                head = await _head(reader)
                self._asking[task] = self._silent.pop(task)
                writer.write(await self._answer(head))
                writer.write_eof()
                await writer.drain()
                await _drained(reader)
        except (TimeoutError, OSError, asyncio.CancelledError):
            writer.transport.abort()
        finally:
            self._silent.pop(task, None)
            self._asking.pop(task, None)
            writer.close()

    async def end(self) -> None:
        tasks = [*self._silent, *self._asking]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _let_one_go(self) -> None:
        crowd = self._silent or self._asking
        task = next(iter(crowd))
        crowd.pop(task)
        task.cancel()

    async def _answer(self, head: bytes) -> bytes:
        line = _REQUEST_LINE.match(head)
        if line is None:
            return _response("400 Bad Request", "text/plain", b"")
        if line["path"] != PATH or line["method"] not in {b"GET", b"HEAD"}:
            return _response("404 Not Found", "text/plain", b"")
        try:
            media_type, text = await self._exposition()
        except Exception:
            _log.exception("the metrics cannot be collected")
            return _response("500 Internal Server Error", "text/plain", b"")
        return _response("200 OK", media_type, text, with_body=line["method"] == b"GET")


async def _head(reader: asyncio.StreamReader) -> bytes:
    """The head of a request; nothing where it is none, or too long."""
    with suppress(asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        return await reader.readuntil(b"\r\n\r\n")
    return b""


async def _drained(reader: asyncio.StreamReader) -> None:
    """Until the caller has closed: what is unread when we close would destroy the answer on its way."""
    left_bytes = HEAD_BYTES_MAX
    while left_bytes > 0 and (piece := await reader.read(left_bytes)):
        left_bytes -= len(piece)


def _response(status: str, media_type: str, text: bytes, *, with_body: bool = True) -> bytes:
    fields = [
        f"HTTP/1.1 {status}",
        f"Content-Type: {media_type}",
        f"Content-Length: {len(text)}",
        "Cache-Control: no-store",
        "X-Content-Type-Options: nosniff",
        "Connection: close",
    ]
    return "\r\n".join([*fields, "", ""]).encode() + (text if with_body else b"")
