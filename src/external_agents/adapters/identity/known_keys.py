"""
API keys that were recognised a moment ago.

A revoked key is refused by every process within 2 s. So a key is used for less than that, counted from before it was
read; and it is read again ahead of that time by one request alone, while the others go on with what is known: none of
them waits, and a thousand of them ask the store once.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import islice
from uuid import UUID

import attrs

from external_agents.application.shared_reads import SharedReads
from external_agents.ports.identity import ApiKey, ApiKeyStore
from external_agents.ports.system import Clock

KEPT_MAX = 4_096
KEPT_S = 1.9
"""Less than the 2 s that are promised, by what a busy event loop may need to get to a request."""
FRESH_S = 1.0
"""From then on it is read again ahead."""
ALONG_S = 0.5
"""From then on it is read along with another."""
ALONG_MAX = 500


@attrs.frozen
class KnownKey:
    """A key as it was in the store at `read_s` or later, in the clock's monotonic time."""

    key: ApiKey
    read_s: float


class KnownKeys:
    """
    At most `kept_max`, those used last.

    Only who presents a key's secret gets it kept, so that nobody can push others out by guessing.
    """

    def __init__(self, store: ApiKeyStore, clock: Clock, *, kept_max: int = KEPT_MAX) -> None:
        self._store = store
        self._clock = clock
        self._kept_max = kept_max
        self._kept: OrderedDict[UUID, KnownKey] = OrderedDict()
        self._reads: SharedReads[UUID, KnownKey | None] = SharedReads()

    def get(self, key_id: UUID) -> KnownKey | None:
        known = self._kept.get(key_id)
        if known is None:
            return None
        if not self.holds(known):
            del self._kept[key_id]
            return None
        self._kept.move_to_end(key_id)
        return known

    async def join(self, key_id: UUID) -> KnownKey | None:
        """
        What a read that is under way finds, if it is found and holds.

        Raises:
            Unavailable: The store cannot be reached.
        """
        known = await self._reads.join(key_id)
        return known if known is not None and self.holds(known) else None

    async def read(self, key_id: UUID) -> KnownKey | None:
        """
        Raises:
            Unavailable: The store cannot be reached.
        """
        return await self._reads.begin(key_id, lambda: self._read(key_id))

    def keep(self, known: KnownKey) -> KnownKey:
        """Whoever presented it knows its secret. Returns what is kept."""
        kept = self._kept.get(known.key.id)
        if kept is not None and kept.key == known.key:
            # The same object goes on, and with it whatever is remembered by its principal.
            known = attrs.evolve(known, key=kept.key)
        self._kept[known.key.id] = known
        self._kept.move_to_end(known.key.id)
        if len(self._kept) > self._kept_max:
            self._kept.popitem(last=False)
        return known

    def holds(self, known: KnownKey) -> bool:
        return self._clock.monotonic_s() - known.read_s < KEPT_S

    def is_due(self, known: KnownKey) -> bool:
        """Whether it should be read again, and nobody does so yet."""
        return self._clock.monotonic_s() - known.read_s >= FRESH_S and known.key.id not in self._reads

    async def _read(self, key_id: UUID) -> KnownKey | None:
        began_s = self._clock.monotonic_s()
        along = self._due_soon(key_id, began_s)
        found = {key.id: key for key in await self._store.find(key_id, *along)}
        for id in along:
            self._renew(id, found.get(id), began_s)
        key = found.get(key_id)
        if key is None or key.revoked_at is not None:
            self._kept.pop(key_id, None)
        return None if key is None else KnownKey(key, began_s)

    def _due_soon(self, key_id: UUID, now_s: float) -> list[UUID]:
        """Others, which are read along: else a hundred organisations cost a hundred reads a second."""
        soon = (id for id, known in self._kept.items() if id != key_id and now_s - known.read_s >= ALONG_S)
        return list(islice(soon, ALONG_MAX))

    def _renew(self, key_id: UUID, key: ApiKey | None, read_s: float) -> None:
        kept = self._kept.get(key_id)
        if kept is None:  # Meanwhile it was found revoked, or pushed out.
            return
        if key is None or key.revoked_at is not None:
            del self._kept[key_id]
        else:
            self._kept[key_id] = KnownKey(kept.key if kept.key == key else key, read_s)
