"""
When API keys were last used, by the hour.

A request costs one look into a set. What is noted goes to the store from the background, all of it in one statement,
and each key once an hour at most.
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
"""Further keys are passed over until the next hour."""


class LastUses:
    def __init__(self, store: ApiKeyStore, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._hour = hour_of(clock.now())
        self._noted: set[UUID] = set()
        self._untold: dict[UUID, datetime] = {}

    def note(self, key_id: UUID) -> None:
        if key_id not in self._noted and len(self._noted) < NOTED_MAX:
            self._noted.add(key_id)
            self._untold[key_id] = self._clock.now()

    async def tell(self) -> None:
        """
        Store what was noted, and begin another hour when it is time.

        Raises:
            Unavailable: The store cannot be reached. What it was not told, it is told the next time.
        """
        if (hour := hour_of(self._clock.now())) != self._hour:
            self._hour = hour
            self._noted = set(self._untold)
        while some := dict(islice(self._untold.items(), TOLD_MAX)):
            await self._store.note_uses(some)
            for key_id in some:
                del self._untold[key_id]
