"""Waiting for company, so that many share one call."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

QUIET_TURNS_MAX = 10
"""From a request's bytes to its admission the event loop turns four or five times."""
GATHERING_MAX_S = 0.01


async def gather_newcomers(size: Callable[[], int], *, others: int, enough: float) -> None:
    """
    Wait until the event loop has nothing more to bring, or `enough` are there.

    While the process has other things to do, more come, and waiting costs nothing; an idle loop turns at once, and the
    wait is over in a tenth of a millisecond.

    Args:
        size: How many are there.
        others: How many could still come; for one who is alone nobody is waited for.
    """
    time = asyncio.get_running_loop().time
    until_s = time() + GATHERING_MAX_S
    quiet, quiet_max, there = 0, min(QUIET_TURNS_MAX, others), size()
    while quiet < quiet_max and there < enough and time() < until_s:
        await asyncio.sleep(0)
        before, there = there, size()
        quiet = 0 if there > before else quiet + 1
