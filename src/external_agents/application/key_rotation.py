"""
Moving all that was sealed to the first of the service's secret keys, so that the others can be retired.

The plaintexts stay what they are, and so do the agents: whoever has opened a secret need not open it again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import attrs

from external_agents.domain.errors import SecretUnreadable
from external_agents.ports.identity import hash_key_context
from external_agents.ports.secrets import EnvelopeStore, HashKey, KeyUse, Reseal, SecretBox, SecretPlace
from external_agents.ports.system import Clock

PASSES_MAX = 20
PASS_AGAIN_S = 0.25
"""What others were changing is looked at again after this time, so often."""

Progress: TypeAlias = Callable[[int], None]
"""Is told how many secrets have been looked at since it was told last."""


@attrs.frozen(kw_only=True)
class Rewrapped:
    """
    Attributes:
        resealed: How many secrets.
        before, after: What hung, and hangs, on each secret key, by its id; those of the setting first.
        unreadable: Secrets that could not be opened, and why.
        unreadable_hash_keys: The same for what API keys were hashed with, by the id of its secret key.
        retirable: Keys of the setting, behind the first, that nothing hangs on any more.
    """

    resealed: int
    before: Mapping[str, KeyUse]
    after: Mapping[str, KeyUse]
    unreadable: Mapping[SecretPlace, str]
    unreadable_hash_keys: Mapping[str, str]
    retirable: Sequence[str]

    @property
    def left(self) -> int:
        """Secrets that were sealed with an older key all the while: a process goes on sealing with it."""
        older = [use.secrets for key_id, use in self.after.items() if key_id != next(iter(self.after))]
        return max(0, sum(older) - len(self.unreadable))


class KeyRotation:
    """
    Args:
        key_ids: Of the secret keys that there are; the first seals.
        hash_keys: What API keys are hashed with, by the ids of the secret keys.
        reseal: Opens with any of the keys, and seals with the first.
    """

    def __init__(
        self,
        *,
        store: EnvelopeStore,
        reseal: Reseal,
        secret_box: SecretBox,
        key_ids: Sequence[str],
        hash_keys: Mapping[str, bytes],
        clock: Clock,
    ) -> None:
        self._store = store
        self._reseal = reseal
        self._secret_box = secret_box
        self._key_ids = tuple(key_ids)
        self._hash_keys = hash_keys
        self._clock = clock

    async def uses(self) -> Mapping[str, KeyUse]:
        """What hangs on each secret key, by its id; those that there are first, in their order."""
        uses = await self._store.uses()
        return {key_id: KeyUse() for key_id in self._key_ids} | dict(sorted(uses.items()))

    async def missing(self) -> Sequence[str]:
        """The ids of secret keys that something hangs on and that are not there; `k1 or k2` where either would do."""
        there = frozenset(self._key_ids)
        return sorted({" or ".join(sorted(ids)) for ids in await self._store.key_ids() if not ids & there})

    async def rewrap(self, on_progress: Progress = lambda looked_at: None) -> Rewrapped:
        """
        Seal everything with the first key. It may be ended at any moment and begun again: what is done stays done.

        Raises:
            Unavailable: The store cannot be reached.
        """
        before = await self.uses()
        unreadable_hash_keys = await self._rewrap_hash_keys()
        resealed, unreadable = await self._pass(before, on_progress)
        for _ in range(PASSES_MAX):
            after = await self.uses()
            done = Rewrapped(
                resealed=resealed,
                before=before,
                after=after,
                unreadable=unreadable,
                unreadable_hash_keys=unreadable_hash_keys,
                retirable=[key_id for key_id in self._key_ids[1:] if after[key_id] == KeyUse()],
            )
            if not done.left:
                break
            await self._clock.sleep(PASS_AGAIN_S)
            more, unreadable = await self._pass(after, lambda looked_at: None)
            resealed += more
        return done

    async def _pass(self, uses: Mapping[str, KeyUse], on_progress: Progress) -> tuple[int, Mapping[SecretPlace, str]]:
        resealed = 0
        unreadable: dict[SecretPlace, str] = {}
        for key_id in uses:
            after: SecretPlace | None = None
            while key_id != self._key_ids[0]:
                step = await self._store.reseal(key_id, self._reseal, after=after)
                resealed += step.resealed
                unreadable.update(step.unreadable)
                on_progress(step.resealed + len(step.unreadable))
                if (after := step.last) is None:
                    break
        return resealed, unreadable

    async def _rewrap_hash_keys(self) -> Mapping[str, str]:
        first = self._key_ids[0]
        unreadable = {}
        for key in await self._store.hash_keys():
            if (key.sealed_with or key.hash_key_id) == first:
                continue
            try:
                envelope = self._sealed_anew(key)
            except SecretUnreadable as error:
                unreadable[key.hash_key_id] = str(error)
            else:
                sealed = HashKey(hash_key_id=key.hash_key_id, sealed_with=first, envelope=envelope)
                await self._store.put_hash_key(sealed)
        return unreadable

    def _sealed_anew(self, key: HashKey) -> bytes:
        context = hash_key_context(key.hash_key_id)
        if key.hash_key_id in self._hash_keys:
            return self._secret_box.seal(self._hash_keys[key.hash_key_id], context)
        if key.envelope is None:
            raise SecretUnreadable(f"API keys were hashed with the key {key.hash_key_id}, which is not configured.")
        return self._secret_box.seal(self._secret_box.open(key.envelope, context), context)
