"""What waits to be admitted and to be settled, and what of it goes into the next call."""

from __future__ import annotations

from collections.abc import Iterable
from math import inf
from typing import Generic, TypeVar

from external_agents.adapters.postgres.grouped.batch import Admitting, Batch, Settling
from external_agents.adapters.postgres.grouped.fair_queue import FairQueue, Lane
from external_agents.adapters.postgres.grouped.shares import Attendance, Shares

BATCH_MAX = 128
"""Of each kind."""
BATCH_BYTES_MAX = 4 * 1024 * 1024
WAITING_BYTES_MAX = 128 * 1024 * 1024
"""Of each kind."""
ITEM_BYTES_MIN = WAITING_BYTES_MAX // 10_000
"""What an item counts for at the least, so that no more than 10,000 wait of each kind."""

Item = TypeVar("Item", Admitting, Settling)


class _Line(Generic[Item]):
    """What waits of one kind, bounded in number and bytes."""

    def __init__(self) -> None:
        self._queue: FairQueue[Item] = FairQueue(WAITING_BYTES_MAX)

    def __len__(self) -> int:
        return len(self._queue)

    def put(self, item: Item) -> None:
        self._queue.put(item.lane, item, max(item.size_bytes, ITEM_BYTES_MIN))

    def put_back(self, item: Item) -> None:
        self._queue.put_back(item.lane, item, max(item.size_bytes, ITEM_BYTES_MIN))

    def take(self, shares: Shares) -> Item | None:
        """The next whose caller still waits; None where nobody does, or whoever is next has its share."""
        while self._queue:
            item = self._queue.take()
            if item.answer.done():
                continue
            if shares.takes(item.lane):
                return item
            self.put_back(item)
            return None
        return None

    def remove(self, lane: Lane | None, before_s: float) -> list[Item]:
        return self._queue.remove(lambda item: item.since_s <= before_s, lane)


class Lines:
    """
    What waits; first come, first served within an agent.

    Attributes:
        enough: For a batch that is worth its call, whoever may still come. What a flood had to leave never is, however
            much it is: a batch that goes while the event loop is busy would make the others wait for a processor.
    """

    def __init__(self) -> None:
        self._admittings: _Line[Admitting] = _Line()
        self._settlings: _Line[Settling] = _Line()
        self._attendance = Attendance()
        self.enough: float = BATCH_MAX

    def __len__(self) -> int:
        return len(self._admittings) + len(self._settlings)

    def put(self, item: Admitting | Settling) -> None:
        """
        Raises:
            QueueFull: It was not taken.
        """
        if isinstance(item, Admitting):
            self._admittings.put(item)
        else:
            self._settlings.put(item)
        self._attendance.note(item.lane, item.since_s)

    def put_back(self, items: Iterable[Admitting | Settling]) -> None:
        """First in their order again."""
        for item in reversed([*items]):
            if isinstance(item, Admitting):
                self._admittings.put_back(item)
            else:
                self._settlings.put_back(item)

    def next_batch(self, batch_max: int = BATCH_MAX) -> Batch:
        """
        Settlements first: what has begun shall end.

        Args:
            batch_max: So many of each kind; with 1 a single item.
        """
        batch = Batch()
        room_bytes = BATCH_BYTES_MAX
        of_settlings, of_admittings = self._attendance.shares(), self._attendance.shares()
        while len(batch.settlings) < batch_max and room_bytes > 0 and (settling := self._settlings.take(of_settlings)):
            batch.settlings.append(settling)
            room_bytes -= settling.size_bytes
        if batch_max == 1 and batch:
            return batch
        left: list[Admitting] = []
        # What has to wait for another batch is bounded too: a flood of one idempotency key is not turned over and over.
        while max(len(batch.admittings), len(left)) < batch_max and room_bytes > 0:
            if (admitting := self._admittings.take(of_admittings)) is None:
                break
            if batch.takes(admitting):
                room_bytes -= admitting.size_bytes
            else:
                left.append(admitting)
        self.put_back(left)
        self.enough = inf if of_settlings.has_refused or of_admittings.has_refused else BATCH_MAX
        return batch

    def remove(self, lane: Lane | None = None, before_s: float = inf) -> list[Admitting | Settling]:
        """Take out what has waited since before then, of one agent or of all."""
        return [*self._settlings.remove(lane, before_s), *self._admittings.remove(lane, before_s)]
