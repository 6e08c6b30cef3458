"""How long one waits for company."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Container

from external_agents.application.gathering import GATHERING_MAX_S, QUIET_TURNS_MAX, gather_newcomers


class Company:
    """Grows by one in each of these turns of the event loop."""

    def __init__(self, turns: Container[int]) -> None:
        self.size, self.turn = 1, 0
        self._turns = turns
        self._growing = asyncio.create_task(self._grow())

    async def _grow(self) -> None:
        while True:
            self.turn += 1
            self.size += self.turn in self._turns
            await asyncio.sleep(0)

    async def gathered(self, *, others: int = 100, enough: float = 100) -> int:
        """How many there were in the end."""
        await gather_newcomers(lambda: self.size, others=others, enough=enough)
        self._growing.cancel()
        return self.size


async def test_who_is_alone_waits_for_nobody() -> None:
    company = Company(())
    assert await company.gathered(others=0) == 1
    assert company.turn == 0


async def test_who_comes_turn_by_turn_is_waited_for() -> None:
    assert await Company(range(2, 30, QUIET_TURNS_MAX - 2)).gathered() == 5


async def test_a_quiet_event_loop_ends_the_wait() -> None:
    company = Company({2, 3 + QUIET_TURNS_MAX})
    assert await company.gathered() == 2
    assert company.turn == 2 + QUIET_TURNS_MAX


async def test_few_others_are_waited_for_a_few_turns() -> None:
    company = Company({20})
    assert await company.gathered(others=3) == 1
    assert company.turn == 3


async def test_enough_are_enough() -> None:
    assert await Company(range(100)).gathered(enough=7) == 7


async def test_the_wait_has_an_end() -> None:
    began_s = time.monotonic()
    assert await Company(range(10**9)).gathered(enough=float("inf")) > QUIET_TURNS_MAX
    assert GATHERING_MAX_S <= time.monotonic() - began_s < 1
