"""The driver's connection, with an end to waiting for a server that says nothing any more."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from contextlib import suppress
from typing import Any

import attrs
import psycopg

SILENCE_MAX_S = 20.0
"""For one statement. More than its timeout on the server, which therefore does not answer at all."""
CANCEL_S = 0.5
"""For asking the server to break a statement off."""


@attrs.define
class Disk:
    """What this process was last told of the server's disk. It cannot be asked: reading goes on when it is full."""

    full_at_s: float = float("-inf")

    def was_full(self, within_s: float) -> bool:
        """Whether something could not be written in the last so many seconds."""
        return time.monotonic() - self.full_at_s < within_s


DISK = Disk()


class Connection(psycopg.AsyncConnection[Any]):
    """
    A server that stands still keeps its connections open, and TCP may take hours to notice that a machine is gone:
    the connection is cut from this side then. The driver takes that for the server's own doing.
    """

    async def wait(self, *args: Any, **kwargs: Any) -> Any:
        watchdog = asyncio.get_running_loop().call_later(SILENCE_MAX_S, self._cut)
        try:
            return await super().wait(*args, **kwargs)
        except psycopg.errors.DiskFull:
            DISK.full_at_s = time.monotonic()
            raise
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
