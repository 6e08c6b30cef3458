"""Waiting for an admission's turn within the process, without a connection in hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager
from weakref import WeakValueDictionary

from external_agents.domain.errors import Unavailable

AT_ONCE = 6
"""Fewer than the pool has, so that others find a connection too."""
WAITING_MAX = 5_000


class Turnstile:
    """
    Lets a few through at once, and one for each key, first come, first served.

    Those of one key would only wait for each other's locks in the database, and a hundred of them would hold every
    connection meanwhile.
    """

    def __init__(self, *, at_once: int = AT_ONCE, waiting_max: int = WAITING_MAX) -> None:
        self._slots = asyncio.Semaphore(at_once)
        self._gates: WeakValueDictionary[Hashable, asyncio.Lock] = WeakValueDictionary()
        self._inside = 0
        self._inside_max = at_once + waiting_max

    @asynccontextmanager
    async def turn(self, key: Hashable) -> AsyncIterator[None]:
        """
        Raises:
            Unavailable: Too many wait already.
        """
        if self._inside >= self._inside_max:
            raise Unavailable("The service, which has too much to do,", retry_after_s=1)
        self._inside += 1
        try:
            gate = self._gates.setdefault(key, asyncio.Lock())
            async with gate, self._slots:
                yield
        finally:
            self._inside -= 1
