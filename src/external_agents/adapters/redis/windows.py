"""The script that keeps an agent's windows: what it is asked, and what it answers."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias
from uuid import UUID

import attrs

from external_agents.adapters.redis.connection import Command
from external_agents.domain.rate_limit import (
    BUCKETS,
    Limits,
    Quota,
    RateQuotas,
    RateWindows,
    Window,
    WindowCount,
    leaves_after_s,
)

SCRIPT = Path(__file__).with_name("windows.lua").read_bytes()
SHA = hashlib.sha1(SCRIPT, usedforsecurity=False).hexdigest()
"""The name that Redis gives it."""
KEY_PREFIX = "external-agents:rate:"

Numbers: TypeAlias = tuple[int, int, int]
"""One for the minute, one for the hour, one for the day: limits (-1: none), or the heads of a place."""

_SUMMARY = struct.Struct("<12I")
_COUNTS = struct.Struct(f"<{3 * BUCKETS}I")
_UNLIMITED = -1
_MINUTE, _HOUR, _DAY = _WINDOWS = tuple(Window)


def key_of(org_id: str, agent_id: UUID) -> str:
    """
    The one key of an agent; its hash tag is what tells agents apart, so that a cluster may put each where it likes.

    The id's text has a fixed length, so that no organisation's name makes two agents share a key.
    """
    return f"{KEY_PREFIX}{{{org_id}:{agent_id}}}"


def numbers_of(limits: Limits) -> Numbers:
    get = limits.get
    return get(_MINUTE, _UNLIMITED), get(_HOUR, _UNLIMITED), get(_DAY, _UNLIMITED)


def limits_of(numbers: Numbers) -> Limits:
    return {window: limit for window, limit in zip(_WINDOWS, numbers, strict=True) if limit != _UNLIMITED}


def take(key: str, places: int, limits: Numbers) -> Command:
    """Take up to so many places; 0: look."""
    return ("EVALSHA", SHA, 1, key, "take", places, *limits)


def give(key: str, places: int, heads: Numbers) -> Command:
    """Give back places that were taken when the heads were these."""
    return ("EVALSHA", SHA, 1, key, "give", places, *heads)


def with_source(command: Command) -> Command:
    """The same for a server that does not know the script yet."""
    return ("EVAL", SCRIPT, *command[2:])


@attrs.frozen
class Answer:
    """
    What `take` came to.

    Attributes:
        taken: How many places.
        now_s: Redis's time.
        heads: The current buckets, where the places were taken.
        used: What each window has counted, the places included.
        oldest: The oldest bucket of each window that counts anything; 0 where none does.
        windows: All of it, where fewer places were taken than asked for.
    """

    taken: int
    now_s: float
    heads: Numbers
    used: Sequence[int]
    oldest: Sequence[int]
    windows: RateWindows | None

    @classmethod
    def of(cls, reply: bytes) -> Answer:
        """
        Raises:
            struct.error: It is no answer of the script's.
        """
        taken, seconds, microseconds, *of_windows = _SUMMARY.unpack_from(reply)
        minute, hour, day = of_windows[0::3]
        heads = (minute, hour, day)
        windows = _windows(heads, reply) if len(reply) > _SUMMARY.size else None
        return cls(taken, seconds + microseconds / 1_000_000, heads, of_windows[1::3], of_windows[2::3], windows)

    def quotas_of_places(self, limits: Limits) -> list[RateQuotas]:
        """
        As the limits stood with each of the places, in the order in which they were taken.

        The same as `RateWindows.quotas`, without the windows: no place passes a limit, so that the next one comes free
        when the oldest bucket leaves, however many were taken after it.
        """
        if not limits:
            return [RateQuotas()] * self.taken
        columns = []
        for window, used, oldest in zip(_WINDOWS, self.used, self.oldest, strict=True):
            if (limit := limits.get(window)) is not None:
                resets_in_s = leaves_after_s(window, oldest, self.now_s)
                counts = range(used - self.taken + 1, used + 1)
                columns.append([Quota(window, limit, count, resets_in_s) for count in counts])
        return [RateQuotas(row) for row in zip(*columns, strict=True)]


def _windows(heads: Numbers, reply: bytes) -> RateWindows:
    counts = _COUNTS.unpack_from(reply, _SUMMARY.size)
    starts = range(0, len(counts), BUCKETS)
    return RateWindows(*(WindowCount(head, counts[at : at + BUCKETS]) for head, at in zip(heads, starts, strict=True)))
