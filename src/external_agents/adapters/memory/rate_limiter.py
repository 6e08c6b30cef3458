"""Rate limits in memory."""

from __future__ import annotations

from uuid import UUID

import attrs

from external_agents.domain.rate_limit import Limits, RateWindows
from external_agents.domain.refusals import RateLimited
from external_agents.ports.rate_limiter import Place, RateLimiter, Standing
from external_agents.ports.system import Clock


@attrs.define(eq=False)
class _Taken:
    key: tuple[str, UUID]
    heads: tuple[int, ...]
    is_held: bool = True


class MemoryRateLimiter(RateLimiter):
    """
    The windows of one process, by the clock's monotonic time. They are never dropped.

    No operation awaits anything, so each is atomic on its event loop.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._windows: dict[tuple[str, UUID], RateWindows] = {}

    async def acquire(self, org_id: str, agent_id: UUID, limits: Limits) -> Place:
        key, now_s = (org_id, agent_id), self._clock.monotonic_s()
        windows = self._windows_of(key, now_s)
        if refusal := windows.refusal(limits, now_s):
            window, retry_after_s = refusal
            raise RateLimited(window.value, retry_after_s, windows.quotas(limits, now_s))
        self._windows[key] = windows = windows.taken()
        return Place(windows.quotas(limits, now_s), _Taken(key, windows.heads))

    async def release(self, place: Place) -> None:
        taken = place.token
        assert isinstance(taken, _Taken), "the place was taken from another limiter"
        if taken.is_held:
            taken.is_held = False
            self._windows[taken.key] = self._windows[taken.key].given_back(taken.heads)

    async def peek(self, org_id: str, agent_id: UUID, limits: Limits) -> Standing:
        now_s = self._clock.monotonic_s()
        windows = self._windows_of((org_id, agent_id), now_s)
        return Standing(windows.quotas(limits, now_s), windows.refusal(limits, now_s) is not None)

    def _windows_of(self, key: tuple[str, UUID], now_s: float) -> RateWindows:
        return self._windows.get(key, RateWindows()).advanced(now_s)
