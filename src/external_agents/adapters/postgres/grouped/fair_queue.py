"""A bounded queue in which nobody stands behind another's flood."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Generic, TypeAlias, TypeVar

import attrs

Item = TypeVar("Item")
Lane: TypeAlias = tuple[str, int]
"""An organisation, and one of its agents by the number of its id, which takes less time to look up than the id."""


@attrs.define
class _Lane(Generic[Item]):
    """Items with their weights."""

    items: deque[tuple[Item, int]] = attrs.field(factory=deque)
    weight: int = 0


@attrs.define
class _Organisation(Generic[Item]):
    lanes: OrderedDict[int, _Lane[Item]] = attrs.field(factory=OrderedDict)
    weight: int = 0


class QueueFull(Exception):
    """There is no room: in all, for this organisation, or for this agent."""


class FairQueue(Generic[Item]):
    """
    One lane an agent, first come, first served within it. Organisations take turns, and within one its agents do.

    An organisation may hold as much as it leaves free: one fills half, and there is always room for another. Within an
    organisation the same holds of its agents: one fills a third of all, and leaves room for another.

    Args:
        capacity: The weight of all items together.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._organisations: OrderedDict[str, _Organisation[Item]] = OrderedDict()
        self._weight = 0
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def put(self, lane: Lane, item: Item, weight: int = 1) -> None:
        """
        Raises:
            QueueFull: It was not taken.
        """
        organisation = self._organisations.get(lane[0])
        free = self._capacity - self._weight - weight
        if organisation is not None:
            free -= organisation.weight
            if own := organisation.lanes.get(lane[1]):
                free -= own.weight
        if free < 0 and self._size:
            raise QueueFull
        self._lane(lane, weight).items.append((item, weight))

    def put_back(self, lane: Lane, item: Item, weight: int = 1) -> None:
        """What was taken and could not be used comes first in its lane again; there is always room for it."""
        self._lane(lane, weight).items.appendleft((item, weight))

    def take(self) -> Item:
        """
        Raises:
            IndexError: It is empty.
        """
        if not self._size:
            raise IndexError
        org_id, organisation = self._organisations.popitem(last=False)
        agent_number, lane = organisation.lanes.popitem(last=False)
        item, weight = lane.items.popleft()
        self._size -= 1
        self._weight -= weight
        organisation.weight -= weight
        lane.weight -= weight
        if lane.items:
            organisation.lanes[agent_number] = lane
        if organisation.lanes:
            self._organisations[org_id] = organisation
        return item

    def remove(self, which: Callable[[Item], bool], lane: Lane | None = None) -> list[Item]:
        """Take out some of the items, of one lane or of all, in their order; the others keep their places."""
        lanes = (
            [lane]
            if lane
            else [(org_id, number) for org_id, own in self._organisations.items() for number in own.lanes]
        )
        return [item for lane in lanes for item in self._remove(which, *lane)]

    def _remove(self, which: Callable[[Item], bool], org_id: str, agent_number: int) -> list[Item]:
        organisation = self._organisations.get(org_id)
        lane = organisation.lanes.get(agent_number) if organisation else None
        if organisation is None or lane is None:
            return []
        gone = [(item, weight) for item, weight in lane.items if which(item)]
        if gone:
            lane.items = deque((item, weight) for item, weight in lane.items if not which(item))
            weight_gone = sum(weight for _, weight in gone)
            lane.weight -= weight_gone
            organisation.weight -= weight_gone
            self._weight -= weight_gone
            self._size -= len(gone)
        if not lane.items:
            del organisation.lanes[agent_number]
        if not organisation.lanes:
            del self._organisations[org_id]
        return [item for item, _ in gone]

    def _lane(self, lane: Lane, weight: int) -> _Lane[Item]:
        """To be given one more of this weight."""
        organisation = self._organisations.get(lane[0])
        if organisation is None:
            organisation = self._organisations[lane[0]] = _Organisation()
        own = organisation.lanes.get(lane[1])
        if own is None:
            own = organisation.lanes[lane[1]] = _Lane()
        organisation.weight += weight
        own.weight += weight
        self._weight += weight
        self._size += 1
        return own
