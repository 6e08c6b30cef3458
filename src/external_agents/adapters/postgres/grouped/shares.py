"""How much of a batch goes to one who floods, while there are others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Set

import attrs

from external_agents.adapters.postgres.grouped.fair_queue import Lane

FLOOD_SHARE = 8
"""Of each kind in a batch. A batch is answered in one turn of the event loop, for whose end every newcomer waits."""
THERE_FOR_S = 1.0
"""Whoever brought something is taken to be there for so long at least, and for twice as long at the most."""


@attrs.define
class _Period:
    agents: set[Lane] = attrs.field(factory=set)
    organisations: set[str] = attrs.field(factory=set)


class Attendance:
    """Who has brought something lately: with no others there, a flood is nobody's concern."""

    def __init__(self) -> None:
        self._before, self._lately = _Period(), _Period()
        self._since_s = 0.0

    def note(self, lane: Lane, now_s: float) -> None:
        age_s = now_s - self._since_s
        if age_s >= THERE_FOR_S:
            self._before = self._lately if age_s < 2 * THERE_FOR_S else _Period()
            self._lately, self._since_s = _Period(), now_s
        self._lately.agents.add(lane)
        self._lately.organisations.add(lane[0])

    def shares(self) -> Shares:
        """For what one kind has in a batch."""
        before, lately = self._before, self._lately
        return Shares(
            of_agents=_are_several(before.agents, lately.agents),
            of_organisations=_are_several(before.organisations, lately.organisations),
        )


def _are_several(some: Set[object], others: Set[object]) -> bool:
    """Whether there is more than one, without going through thousands."""
    return len(some) > 1 or len(others) > 1 or len(some | others) > 1


class Shares:
    """
    Who has how much of a batch: an organisation as much as all others together, and FLOOD_SHARE in any case; where only
    one is there, the same holds of its agents. An agent has no more than its organisation.

    Those who are equally busy fill a batch, even two of them. One alone among idle ones does not.

    Attributes:
        has_refused: Whether somebody had to leave something.
    """

    def __init__(self, *, of_agents: bool, of_organisations: bool) -> None:
        self.has_refused = False
        self._of_agents = of_agents
        self._of_organisations = of_organisations
        self._given: dict[Lane | str, int] = defaultdict(int)
        self._all = 0

    def takes(self, lane: Lane) -> bool:
        """
        Give it one more, unless it has its share.

        They are to take turns: whoever is refused has had as many turns as the others, so that these have nothing left.
        """
        if not self._of_agents:
            return True
        name = lane[0] if self._of_organisations else lane
        given = self._given[name]
        if given >= FLOOD_SHARE and given > self._all - given:
            self.has_refused = True
            return False
        self._given[name] += 1
        self._all += 1
        return True
