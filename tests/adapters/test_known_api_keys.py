"""A key that was recognised is known for less than 2 s, and nobody gains by it who does not hold it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta
from typing import TypeAlias
from uuid import UUID

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from external_agents.adapters.identity import ApiKeyAuthenticator, ApiKeys, ApiKeyToken
from external_agents.adapters.identity.known_keys import FRESH_S, KEPT_MAX, KEPT_S, KnownKeys
from external_agents.adapters.memory.identity import MemoryApiKeyStore
from external_agents.adapters.secrets import KeyRing
from external_agents.domain.access import Principal
from external_agents.domain.errors import Unauthenticated, Unavailable
from external_agents.ports.identity import ApiKey
from external_agents.testing.builders import new_id
from external_agents.testing.fakes import FakeClock, SequentialIds
from external_agents.testing.identity import make_key

RING = KeyRing({"k1": bytes(range(32))})
REVOKED_WITHIN_S = 2.0

Hook: TypeAlias = Callable[[], Awaitable[None]]


class WatchedStore(MemoryApiKeyStore):
    """Counts its lookups; `before` and `after` stand around each."""

    def __init__(self) -> None:
        super().__init__()
        self.lookups = 0
        self.before: Hook = _nothing
        self.after: Hook = _nothing

    async def find(self, *key_ids: UUID) -> Sequence[ApiKey]:
        self.lookups += 1
        await self.before()
        keys = await super().find(*key_ids)
        await self.after()
        return keys


async def _nothing() -> None:
    pass


async def down() -> None:
    raise Unavailable("The store")


class Held:
    """A hook that waits until the test lets it go on."""

    def __init__(self) -> None:
        self.entered, self.opened = asyncio.Event(), asyncio.Event()

    async def __call__(self) -> None:
        self.entered.set()
        await self.opened.wait()


class House:
    def __init__(self) -> None:
        self.store, self.clock = WatchedStore(), FakeClock()
        self.keys = ApiKeys(store=self.store, key_ring=RING, clock=self.clock, ids=SequentialIds(self.clock))
        self.door = ApiKeyAuthenticator(store=self.store, key_ring=RING, clock=self.clock)

    async def issued(self, *, known: bool = True, expires_in: timedelta | None = None) -> tuple[str, ApiKey]:
        text, key = await self.keys.issue("acme", "billing", expires_in=expires_in)
        if known:
            await self.door.authenticate(text)
            self.store.lookups = 0
        return text, key

    async def is_let_in(self, text: str) -> bool:
        try:
            await self.door.authenticate(text)
        except Unauthenticated:
            return False
        return True


@pytest.fixture
def house() -> House:
    return House()


async def test_a_known_key_is_not_looked_up(house: House) -> None:
    text, _ = await house.issued()
    for _ in range(100):
        assert await house.is_let_in(text)
    assert house.store.lookups == 0


async def test_its_secret_is_compared_at_every_call(house: House) -> None:
    text, key = await house.issued()
    for _ in range(3):
        assert not await house.is_let_in(ApiKeyToken.new(key.id).text)
    assert await house.is_let_in(text)


async def test_it_expires_at_its_moment(house: House) -> None:
    text, _ = await house.issued(expires_in=timedelta(seconds=0.5))
    house.clock.advance(0.499)
    assert await house.is_let_in(text)
    house.clock.advance(0.001)
    assert not await house.is_let_in(text)


async def test_one_reads_ahead_while_the_others_go_on(house: House) -> None:
    text, _ = await house.issued()
    house.clock.advance(FRESH_S)
    house.store.before = held = Held()
    ahead = asyncio.create_task(house.door.authenticate(text))
    await held.entered.wait()
    for _ in range(20):
        assert await house.is_let_in(text)
    assert house.store.lookups == 1
    held.opened.set()
    await ahead
    house.clock.advance(FRESH_S - 0.01)
    assert await house.is_let_in(text)
    assert house.store.lookups == 1


async def test_keys_that_are_due_soon_are_read_along(house: House) -> None:
    keys = [await house.issued() for _ in range(3)]
    house.clock.advance(FRESH_S)
    for text, _ in keys:
        assert await house.is_let_in(text)
    assert house.store.lookups == 1
    house.clock.advance(FRESH_S)
    await house.keys.revoke(keys[1][1].id)
    assert [await house.is_let_in(text) for text, _ in keys] == [True, False, True]
    assert house.store.lookups == 3, "one for all, and the revoked key's own refusal"


async def test_what_was_read_along_before_a_revocation_was_seen_lets_nobody_in(house: House) -> None:
    (text, _), (other_text, other) = await house.issued(), await house.issued()
    house.clock.advance(FRESH_S)
    house.store.after = held = Held()
    ahead = asyncio.create_task(house.door.authenticate(text))
    await held.entered.wait()
    house.store.after = _nothing
    await house.keys.revoke(other.id)
    assert not await house.is_let_in(other_text)
    held.opened.set()
    await ahead
    assert not await house.is_let_in(other_text)


async def test_a_key_that_was_changed_stands_for_whom_it_stands_now(house: House) -> None:
    (text, _), (other_text, other) = await house.issued(), await house.issued()
    demoted = attrs.evolve(other, principal=Principal(other.principal.org_id, other.principal.subject, ()))
    await house.store.add(demoted)
    house.clock.advance(FRESH_S)
    await house.door.authenticate(text)
    assert await house.door.authenticate(other_text) == demoted.principal


async def test_no_more_proofs_are_kept_than_keys(house: House) -> None:
    for _ in range(KEPT_MAX + 3):
        await house.issued()
    assert len(house.door._proved) == KEPT_MAX


async def test_nobody_waits_longer_than_the_key_is_good_for(house: House) -> None:
    """While the reading ahead hangs, the key is known to its last moment and no longer."""
    text, key = await house.issued()
    house.clock.advance(FRESH_S)
    house.store.before = held = Held()
    ahead = asyncio.create_task(house.door.authenticate(text))
    await held.entered.wait()
    await house.keys.revoke(key.id)
    house.clock.advance(KEPT_S - FRESH_S)
    late = asyncio.create_task(house.is_let_in(text))
    await asyncio.sleep(0)
    assert not late.done()
    held.opened.set()
    assert not await late
    with pytest.raises(Unauthenticated):
        await ahead


async def test_a_revocation_that_was_seen_holds_at_once(house: House) -> None:
    text, key = await house.issued()
    house.clock.advance(FRESH_S)
    await house.keys.revoke(key.id)
    assert not await house.is_let_in(text)
    house.store.before = held = Held()
    ahead = asyncio.create_task(house.is_let_in(text))
    await held.entered.wait()
    beside = asyncio.create_task(house.is_let_in(text))
    await asyncio.sleep(0)
    held.opened.set()
    assert await asyncio.gather(ahead, beside) == [False, False]


async def test_what_was_read_before_the_revocation_counts_from_when_its_reading_began(house: House) -> None:
    text, key = await house.issued(known=False)
    house.store.after = slowly = Held()
    first = asyncio.create_task(house.is_let_in(text))
    await slowly.entered.wait()
    joined = [asyncio.create_task(house.is_let_in(text)) for _ in range(3)]
    await asyncio.sleep(0)
    await house.keys.revoke(key.id)
    house.clock.advance(KEPT_S)
    house.store.before = held = Held()
    slowly.opened.set()
    assert await first, "it was in force when that call asked"
    await held.entered.wait()
    held.opened.set()
    assert await asyncio.gather(*joined) == [False] * 3
    assert not await house.is_let_in(text)


async def test_those_who_miss_it_at_once_look_it_up_once(house: House) -> None:
    text, _ = await house.issued(known=False)
    house.store.before = held = Held()
    calls = [asyncio.create_task(house.is_let_in(text)) for _ in range(50)]
    await held.entered.wait()
    held.opened.set()
    assert all(await asyncio.gather(*calls))
    assert house.store.lookups == 1


async def test_those_who_join_need_the_secret_too(house: House) -> None:
    text, key = await house.issued(known=False)
    house.store.before = held = Held()
    mine = asyncio.create_task(house.is_let_in(text))
    await held.entered.wait()
    guess = asyncio.create_task(house.is_let_in(ApiKeyToken.new(key.id).text))
    held.opened.set()
    assert await mine
    assert not await guess


async def test_whoever_goes_away_while_reading_takes_nothing_from_the_others(house: House) -> None:
    text, _ = await house.issued()
    house.clock.advance(KEPT_S)
    house.store.before = held = Held()
    leader = asyncio.create_task(house.is_let_in(text))
    await held.entered.wait()
    waiting, leaving = asyncio.create_task(house.is_let_in(text)), asyncio.create_task(house.is_let_in(text))
    await asyncio.sleep(0)
    for task in (leaving, leader):
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    held.opened.set()
    assert await waiting


async def test_an_outage_is_bridged_while_the_key_is_good_and_no_longer(house: House) -> None:
    text, _ = await house.issued()
    house.store.before = down
    house.clock.advance(KEPT_S - 0.01)
    assert await house.is_let_in(text)
    assert house.store.lookups == 1
    house.clock.advance(0.01)
    for _ in range(2):
        with pytest.raises(Unavailable):
            await house.door.authenticate(text)


@pytest.mark.parametrize(("expires_in_s", "takes_s"), [(1.5, 0.5), (None, 0.9)])
async def test_an_outage_does_not_lengthen_its_life(house: House, expires_in_s: float | None, takes_s: float) -> None:
    expires_in = None if expires_in_s is None else timedelta(seconds=expires_in_s)
    text, _ = await house.issued(expires_in=expires_in)
    house.clock.advance(FRESH_S)

    async def slowly_down() -> None:
        house.clock.advance(takes_s)
        await down()

    house.store.before = slowly_down
    with pytest.raises(Unavailable):
        await house.door.authenticate(text)


async def test_no_outage_lets_a_revoked_key_in_after_two_seconds(house: House) -> None:
    text, key = await house.issued()
    await house.keys.revoke(key.id)
    house.store.before = down
    house.clock.advance(REVOKED_WITHIN_S)
    with pytest.raises(Unavailable):
        await house.door.authenticate(text)


async def test_wrong_keys_are_never_kept_and_push_none_out(house: House) -> None:
    known = KnownKeys(house.store, house.clock, kept_max=2)
    mine = make_key("acme")
    await house.store.add(mine)
    found = await known.read(mine.id)
    assert found is not None
    known.keep(found)
    for _ in range(10):
        assert await known.read(new_id()) is None
        other = make_key("acme")
        await house.store.add(other)
        assert await known.read(other.id) is not None
        assert known.get(other.id) is None, "nobody has shown its secret"
    assert known.get(mine.id) == found


async def test_a_flood_of_wrong_secrets_costs_what_it_did_and_hinders_nobody(house: House) -> None:
    text, key = await house.issued()
    for _ in range(50):
        assert not await house.is_let_in(ApiKeyToken.new(key.id).text)
        assert not await house.is_let_in(ApiKeyToken.new(new_id()).text)
    assert house.store.lookups == 100
    assert await house.is_let_in(text)
    assert house.store.lookups == 100


async def test_so_many_are_kept_and_no_more(house: House) -> None:
    known = KnownKeys(house.store, house.clock, kept_max=2)
    keys = [make_key("acme") for _ in range(3)]
    for key in keys:
        await house.store.add(key)
    for number in (0, 1, 0, 2):
        if known.get(keys[number].id) is None:
            found = await known.read(keys[number].id)
            assert found is not None
            known.keep(found)
    assert [known.get(key.id) is not None for key in keys] == [True, False, True]


async def test_the_principal_stays_the_same_object_as_long_as_nothing_changes(house: House) -> None:
    """What is remembered by it, such as decisions, is found without comparing its attributes."""
    text, key = await house.issued()
    first = await house.door.authenticate(text)
    principal = Principal("acme", "billing", sorted(first.permissions))
    await house.store.add(attrs.evolve(key, principal=principal))
    for _ in range(3):
        house.clock.advance(FRESH_S)
        assert await house.door.authenticate(text) is first


steps = st.lists(
    st.one_of(
        st.tuples(st.just("wait"), st.sampled_from([0.1, 0.5, 0.9, 1.0, 1.9, 2.5])),
        st.tuples(st.just("ask"), st.just(0.0)),
        st.tuples(st.just("revoke"), st.just(0.0)),
        st.tuples(st.sampled_from(["outage", "mend"]), st.just(0.0)),
    ),
    max_size=40,
)


@given(steps)
def test_whatever_happens_a_revoked_key_opens_nothing_two_seconds_later(history: list[tuple[str, float]]) -> None:
    asyncio.run(_live(history))


async def _live(history: list[tuple[str, float]]) -> None:
    house = House()
    text, key = await house.issued(known=False, expires_in=timedelta(seconds=20))
    revoked_s: float | None = None
    for kind, seconds in history:
        if kind == "wait":
            house.clock.advance(seconds)
        elif kind == "revoke":
            await house.keys.revoke(key.id)
            revoked_s = house.clock.monotonic_s() if revoked_s is None else revoked_s
        elif kind == "ask":
            now_s = house.clock.monotonic_s()
            try:
                let_in = await house.is_let_in(text)
            except Unavailable:
                assert house.store.before is down
                continue
            if now_s >= 20:
                assert not let_in
            elif revoked_s is None:
                assert let_in
            elif now_s - revoked_s >= REVOKED_WITHIN_S:
                assert not let_in
        else:
            house.store.before = down if kind == "outage" else _nothing
