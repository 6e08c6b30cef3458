"""One read for all who miss the same thing at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

from external_agents.domain.errors import Unavailable

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class SharedReads(Generic[K, V]):
    """
    The reads that are under way, by what they read.

    Each runs in the task of whoever began it, so that there is nothing to close. When that one goes away, or fails,
    those who joined are told that there is nothing to be had, and read for themselves; but not when the store could
    not be reached, for they have waited for it as long as anybody should.
    """

    def __init__(self) -> None:
        self._under_way: dict[K, asyncio.Future[V | None]] = {}

    def __contains__(self, key: K) -> bool:
        return key in self._under_way

    async def join(self, key: K) -> V | None:
        """
        What the read under way comes to; it may have begun before this call. None: there is none, or it failed.

        Raises:
            Unavailable: The read under way has.
        """
        shared = self._under_way.get(key)
        # Shielded: who goes away while waiting takes nothing from the others.
        return None if shared is None else await asyncio.shield(shared)

    async def begin(self, key: K, read: Callable[[], Awaitable[V]]) -> V:
        """What `read` comes to, begun now; whoever joins meanwhile shares it, or the one that was begun before it."""
        if key in self._under_way:
            return await read()
        shared: asyncio.Future[V | None] = asyncio.get_running_loop().create_future()
        self._under_way[key] = shared
        found: V | None = None
        try:
            found = await read()
            return found
        except Unavailable as outage:
            shared.set_exception(outage)
            shared.exception()  # Marks it as seen: perhaps nobody has joined.
            raise
        finally:
            del self._under_way[key]
            if not shared.done():
                shared.set_result(found)
