"""The keys of an issuer, kept for a while, so that tokens are judged without asking for them."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable

import attrs

from external_agents.adapters.identity.jwt.key_set import KeySet, KeySetUnavailable
from external_agents.domain.errors import Unavailable
from external_agents.ports.system import Clock

FRESH_S = 300.0
"""After that they are fetched again, while those that there are still serve."""
OLD_S = 600.0
"""After that they serve no more until it is known whether they are the issuer's still."""
STALE_MAX_S = 3600.0
"""So long they serve while the issuer cannot be reached."""
AGAIN_S = 10.0
"""Between two attempts while there are keys, and between two fetches for the sake of unknown names."""
NOTHING_KEPT_AGAIN_S = 2.0
"""Between two attempts while there are none."""

_log = logging.getLogger(__name__)


@attrs.frozen
class _Known:
    """The keys as they were at `read_s` or later, in the clock's monotonic time."""

    keys: KeySet
    read_s: float


class IssuerKeys:
    """
    However many wait for keys, they are fetched once. The fetch belongs to none of them: who goes away stops nothing.

    Args:
        fetch: Gets them from the issuer; raises KeySetUnavailable.
    """

    def __init__(self, fetch: Callable[[], Awaitable[KeySet]], clock: Clock) -> None:
        self._fetch = fetch
        self._clock = clock
        self._known: _Known | None = None
        self._flight: asyncio.Task[KeySet | None] | None = None
        self._began_s = -math.inf
        self._kid_began_s = -math.inf
        self._is_failing = False

    def kept(self) -> KeySet | None:
        """What serves without waiting; the same object as long as the issuer's keys stay the same."""
        if self._known is None:
            return None
        age_s = self._since(self._known.read_s)
        if age_s >= (STALE_MAX_S if self._is_failing else OLD_S):
            return None
        if age_s >= FRESH_S and self._flight is None and self._since(self._began_s) >= AGAIN_S:
            self._start()
        return self._known.keys

    async def for_kid(self, kid: str | None) -> KeySet:
        """
        The issuer's keys. Where no key has this name they are fetched anew, unless they just were for that reason.

        Raises:
            Unavailable: They cannot be fetched, and those that were kept are too old, or do not have the name.
        """
        keys = self.kept()
        if keys is None:
            keys = await self._for_want_of_any()
        elif kid is not None and not keys.named(kid):
            keys = await self._asked_anew(keys)
        if keys is None:
            raise Unavailable("The token issuer's key set")
        return keys

    async def aclose(self) -> None:
        if self._flight is not None:
            self._flight.cancel()
            await asyncio.gather(self._flight, return_exceptions=True)

    async def _for_want_of_any(self) -> KeySet | None:
        if self._flight is None and self._is_failing and self._since(self._began_s) < NOTHING_KEPT_AGAIN_S:
            return None
        return await self._fetched() or self.kept()

    async def _asked_anew(self, kept: KeySet) -> KeySet | None:
        """None: the name may be one of the issuer's, or not."""
        if self._flight is None:
            if self._since(self._kid_began_s) < AGAIN_S:
                return None if self._is_failing else kept
            self._kid_began_s = self._clock.monotonic_s()
        return await self._fetched()

    async def _fetched(self) -> KeySet | None:
        """None: there is nothing to be had."""
        return await asyncio.shield(self._flight or self._start())

    def _start(self) -> asyncio.Task[KeySet | None]:
        self._began_s = self._clock.monotonic_s()
        self._flight = asyncio.create_task(self._fly(self._began_s), name="external-agents JWKS")
        return self._flight

    async def _fly(self, began_s: float) -> KeySet | None:
        try:
            return self._taken(await self._fetch(), began_s)
        except KeySetUnavailable as outage:
            _log.warning("the token issuer's JWK set cannot be fetched: %s", outage)
        except Exception:
            _log.exception("the token issuer's JWK set cannot be fetched")
        finally:
            self._flight = None
        self._is_failing = True
        return None

    def _taken(self, fetched: KeySet, began_s: float) -> KeySet:
        before = None if self._known is None else self._known.keys
        if self._is_failing:
            _log.info("the token issuer's JWK set can be fetched again")
        self._is_failing = False
        if before is not None and fetched == before:
            fetched = before  # The same object goes on, and with it what was verified with it.
        elif not fetched.keys:
            _log.warning(
                "the token issuer's JWK set has no usable key: %s", "; ".join(fetched.skipped) or "it is empty"
            )
        elif fetched.skipped:
            _log.info("of the token issuer's JWK set, not used: %s", "; ".join(fetched.skipped))
        self._known = _Known(fetched, began_s)
        return fetched

    def _since(self, moment_s: float) -> float:
        return self._clock.monotonic_s() - moment_s
