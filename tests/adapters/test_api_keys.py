from __future__ import annotations

import re
import string
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from external_agents.adapters.identity import ApiKeyAuthenticator, ApiKeys, ApiKeyToken, tokens
from external_agents.adapters.identity.api_keys import ATTRIBUTES_MAX
from external_agents.adapters.identity.last_uses import TOLD_MAX, LastUses
from external_agents.adapters.memory.identity import MemoryApiKeyStore
from external_agents.adapters.secrets import AesGcmSecretBox, KeyRing
from external_agents.domain.access import PERMISSIONS, Principal
from external_agents.domain.errors import Unauthenticated, Unavailable, ValidationError
from external_agents.ports.identity import ApiKey, hash_key_context
from external_agents.testing.fakes import FakeClock, SequentialIds

RING = KeyRing({"k1": bytes(range(32))})
LETTERS = string.digits + string.ascii_letters
KEY_ID = UUID("01890a5d-ac96-774b-bcce-b302099a8057")


class WatchedStore(MemoryApiKeyStore):
    """Counts its lookups, and is down when told so."""

    def __init__(self) -> None:
        super().__init__()
        self.lookups = 0
        self.noted: list[Mapping[UUID, datetime]] = []
        self.down = False

    async def find(self, *key_ids: UUID) -> Sequence[ApiKey]:
        self.lookups += 1
        if self.down:
            raise Unavailable("The store")
        return await super().find(*key_ids)

    async def note_uses(self, uses: Mapping[UUID, datetime]) -> None:
        if self.down:
            raise Unavailable("The store")
        self.noted.append(uses)
        await super().note_uses(uses)


class House:
    """The store, its operator and its door, at one time."""

    def __init__(self, ring: KeyRing = RING) -> None:
        self.store = WatchedStore()
        self.clock = FakeClock()
        self.keys = ApiKeys(store=self.store, key_ring=ring, clock=self.clock, ids=SequentialIds(self.clock))
        self.door = self.with_ring(ring)

    def with_ring(self, ring: KeyRing) -> ApiKeyAuthenticator:
        return ApiKeyAuthenticator(store=self.store, key_ring=ring, clock=self.clock)


@pytest.fixture
def house() -> House:
    return House()


async def test_a_key_stands_for_its_principal(house: House) -> None:
    text, key = await house.keys.issue("acme", "billing", ["invoke:external_agent"], {"team": "ops"})
    principal = Principal("acme", "billing", ["invoke:external_agent"], {"team": "ops"})
    assert key.principal == principal
    assert await house.door.authenticate(text) == principal


async def test_without_permissions_named_a_key_has_all(house: House) -> None:
    _, key = await house.keys.issue("acme", "billing")
    assert key.principal.permissions == frozenset(PERMISSIONS)
    assert key.expires_at is None


async def test_a_key_without_any_permission_has_none(house: House) -> None:
    text, _ = await house.keys.issue("acme", "billing", [])
    assert (await house.door.authenticate(text)).permissions == frozenset()


async def test_keys_are_apart(house: House) -> None:
    issued = [await house.keys.issue("acme", f"subject-{number}") for number in range(20)]
    for text, key in issued:
        assert (await house.door.authenticate(text)).subject == key.principal.subject
    assert len({text for text, _ in issued}) == 20


async def test_the_key_itself_is_kept_nowhere(house: House) -> None:
    text, key = await house.keys.issue("acme", "billing")
    kept = repr([attrs.asdict(stored) for stored in await house.store.list("acme")])
    assert text[-49:-6] not in kept
    assert key.secret_hash not in text.encode()
    assert text not in repr(key)
    assert repr(key.secret_hash) not in repr(key)
    assert text not in repr(ApiKeyToken.parse(text))


async def test_a_hash_needs_the_ring_to_be_of_use(house: House) -> None:
    text, _ = await house.keys.issue("acme", "billing")
    with pytest.raises(Unauthenticated):
        await house.with_ring(KeyRing({"k1": bytes(32)})).authenticate(text)


async def test_keys_hashed_with_an_older_ring_key_are_recognised(house: House) -> None:
    text, _ = await house.keys.issue("acme", "billing")
    rotated = KeyRing({"k2": bytes(32), "k1": bytes(range(32))})
    assert (await house.with_ring(rotated).authenticate(text)).subject == "billing"
    with pytest.raises(Unauthenticated):
        await house.with_ring(KeyRing({"k2": bytes(32)})).authenticate(text)


async def test_an_unknown_key_is_refused(house: House) -> None:
    await house.keys.issue("acme", "billing")
    with pytest.raises(Unauthenticated):
        await house.door.authenticate(ApiKeyToken.new(KEY_ID).text)
    assert house.store.lookups == 1


async def test_a_known_id_with_another_secret_is_refused(house: House) -> None:
    _, key = await house.keys.issue("acme", "billing")
    with pytest.raises(Unauthenticated):
        await house.door.authenticate(ApiKeyToken.new(key.id).text)


async def test_a_hash_serves_its_own_key_only(house: House) -> None:
    """One who can write the store cannot make a key of theirs pass for another one."""
    text, mine = await house.keys.issue("acme", "mallory")
    _, yours = await house.keys.issue("acme", "alice")
    await house.store.add(attrs.evolve(yours, secret_hash=mine.secret_hash))
    forged = ApiKeyToken.new(yours.id).text[:27] + text[27:-6]
    with pytest.raises(Unauthenticated):
        await house.door.authenticate(_with_checksum(forged))


async def test_a_revoked_key_is_refused_within_two_seconds(house: House) -> None:
    text, key = await house.keys.issue("acme", "billing")
    await house.door.authenticate(text)
    assert await house.keys.revoke(key.id)
    revoked_at = house.clock.now()
    house.clock.advance(1.9)
    with pytest.raises(Unauthenticated):
        await house.door.authenticate(text)
    [listed] = await house.keys.list("acme")
    assert listed.revoked_at == revoked_at


async def test_a_key_is_good_until_it_expires(house: House) -> None:
    text, key = await house.keys.issue("acme", "billing", expires_in=timedelta(days=90))
    assert key.expires_at == datetime(2026, 6, 8, 12, tzinfo=UTC)
    house.clock.advance(90 * 86_400 - 1)
    await house.door.authenticate(text)
    house.clock.advance(1)
    with pytest.raises(Unauthenticated):
        await house.door.authenticate(text)


async def test_all_refusals_read_the_same(house: House) -> None:
    revoked, key = await house.keys.issue("acme", "billing")
    await house.keys.revoke(key.id)
    expired, _ = await house.keys.issue("acme", "billing", expires_in=timedelta(seconds=1))
    house.clock.advance(2)
    messages = set()
    for text in ("", "nonsense", ApiKeyToken.new(KEY_ID).text, ApiKeyToken.new(key.id).text, revoked, expired):
        with pytest.raises(Unauthenticated) as refusal:
            await house.door.authenticate(text)
        messages.add(str(refusal.value))
    assert len(messages) == 1


async def test_an_outage_is_not_a_refusal(house: House) -> None:
    text, _ = await house.keys.issue("acme", "billing")
    house.store.down = True
    with pytest.raises(Unavailable):
        await house.door.authenticate(text)


async def test_lists_and_revocations_go_to_the_store(house: House) -> None:
    _, first = await house.keys.issue("acme", "billing")
    _, second = await house.keys.issue("acme", "billing")
    await house.keys.issue("other", "billing")
    assert [key.id for key in await house.keys.list("acme")] == [second.id, first.id]
    assert not await house.keys.revoke(KEY_ID)


async def test_guessing_costs_the_same_whether_the_id_exists_or_not(house: House) -> None:
    """The same hashes, the same comparisons, the same looks into the store; whatever there is behind an id."""
    used, in_use = await house.keys.issue("acme", "billing")
    _, unused = await house.keys.issue("acme", "billing")
    _, revoked = await house.keys.issue("acme", "billing")
    await house.keys.revoke(revoked.id)
    _, expired = await house.keys.issue("acme", "billing", expires_in=timedelta(seconds=1))
    _, of_lost_key = await house.keys.issue("acme", "billing")
    await house.store.add(attrs.evolve(of_lost_key, hash_key_id="lost"))
    house.clock.advance(2)
    steps = {}
    for name, key_id in {
        "unknown": KEY_ID,
        "in use": in_use.id,
        "unused": unused.id,
        "revoked": revoked.id,
        "expired": expired.id,
        "of a lost secret key": of_lost_key.id,
    }.items():
        await house.door.authenticate(used)
        guess = ApiKeyToken.new(key_id).text
        house.store.lookups = 0
        with _watched() as calls, pytest.raises(Unauthenticated):
            await house.door.authenticate(guess)
        steps[name] = (*calls, f"{house.store.lookups} lookups")
    assert steps["unknown"] == ("hmac_digest", "compare_digest", "hmac_digest", "compare_digest", "1 lookups")
    assert set(steps.values()) == {steps["unknown"]}, steps


@contextmanager
def _watched() -> Iterator[list[str]]:
    """What is hashed with a key, and what is compared in constant time, in the order in which it is done."""
    calls: list[str] = []

    def listen(frame: object, event: str, function: Any) -> None:
        if event == "c_call" and function.__name__ in {"hmac_digest", "compare_digest"}:
            calls.append(function.__name__)

    sys.setprofile(listen)
    try:
        yield calls
    finally:
        sys.setprofile(None)


async def test_a_use_is_told_once_an_hour_and_from_the_background_alone(house: House) -> None:
    text, key = await house.keys.issue("acme", "billing")
    told: list[datetime] = []
    for minutes in range(0, 130, 5):
        for _ in range(3):
            await house.door.authenticate(text)
        house.store.noted.clear()
        await house.door.tell_last_uses()
        told += [uses[key.id] for uses in house.store.noted]
        [listed] = await house.keys.list("acme")
        assert listed.last_used_at == datetime(2026, 3, 10, 12 + minutes // 60, tzinfo=UTC)
        house.clock.advance(300)
    assert told == [datetime(2026, 3, 10, hour, tzinfo=UTC) for hour in (12, 13, 14)]


async def test_only_a_key_that_was_recognised_was_used(house: House) -> None:
    _, key = await house.keys.issue("acme", "billing")
    for guess in (ApiKeyToken.new(key.id).text, ApiKeyToken.new(KEY_ID).text):
        with pytest.raises(Unauthenticated):
            await house.door.authenticate(guess)
    await house.door.tell_last_uses()
    assert house.store.noted == []
    [listed] = await house.keys.list("acme")
    assert listed.last_used_at is None


async def test_what_an_outage_kept_from_the_store_is_told_later(house: House) -> None:
    text, _ = await house.keys.issue("acme", "billing")
    await house.door.authenticate(text)
    house.store.down = True
    with pytest.raises(Unavailable):
        await house.door.tell_last_uses()
    house.store.down = False
    house.clock.advance(3600)
    await house.door.tell_last_uses()
    [listed] = await house.keys.list("acme")
    assert listed.last_used_at == datetime(2026, 3, 10, 12, tzinfo=UTC)


async def test_many_uses_are_told_in_bounded_portions(house: House) -> None:
    uses = LastUses(house.store, house.clock)
    for _ in range(2):
        for number in range(2 * TOLD_MAX + 1):
            uses.note(UUID(int=number))
    await uses.tell()
    assert [len(noted) for noted in house.store.noted] == [TOLD_MAX, TOLD_MAX, 1]
    await uses.tell()
    assert len(house.store.noted) == 3


async def test_a_sealed_hash_key_is_opened_by_the_box_alone(house: House) -> None:
    text, key = await house.keys.issue("acme", "billing")
    later = KeyRing({"k2": bytes(32)})
    box = AesGcmSecretBox(later)
    envelope = box.seal(RING.api_key_hash_keys["k1"], hash_key_context("k1"))
    await house.store.add(attrs.evolve(key, sealed_hash_key=envelope))
    door = ApiKeyAuthenticator(store=house.store, key_ring=later, clock=house.clock, secret_box=box)
    assert (await door.authenticate(text)).subject == "billing"
    with pytest.raises(Unauthenticated):
        await door.authenticate(ApiKeyToken.new(key.id).text)
    with pytest.raises(Unauthenticated):
        await house.with_ring(later).authenticate(text)


@pytest.mark.parametrize(
    ("arguments", "paths"),
    [
        ({"org_id": "a c", "subject": ""}, ["org_id", "subject"]),
        ({"permissions": ["read:external_agent", "admin"]}, ["permissions"]),
        ({"permissions": "read:external_agent"}, ["permissions"]),
        ({"attributes": {"": "x", "team": ""}}, ["attributes", "attributes.team"]),
        ({"attributes": {"team": "a\0b"}}, ["attributes.team"]),
        ({"attributes": {"team": "x" * 1001}}, ["attributes.team"]),
        ({"attributes": {"team": 1}}, ["attributes.team"]),
        ({"attributes": {"x" * 101: "x"}}, ["attributes"]),
        ({"attributes": {str(number): "x" for number in range(ATTRIBUTES_MAX + 1)}}, ["attributes"]),
        ({"expires_in": timedelta(0)}, ["expires_in"]),
        ({"expires_in": timedelta(days=40_000)}, ["expires_in"]),
        ({"subject": "", "permissions": ["x"], "expires_in": timedelta(-1)}, ["expires_in", "permissions", "subject"]),
    ],
)
async def test_every_fault_is_named(arguments: dict[str, Any], paths: list[str], house: House) -> None:
    with pytest.raises(ValidationError) as refusal:
        await house.keys.issue(**{"org_id": "acme", "subject": "billing", **arguments})
    assert [fault.path for fault in refusal.value.errors] == paths
    assert not await house.store.list("acme")


@given(st.uuids())
def test_a_key_is_one_word_and_tells_its_id(key_id: UUID) -> None:
    token = ApiKeyToken.new(key_id)
    assert re.fullmatch("eak_[0-9A-Za-z]{22}_[0-9A-Za-z]{49}", token.text)
    assert ApiKeyToken.parse(token.text) == token


@given(st.uuids(), st.data())
def test_any_single_typo_is_refused_offline(key_id: UUID, data: st.DataObject) -> None:
    text = ApiKeyToken.new(key_id).text
    position = data.draw(st.integers(0, len(text) - 1))
    typo = data.draw(st.characters().filter(lambda char: char != text[position]))
    assert ApiKeyToken.parse(text[:position] + typo + text[position + 1 :]) is None
    assert ApiKeyToken.parse(text[:position] + text[position + 1 :]) is None
    assert ApiKeyToken.parse(text[:position] + typo + text[position:]) is None


def test_every_letter_in_every_place_of_a_key_counts() -> None:
    text = ApiKeyToken.new(KEY_ID).text
    for position, right in enumerate(text):
        for letter in LETTERS.replace(right, ""):
            assert ApiKeyToken.parse(text[:position] + letter + text[position + 1 :]) is None


@pytest.mark.parametrize("text", ["", "eak_", "eak__", "a.b.c", "eak_" + "é" * 22 + "_" + "0" * 49])
def test_what_is_no_key_is_refused_offline(text: str) -> None:
    assert ApiKeyToken.parse(text) is None


def test_an_id_beyond_a_uuid_is_refused() -> None:
    assert ApiKeyToken.parse(_with_checksum(f"eak_{'z' * 22}_{'0' * 43}")) is None


async def test_a_malformed_key_costs_no_lookup(house: House) -> None:
    text, _ = await house.keys.issue("acme", "billing")
    with pytest.raises(Unauthenticated):
        await house.door.authenticate(text[:-1] + ("0" if text[-1] != "0" else "1"))
    assert house.store.lookups == 0


def _with_checksum(body: str) -> str:
    return body + tokens.checksum_of(body)
