"""Guarded connections, kept alive for a while."""

from __future__ import annotations

import asyncio
import ssl
from typing import TYPE_CHECKING

import aiohttp

from external_agents.adapters.webhook.egress import EgressGuard
from external_agents.adapters.webhook.journey import Journey, journey

if TYPE_CHECKING:
    from aiohttp.client import ClientTimeout
    from aiohttp.client_proto import ResponseHandler
    from aiohttp.client_reqrep import ClientRequest
    from aiohttp.connector import Connection
    from aiohttp.tracing import Trace

CONNECTIONS_MAX = 4096
IDLE_MAX_S = 30.0
LIFETIME_MAX_S = 60.0
"""So that a name that has moved is noticed, however busy the connection is."""

READ_BYTES = 16 * 1024
_BUFFER = memoryview(bytearray(READ_BYTES))
"""For all connections: what was read into it is taken out before the event loop turns to another."""


class GuardedConnector(aiohttp.TCPConnector):
    """
    aiohttp's connections, opened past the egress guard.

    The address is judged when a connection is opened. A connection serves the one scheme, host and port that it was
    opened for, and no longer than `LIFETIME_MAX_S`.
    """

    def __init__(self, guard: EgressGuard, ssl_context: ssl.SSLContext) -> None:
        super().__init__(
            resolver=guard,
            socket_factory=guard.open_socket,
            use_dns_cache=False,
            ssl=ssl_context,
            limit=CONNECTIONS_MAX,
            limit_per_host=0,
            keepalive_timeout=IDLE_MAX_S,
        )

    async def connect(self, req: ClientRequest, traces: list[Trace], timeout: ClientTimeout) -> Connection:
        """A connection for the current journey, old or new."""
        current = journey.get()
        # aiohttp undoes escapes that it finds needless (%2F in a query); a URL that was signed does not survive that.
        req.url = current.url
        while True:
            connection = await super().connect(req, traces, timeout)
            if _passed(connection, current):
                current.reached = True
                return connection
            connection.close()


class _Gate(asyncio.BufferedProtocol):
    """
    What stands between a connection and aiohttp's protocol for it, and lets in what is allowed.

    While the connection is idle, that is nothing: what came then would be taken for the answer to the next request. In
    an exchange it is a bounded number of bytes, before the head of the answer is complete and in all: an agent could
    send interim answers or chunk extensions for ever, and aiohttp would work through them. Reads are small, so that one
    flood does not keep the others waiting.
    """

    def __init__(self, transport: asyncio.Transport, protocol: ResponseHandler) -> None:
        self._transport = transport
        self._protocol = protocol
        self._born_s = asyncio.get_running_loop().time()
        self._journey: Journey | None = None

    @property
    def too_old(self) -> bool:
        return asyncio.get_running_loop().time() - self._born_s > LIFETIME_MAX_S

    def open(self, current: Journey) -> None:
        self._journey = current

    def close(self) -> None:
        self._journey = None
        if self._protocol.should_close or self._transport.get_write_buffer_size():
            # Closing in good order would wait until the other side has read the rest of the request.
            self._transport.abort()

    def get_buffer(self, sizehint: int) -> memoryview:
        return _BUFFER

    def buffer_updated(self, nbytes: int) -> None:
        if self._transport.is_closing():
            return
        if self._journey is not None and self._journey.takes(nbytes):
            self._protocol.data_received(bytes(_BUFFER[:nbytes]))
        else:
            self._transport.abort()

    def eof_received(self) -> None:
        self._protocol.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._protocol.connection_lost(exc)

    def pause_writing(self) -> None:
        self._protocol.pause_writing()

    def resume_writing(self) -> None:
        self._protocol.resume_writing()


def _passed(connection: Connection, current: Journey) -> bool:
    """Open the gate of a connection, from the pool or new; False when the connection has to be replaced."""
    transport, protocol = connection.transport, connection.protocol
    if transport is None or protocol is None:
        return True  # Lost as soon as it was made; sending will tell.
    gate = transport.get_protocol()
    if not isinstance(gate, _Gate):
        gate = _Gate(transport, protocol)
        transport.set_protocol(gate)
    elif gate.too_old:
        return False
    gate.open(current)
    connection.add_callback(gate.close)
    return True
