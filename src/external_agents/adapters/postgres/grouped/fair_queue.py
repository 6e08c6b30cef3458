"""A bounded queue in which nobody stands behind another's flood."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Generic, TypeAlias, TypeVar
from uuid import UUID

import attrs

Item = TypeVar("Item")
Lane: TypeAlias = tuple[str, UUID]
"""An organisation and one of its agents."""


@attrs.define
class _Organisation(Generic[Item]):
    lanes: OrderedDict[UUID, deque[Item]] = attrs.field(factory=OrderedDict)
    size: int = 0


class QueueFull(Exception):
    """There is no room: in all, or for this organisation."""


class FairQueue(Generic[Item]):
    """
    One lane an agent, first come, first served within it. Organisations take turns, and within one its agents do.

    One organisation can fill half of it, so that there is always room for another.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._organisations: OrderedDict[str, _Organisation[Item]] = OrderedDict()
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def put(self, lane: Lane, item: Item) -> None:
        """
        Raises:
            QueueFull: It was not taken.
        """
        organisation = self._organisations.get(lane[0])
        if self._size >= self._capacity or (organisation and organisation.size >= self._capacity // 2):
            raise QueueFull
        self._lane(lane).append(item)

    def put_back(self, lane: Lane, item: Item) -> None:
        """What was taken and could not be used comes first in its lane again; there is always room for it."""
        self._lane(lane).appendleft(item)

    def take(self) -> Item:
        """
        Raises:
            IndexError: It is empty.
        """
        if not self._size:
            raise IndexError
        org_id, organisation = self._organisations.popitem(last=False)
        agent_id, lane = organisation.lanes.popitem(last=False)
        item = lane.popleft()
        self._size -= 1
        organisation.size -= 1
        if lane:
            organisation.lanes[agent_id] = lane
        if organisation.size:
            self._organisations[org_id] = organisation
        return item

    def _lane(self, lane: Lane) -> deque[Item]:
        """To be given one more."""
        organisation = self._organisations.setdefault(lane[0], _Organisation())
        organisation.size += 1
        self._size += 1
        return organisation.lanes.setdefault(lane[1], deque())
