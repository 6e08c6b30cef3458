"""
Rate limits: sliding windows of a minute, an hour and a day, exact to one side.

A window is 51 buckets, each a fiftieth of the window wide: the current one and the 50 whole ones before it. What is
counted therefore reaches back between 50 and 51 buckets, so no stretch of the window's length ever holds more than the
limit, and a place comes free at most one bucket, 2 % of the window, late. The state is bounded however high the limit.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from itertools import accumulate, compress
from typing import TypeAlias

import attrs

from external_agents.domain.json_values import JsonValue

BUCKETS = 51
LIMIT_MAX = 1_000_000_000


class Window(enum.StrEnum):
    MINUTE = "minute", 60
    HOUR = "hour", 3_600
    DAY = "day", 86_400

    seconds: int

    def __new__(cls, value: str, seconds: int) -> Window:
        window = str.__new__(cls, value)
        window._value_ = value
        window.seconds = seconds
        return window

    @property
    def bucket_s(self) -> float:
        return self.seconds / (BUCKETS - 1)


Limits: TypeAlias = Mapping[Window, int]
"""How many each window admits, as far as it is limited."""

RATE_LIMIT_CONFIG_SCHEMA = {
    "type": "object",
    "description": "How many invocations are admitted in any stretch of a minute, an hour, a day. 0 admits none.",
    "properties": {
        f"requests_per_{window.value}": {
            "type": "integer",
            "minimum": 0,
            "maximum": LIMIT_MAX,
            "description": f"At most this many in any stretch of {window.seconds:,} s.",
        }
        for window in Window
    },
    "additionalProperties": False,
    "examples": [{"requests_per_minute": 60, "requests_per_day": 5000}],
}


def limits_of(config: Mapping[str, JsonValue] | None) -> Limits:
    """The limits that a validated rate_limit_config sets."""
    config = config or {}
    return {window: config[name] for window in Window if (name := f"requests_per_{window.value}") in config}


def leaves_after_s(window: Window, bucket: int, now_s: float) -> float:
    """Seconds until what was taken in the bucket of this number is no longer counted."""
    return max(0.0, (bucket + BUCKETS) * window.bucket_s - now_s)


@attrs.frozen
class WindowCount:
    """
    What one window has admitted.

    Attributes:
        head: The number of the current bucket since the epoch.
        counts: 51 counts; the one of bucket b stands at b % 51.
    """

    head: int = 0
    counts: tuple[int, ...] = (0,) * BUCKETS

    def advanced(self, window: Window, now_s: float) -> WindowCount:
        """The same at a later time; a clock that went back changes nothing."""
        head = math.floor(now_s / window.bucket_s)
        if head <= self.head:
            return self
        counts = list(self.counts)
        for bucket in range(max(self.head + 1, head - BUCKETS + 1), head + 1):
            counts[bucket % BUCKETS] = 0
        return WindowCount(head, tuple(counts))

    @property
    def used(self) -> int:
        return sum(self.counts)

    def taken(self, places: int = 1) -> WindowCount:
        """The same with `places` more in the current bucket."""
        counts = list(self.counts)
        counts[self.head % BUCKETS] += places
        return WindowCount(self.head, tuple(counts))

    def given_back(self, bucket: int) -> WindowCount:
        """The same with one place less in the bucket of this number, if that is still among the 51."""
        if not self.head - BUCKETS < bucket <= self.head or not self.counts[bucket % BUCKETS]:
            return self
        counts = list(self.counts)
        counts[bucket % BUCKETS] -= 1
        return WindowCount(self.head, tuple(counts))

    def free_after_s(self, window: Window, limit: int, now_s: float) -> float:
        """Seconds until one more is admitted under `limit`, if nothing else is admitted meanwhile."""
        if limit == 0:
            return float(window.seconds)
        surplus = self.used - limit + 1
        if surplus <= 0:
            return 0.0
        for bucket, leaving in zip(self._buckets, accumulate(self._oldest_first), strict=True):
            if leaving >= surplus:
                return leaves_after_s(window, bucket, now_s)
        return 0.0

    def oldest_leaves_after_s(self, window: Window, now_s: float) -> float:
        """Seconds until the oldest counted invocation leaves the window; 0 when none is counted."""
        oldest = next(compress(self._buckets, self._oldest_first), None)
        return 0.0 if oldest is None else leaves_after_s(window, oldest, now_s)

    @property
    def _buckets(self) -> range:
        """Their numbers, oldest first."""
        return range(self.head - BUCKETS + 1, self.head + 1)

    @property
    def _oldest_first(self) -> tuple[int, ...]:
        """The counts in this order."""
        oldest = (self.head + 1) % BUCKETS
        return self.counts[oldest:] + self.counts[:oldest]


@attrs.frozen
class Quota:
    """One limit as it stands: what is left of it, and in how many seconds the next place comes free."""

    window: Window
    limit: int
    used: int
    resets_in_s: float

    @property
    def remaining(self) -> int:
        return max(0, self.limit - self.used)


@attrs.frozen
class RateQuotas:
    """The quotas of the limits that are set, in the order minute, hour, day."""

    quotas: tuple[Quota, ...] = ()

    def given_back(self) -> RateQuotas:
        """
        As the limits stand again once a place just taken has been given back.

        It was taken in the newest bucket, so the oldest one that counts stays the same, unless nothing is left at all.
        """
        return RateQuotas(
            tuple(
                Quota(quota.window, quota.limit, quota.used - 1, quota.resets_in_s if quota.used > 1 else 0.0)
                for quota in self.quotas
            )
        )


@attrs.frozen
class RateWindows:
    """
    The three windows of one agent, taken together: all or nothing.

    They count whether or not a limit is set, so that a limit added later knows what was admitted before.
    """

    minute: WindowCount = WindowCount()
    hour: WindowCount = WindowCount()
    day: WindowCount = WindowCount()

    def __getitem__(self, window: Window) -> WindowCount:
        counts: WindowCount = getattr(self, window.value)
        return counts

    def advanced(self, now_s: float) -> RateWindows:
        return RateWindows(*(self[window].advanced(window, now_s) for window in Window))

    def taken(self) -> RateWindows:
        return RateWindows(*(self[window].taken() for window in Window))

    @property
    def heads(self) -> tuple[int, ...]:
        """The numbers of the current buckets: where a place was taken, to be given back there."""
        return tuple(self[window].head for window in Window)

    def given_back(self, heads: tuple[int, ...]) -> RateWindows:
        """The same without a place that was taken when the heads were these, where it still counts."""
        return RateWindows(*(self[window].given_back(head) for window, head in zip(Window, heads, strict=True)))

    def refusal(self, limits: Limits, now_s: float) -> tuple[Window, int] | None:
        """The window that stands longest against one more, and for how many seconds, rounded up; None: admitted."""
        waits = {
            window: self[window].free_after_s(window, limit, now_s)
            for window, limit in limits.items()
            if self[window].used >= limit
        }
        if not waits:
            return None
        window = max(waits, key=lambda window: waits[window])
        return window, max(1, math.ceil(waits[window]))

    def quotas(self, limits: Limits, now_s: float) -> RateQuotas:
        def quota(window: Window, limit: int) -> Quota:
            counts = self[window]
            used = counts.used
            wait = counts.free_after_s(window, limit, now_s) if used >= limit else 0.0
            return Quota(window, limit, used, wait or counts.oldest_leaves_after_s(window, now_s))

        return RateQuotas(tuple(quota(window, limit) for window, limit in limits.items()))
