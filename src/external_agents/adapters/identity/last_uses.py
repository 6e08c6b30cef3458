"""
When API keys were last used, by the hour.

A request costs one look into a dictionary. What is noted goes to the store from the background, all of it in one
statement, and each key once an hour at most.
"""

from __future__ import annotations

from datetime import datetime
from itertools import islice
from uuid import UUID

from external_agents.ports.identity import ApiKeyStore, hour_of
from external_agents.ports.system import Clock

TOLD_MAX = 1_000
"""Keys that go to the store at once."""
NOTED_MAX = 100_000
"""Keys that are noted between two tellings; further ones are passed over."""


class LastUses:
    """Of a key that is used on both sides of an hour's end between two tellings, the first use alone is noted."""

    def __init__(self, store: ApiKeyStore, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._noted: dict[UUID, datetime] = {}
        self._untold: dict[UUID, datetime] = {}
        self._told_hour = hour_of(clock.now())
        self._told: set[UUID] = set()

    def note(self, key_id: UUID) -> None:
        if key_id not in self._noted and len(self._noted) < NOTED_MAX:
            self._noted[key_id] = self._clock.now()

    async def tell(self) -> None:
        """
        Store what was noted.

        Raises:
            Unavailable: The store cannot be reached. What it was not told, it is told the next time.
        """
        noted, self._noted = self._noted, {}
        for key_id, used_at in noted.items():
            if (hour := hour_of(used_at)) > self._told_hour:
                self._told_hour, self._told = hour, set()
            if key_id not in self._told:
                self._told.add(key_id)
                self._untold[key_id] = used_at
        while some := dict(islice(self._untold.items(), TOLD_MAX)):
            await self._store.note_uses(some)
            for key_id in some:
                del self._untold[key_id]
