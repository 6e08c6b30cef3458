"""The driver's connection, with an end to waiting for a server that says nothing any more."""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import suppress
from typing import Any

import psycopg

SILENCE_MAX_S = 20.0
"""For one statement. More than its timeout on the server, which therefore does not answer at all."""
CANCEL_S = 0.5
"""For asking the server to break a statement off."""


class Connection(psycopg.AsyncConnection[Any]):
    """
    A server that stands still keeps its connections open, and TCP may take hours to notice that a machine is gone:
    the connection is cut from this side then. The driver takes that for the server's own doing.
    """

    async def wait(self, *args: Any, **kwargs: Any) -> Any:
        watchdog = asyncio.get_running_loop().call_later(SILENCE_MAX_S, self._cut)
        try:
            return await super().wait(*args, **kwargs)
        finally:
            watchdog.cancel()

    async def cancel_safe(self, *, timeout: float = CANCEL_S) -> None:
        """Called when the task that waits is cancelled, which then goes on waiting until the statement has ended."""
        try:
            await super().cancel_safe(timeout=min(timeout, CANCEL_S))
        except psycopg.Error:
            self._cut()
            raise

    def _cut(self) -> None:
        with suppress(psycopg.Error, OSError), socket.socket(fileno=os.dup(self.pgconn.socket)) as connection:
            connection.shutdown(socket.SHUT_RDWR)
