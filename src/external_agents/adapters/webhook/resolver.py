"""From a host's name to its addresses, with a bound on time and threads."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import weakref
from collections.abc import Sequence
from contextlib import AsyncExitStack
from ipaddress import ip_address
from typing import Protocol, TypeAlias

from external_agents.domain.egress import Address

RESOLVE_TIMEOUT_S = 5.0
THREADS_MAX = 64
THREADS_PER_ORGANISATION_MAX = 8
"""A thread is held until the system gives up, which takes far longer than anyone here waits."""

Found: TypeAlias = "tuple[Address, ...] | OSError"


class Resolve(Protocol):
    """Where names are looked up; a host may bring its own."""

    async def __call__(self, host: str, org_id: str) -> Sequence[Address]:
        """
        All addresses of `host`, an ASCII name, on behalf of an organisation.

        Raises:
            OSError: It has none, or they could not be found out in time.
        """
        ...


class SystemResolver:
    """
    The system's resolver.

    A lookup cannot be interrupted, so it has a thread of its own that nobody waits for: not a caller whose time is up,
    and not the process at its end. Callers of one organisation who ask for a name that is being looked up share the
    answer, so a slow name holds one thread; and an organisation with many slow names holds a few, which its other names
    wait for, and nobody else's.
    """

    def __init__(
        self,
        *,
        threads_max: int = THREADS_MAX,
        threads_per_organisation_max: int = THREADS_PER_ORGANISATION_MAX,
        timeout_s: float = RESOLVE_TIMEOUT_S,
    ) -> None:
        self._timeout_s = timeout_s
        self._per_organisation_max = threads_per_organisation_max
        self._slots = asyncio.Semaphore(threads_max)
        # Of those that something runs or waits for.
        self._slots_of: weakref.WeakValueDictionary[str, asyncio.Semaphore] = weakref.WeakValueDictionary()
        self._running: dict[tuple[str, str], asyncio.Task[Found]] = {}

    async def __call__(self, host: str, org_id: str) -> Sequence[Address]:
        key = (org_id, host)
        lookup = self._running.get(key)
        if lookup is None:
            lookup = self._running[key] = asyncio.create_task(self._look_up(host, org_id))
            lookup.add_done_callback(lambda _: self._running.pop(key, None))
        try:
            async with asyncio.timeout(self._timeout_s):
                found = await asyncio.shield(lookup)
        except TimeoutError:
            raise _too_long() from None
        if isinstance(found, OSError):
            raise found
        return found

    async def aclose(self) -> None:
        lookups = list(self._running.values())
        for lookup in lookups:
            lookup.cancel()
        await asyncio.gather(*lookups, return_exceptions=True)

    async def _look_up(self, host: str, org_id: str) -> Found:
        async with AsyncExitStack() as held:
            try:
                # Nobody waits any longer for one that has not begun by then.
                async with asyncio.timeout(self._timeout_s):
                    await held.enter_async_context(self._slots_for(org_id))
                    await held.enter_async_context(self._slots)
            except TimeoutError:
                return _too_long()
            loop = asyncio.get_running_loop()
            answer: asyncio.Future[Found] = loop.create_future()

            def ask() -> None:
                found = _system_addresses(host)
                with contextlib.suppress(RuntimeError):  # The loop may be closed by now.
                    loop.call_soon_threadsafe(lambda: None if answer.done() else answer.set_result(found))

            threading.Thread(target=ask, daemon=True, name="external-agents-resolver").start()
            return await answer

    def _slots_for(self, org_id: str) -> asyncio.Semaphore:
        return self._slots_of.setdefault(org_id, asyncio.Semaphore(self._per_organisation_max))


def _too_long() -> socket.gaierror:
    return socket.gaierror(socket.EAI_AGAIN, "the lookup took too long")


def _system_addresses(host: str) -> Found:
    try:
        found = socket.getaddrinfo(host.encode("ascii"), None, type=socket.SOCK_STREAM)
    except OSError as error:
        return error
    return tuple(dict.fromkeys(ip_address(entry[4][0]) for entry in found))
