"""How much of a batch goes to one who floods, while there are others."""

from __future__ import annotations

from collections import defaultdict

from external_agents.adapters.postgres.grouped.fair_queue import Lane

FLOOD_SHARE = 8
"""Of each kind in a batch. A batch is answered in one turn of the event loop, for whose end every newcomer waits."""
THERE_FOR_S = 1.0
"""Whoever brought something is taken to be there for so long at least, and for twice as long at the most."""


class Attendance:
    """Who has brought something lately: with no others there, a flood is nobody's concern."""

    def __init__(self) -> None:
        self._before: set[Lane] = set()
        self._lately: set[Lane] = set()
        self._since_s = 0.0

    def note(self, lane: Lane, now_s: float) -> None:
        age_s = now_s - self._since_s
        if age_s >= THERE_FOR_S:
            self._before = self._lately if age_s < 2 * THERE_FOR_S else set()
            self._lately, self._since_s = set(), now_s
        self._lately.add(lane)

    def shares(self) -> Shares | None:
        """For what one kind has in a batch; None: only one agent is there."""
        there = self._before | self._lately
        if len(there) < 2:
            return None
        return Shares(of_organisations=len({org_id for org_id, _ in there}) > 1)


class Shares:
    """
    Who has how much of a batch: an agent as much as all others together, and FLOOD_SHARE in any case; the same holds of
    an organisation where there are several.

    Those who are equally busy fill a batch, even two of them. One alone among idle ones does not.
    """

    def __init__(self, *, of_organisations: bool) -> None:
        self._of_organisations = of_organisations
        self._given: dict[Lane | str, int] = defaultdict(int)
        self._all = 0

    def takes(self, lane: Lane) -> bool:
        """
        Give it one more, unless it has its share.

        They are to take turns: whoever is refused has had as many turns as the others, so that these have nothing left.
        """
        names: tuple[Lane | str, ...] = (lane, lane[0]) if self._of_organisations else (lane,)
        for name in names:
            given = self._given[name]
            if given >= FLOOD_SHARE and given > self._all - given:
                return False
        for name in names:
            self._given[name] += 1
        self._all += 1
        return True
