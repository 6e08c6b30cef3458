"""Guarded connections, kept alive for a while."""

from __future__ import annotations

import asyncio
import ssl
from typing import TYPE_CHECKING

import aiohttp

from external_agents.adapters.webhook.egress import EgressGuard, journey

if TYPE_CHECKING:
    from aiohttp.client import ClientTimeout
    from aiohttp.client_reqrep import ClientRequest
    from aiohttp.connector import Connection
    from aiohttp.tracing import Trace

CONNECTIONS_MAX = 4096
IDLE_MAX_S = 30.0
LIFETIME_MAX_S = 60.0
"""So that a name that has moved is noticed, however busy the connection is."""


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
            if _fit(connection):
                current.reached = True
                return connection
            connection.close()


class _Rest(asyncio.Protocol):
    """
    The protocol of a connection while it is idle.

    Nothing may come in then: what did would be taken for the answer to the next request, or, in a flood, fill the
    memory of a parser that nobody reads from. So the first byte ends the connection.
    """

    def __init__(self, transport: asyncio.Transport, protocol: asyncio.Protocol) -> None:
        self._transport = transport
        self._protocol = protocol
        self._born_s = asyncio.get_running_loop().time()

    @property
    def too_old(self) -> bool:
        return asyncio.get_running_loop().time() - self._born_s > LIFETIME_MAX_S

    def begin(self) -> None:
        if self._transport.get_write_buffer_size():
            # An answer came before the request was sent. Closing would wait for a reader that may never read.
            self._transport.abort()
        self._transport.set_protocol(self)

    def end(self) -> None:
        self._transport.set_protocol(self._protocol)

    def data_received(self, data: bytes) -> None:
        self._transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self._protocol.connection_lost(error)


def _fit(connection: Connection) -> bool:
    """Make a connection of the pool, or a new one, ready for a request; False when it has to be replaced."""
    transport, protocol = connection.transport, connection.protocol
    if transport is None or protocol is None:
        return True  # Lost as soon as it was made; sending will tell.
    rest = transport.get_protocol()
    if not isinstance(rest, _Rest):
        rest = _Rest(transport, protocol)
    elif rest.too_old:
        return False
    else:
        rest.end()
    connection.add_callback(rest.begin)
    return True
