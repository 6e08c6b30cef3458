"""
Agents that go by themselves for a while, because a batch of theirs failed: so that what is at fault fails alone.

They take turns, one batch of one agent each. Whose batch goes well was not at fault, and is among the others again at
once. Whoever waits for a lock waits a little at a time, so that the others of them have their turns meanwhile.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import attrs

from external_agents.adapters.postgres.grouped.batch import Admitting, Settling
from external_agents.adapters.postgres.grouped.fair_queue import Lane
from external_agents.adapters.postgres.grouped.lines import BATCH_MAX, Lines

APART_FOR_S = 10.0
"""An agent that was at fault stays by itself for so long."""
LOCK_WAIT_MIN_S = 0.02
LOCK_WAIT_MAX_S = 0.64


@attrs.define(eq=False)
class Lone:
    """
    One agent by itself.

    Attributes:
        until_s: It was at fault, and stays until then; 0: not so far.
        has_turn: It waits for its turn, or has it.
    """

    lane: Lane
    lines: Lines = attrs.field(factory=Lines)
    until_s: float = 0.0
    batch_max: int = BATCH_MAX
    lock_wait_s: float = LOCK_WAIT_MIN_S
    has_turn: bool = False


class Apart:
    def __init__(self) -> None:
        self._lones: dict[Lane, Lone] = {}
        self._turns: deque[Lone] = deque()

    def __len__(self) -> int:
        """How many agents wait for their turn."""
        return len(self._turns)

    def of(self, lane: Lane, now_s: float) -> Lone | None:
        """The agent, if it goes by itself."""
        lone = self._lones.get(lane)
        if lone and not lone.has_turn and lone.until_s <= now_s:
            del self._lones[lane]
            return None
        return lone

    def part(self, items: Iterable[Admitting | Settling], now_s: float) -> None:
        """Every agent of a batch that failed goes by itself."""
        self._lones = {lane: lone for lane, lone in self._lones.items() if lone.has_turn or lone.until_s > now_s}
        by_lane: dict[Lane, list[Admitting | Settling]] = {}
        for item in items:
            by_lane.setdefault(item.lane, []).append(item)
        for lane, own in by_lane.items():
            lone = self._lones.setdefault(lane, Lone(lane))
            lone.lines.put_back(own)
            self.await_turn(lone)

    def await_turn(self, lone: Lone) -> None:
        if not lone.has_turn:
            lone.has_turn = True
            self._turns.append(lone)

    def next_turn(self) -> Lone:
        """Call `end_turn` after it."""
        return self._turns.popleft()

    def end_turn(self, lone: Lone) -> None:
        lone.has_turn = False
        if lone.lines and self._lones.get(lone.lane) is lone:
            self.await_turn(lone)

    def went_well(self, lone: Lone, now_s: float) -> list[Admitting | Settling]:
        """Returns what goes with the others again."""
        lone.batch_max = min(2 * lone.batch_max, BATCH_MAX)
        lone.lock_wait_s = LOCK_WAIT_MIN_S
        if lone.until_s > now_s:
            return []
        del self._lones[lone.lane]
        return lone.lines.remove()

    def was_at_fault(self, lone: Lone, now_s: float, *, held_up: bool) -> None:
        """`held_up`: by a lock; else one of its items cannot be done, and it goes on one by one until that is out."""
        lone.until_s = now_s + APART_FOR_S
        if held_up:
            lone.lock_wait_s = min(2 * lone.lock_wait_s, LOCK_WAIT_MAX_S)
        else:
            lone.batch_max = 1

    def remove(self, before_s: float = float("inf")) -> list[Admitting | Settling]:
        """Take out what has waited for a turn since before then."""
        removed = [item for lone in self._turns for item in lone.lines.remove(before_s=before_s)]
        for lone in [lone for lone in self._turns if not lone.lines]:
            self._turns.remove(lone)
            lone.has_turn = False
        return removed
