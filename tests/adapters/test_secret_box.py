from __future__ import annotations

import base64
import multiprocessing
import os
from pathlib import Path

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from external_agents.adapters.secrets import AesGcmSecretBox, KeyRing, envelope_key_id
from external_agents.domain.errors import ConfigurationError, SecretUnreadable
from external_agents.ports.secrets import SecretContext

RING = KeyRing({"new": bytes(range(32)), "old": bytes(range(32, 64))})
BOX = AesGcmSecretBox(RING)
CONTEXT = SecretContext(
    org_id="acme",
    agent_id="01890a5d-ac96-774b-bcce-b302099a8057",
    field="auth_config.key",
    destination="https://agent.example.com",
)

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
contexts = st.builds(SecretContext, org_id=texts, agent_id=texts, field=texts, destination=texts)


def encoded(byte: int, length: int = 32) -> str:
    return base64.b64encode(bytes([byte]) * length).decode()


@given(plaintext=st.binary(max_size=300), context=contexts)
def test_what_is_sealed_opens_in_its_context(plaintext: bytes, context: SecretContext) -> None:
    envelope = BOX.seal(plaintext, context)
    assert BOX.open(envelope, context) == plaintext
    assert len(plaintext) < 8 or plaintext not in envelope
    assert envelope_key_id(envelope) == "new"


def test_every_envelope_is_new() -> None:
    assert len({BOX.seal(b"secret", CONTEXT) for _ in range(100)}) == 100


def test_any_flipped_bit_is_refused() -> None:
    envelope = BOX.seal(b"secret", CONTEXT)
    for bit in range(len(envelope) * 8):
        altered = bytearray(envelope)
        altered[bit // 8] ^= 1 << bit % 8
        with pytest.raises(SecretUnreadable):
            BOX.open(bytes(altered), CONTEXT)


def test_any_shortened_or_lengthened_envelope_is_refused() -> None:
    envelope = BOX.seal(b"secret", CONTEXT)
    for end in range(len(envelope)):
        with pytest.raises(SecretUnreadable):
            BOX.open(envelope[:end], CONTEXT)
    with pytest.raises(SecretUnreadable):
        BOX.open(envelope + b"\0", CONTEXT)


@given(st.binary(max_size=80))
def test_no_bytes_are_an_envelope_by_chance(envelope: bytes) -> None:
    with pytest.raises(SecretUnreadable):
        BOX.open(envelope, CONTEXT)


@given(sealed_in=contexts, opened_in=contexts)
def test_an_envelope_opens_in_no_other_context(sealed_in: SecretContext, opened_in: SecretContext) -> None:
    if sealed_in != opened_in:
        with pytest.raises(SecretUnreadable, match="altered or moved"):
            BOX.open(BOX.seal(b"secret", sealed_in), opened_in)


@pytest.mark.parametrize("name", ["org_id", "agent_id", "field", "destination"])
def test_each_part_of_the_context_counts(name: str) -> None:
    envelope = BOX.seal(b"secret", CONTEXT)
    with pytest.raises(SecretUnreadable):
        BOX.open(envelope, attrs.evolve(CONTEXT, **{name: "other"}))


@given(text=st.text("ab/", max_size=8), first=st.integers(0, 8), second=st.integers(0, 8))
def test_characters_cannot_move_from_one_part_to_the_next(text: str, first: int, second: int) -> None:
    def cut(at: int) -> SecretContext:
        return attrs.evolve(CONTEXT, field=text[:at], destination=text[at:])

    envelope = BOX.seal(b"secret", cut(first))
    if cut(first) == cut(second):
        assert BOX.open(envelope, cut(second)) == b"secret"
    else:
        with pytest.raises(SecretUnreadable):
            BOX.open(envelope, cut(second))


def test_older_keys_open_and_the_first_seals() -> None:
    old = AesGcmSecretBox(KeyRing({"old": bytes(range(32, 64))}))
    envelope = old.seal(b"secret", CONTEXT)
    assert envelope_key_id(envelope) == "old"
    assert BOX.open(envelope, CONTEXT) == b"secret"


def test_a_missing_key_is_named() -> None:
    envelope = BOX.seal(b"secret", CONTEXT)
    with pytest.raises(SecretUnreadable, match="the key new,"):
        AesGcmSecretBox(KeyRing({"other": bytes(32)})).open(envelope, CONTEXT)


def test_another_key_of_the_same_name_opens_nothing() -> None:
    envelope = BOX.seal(b"secret", CONTEXT)
    with pytest.raises(SecretUnreadable):
        AesGcmSecretBox(KeyRing({"new": bytes(32)})).open(envelope, CONTEXT)


def test_an_unknown_version_is_refused() -> None:
    envelope = BOX.seal(b"secret", CONTEXT)
    with pytest.raises(SecretUnreadable, match="version"):
        BOX.open(b"\x02" + envelope[1:], CONTEXT)


def test_keys_serve_one_purpose_each() -> None:
    keys = {*RING.sealing_keys.values(), *RING.api_key_hash_keys.values(), bytes(range(32)), bytes(range(32, 64))}
    assert len(keys) == 6


def test_no_repr_shows_a_key() -> None:
    shown = repr(RING) + str(RING) + repr(BOX)
    for key in [bytes(range(32)), *RING.sealing_keys.values()]:
        assert repr(key)[2:12] not in shown
        assert base64.b64encode(key).decode() not in shown
    assert repr(RING) == "KeyRing(new, old)"


def test_the_setting_lists_keys_in_order() -> None:
    ring = KeyRing.parse(f"k-2.b:{encoded(1)}, k_1:{encoded(2)}")
    assert ring.key_ids == ("k-2.b", "k_1")
    assert dict(ring.sealing_keys) == dict(KeyRing({"k-2.b": bytes([1]) * 32, "k_1": bytes([2]) * 32}).sealing_keys)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "entry 1: is not of the form kid:base64"),
        (encoded(7), "entry 1: is not of the form kid:base64"),
        (f"a:{encoded(7)},", "entry 2: is not of the form kid:base64"),
        (f":{encoded(7)}", "entry 1: the key id must match"),
        (f"{encoded(7)}:a", "entry 1: the key id must match"),
        (f"{'k' * 33}:{encoded(7)}", "entry 1: the key id must match"),
        (f"a:{encoded(7)[:-1]}", "entry 1: the key is not base64"),
        (f"a:!{encoded(7)}", "entry 1: the key is not base64"),
        ("a:é", "entry 1: the key is not base64"),
        (f"a:{encoded(7, 31)}", "entry 1: the key has 31 bytes, not 32"),
        (f"a:{encoded(7)},b:{encoded(8, 33)}", "entry 2: the key has 33 bytes, not 32"),
        (f"a:{encoded(7)},a:{encoded(8)}", "entry 2: the key id a is there twice"),
    ],
)
def test_a_faulty_setting_is_named_without_its_keys(text: str, message: str) -> None:
    with pytest.raises(ConfigurationError) as refusal:
        KeyRing.parse(text)
    assert str(refusal.value).startswith(f"EXTERNAL_AGENTS_SECRET_KEYS, {message}")
    assert encoded(7)[:8] not in str(refusal.value)
    assert refusal.value.__cause__ is None


@pytest.mark.parametrize("keys", [{}, {"a": bytes(31)}, {"a b": bytes(32)}])
def test_a_ring_takes_well_formed_keys_only(keys: dict[str, bytes]) -> None:
    with pytest.raises(ConfigurationError):
        KeyRing(keys)


def test_a_key_file_is_made_once_and_for_the_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "home" / "secret-keys"
    umask = os.umask(0)
    try:
        made = KeyRing.load_or_create(path)
    finally:
        os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    again = KeyRing.load_or_create(path)
    assert again.sealing_keys == made.sealing_keys
    assert list(path.parent.iterdir()) == [path]
    assert KeyRing.load_or_create(tmp_path / "other").sealing_keys != made.sealing_keys


def test_a_key_file_has_the_form_of_the_setting(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    made = KeyRing.load_or_create(path)
    assert KeyRing.parse(path.read_text().strip()).sealing_keys == made.sealing_keys
    path.write_text(f"next:{encoded(7)},{path.read_text()}")
    assert KeyRing.load_or_create(path).key_ids == ("next", *made.key_ids)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o602, 0o610])
def test_a_key_file_open_to_others_is_refused(mode: int, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    KeyRing.load_or_create(path)
    path.chmod(mode)
    with pytest.raises(ConfigurationError, match="chmod 600"):
        KeyRing.load_or_create(path)


def test_a_key_file_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    for content, message in [(b"", "entry 1"), (b"\xff", "kid:base64"), (b"a:" + encoded(7, 16).encode(), "16 bytes")]:
        path.write_bytes(content)
        path.chmod(0o600)
        with pytest.raises(ConfigurationError, match=message) as refusal:
            KeyRing.load_or_create(path)
        assert str(path) in str(refusal.value)
    with pytest.raises(ConfigurationError, match="cannot be used"):
        KeyRing.load_or_create(path / "below a file")
    with pytest.raises(ConfigurationError, match="cannot be used"):
        KeyRing.load_or_create(tmp_path)


def test_processes_that_race_agree_on_one_key(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(4)
    results = context.Queue()
    racers = [context.Process(target=_race, args=(tmp_path, start, results), daemon=True) for _ in range(4)]
    for racer in racers:
        racer.start()
    try:
        outcomes = [results.get(timeout=60) for _ in racers]
    finally:
        for racer in racers:
            racer.kill()
            racer.join()
    assert len(outcomes[0]) == _RACES
    assert all(outcome == outcomes[0] for outcome in outcomes)


_RACES = 50


def _race(folder: Path, start, results) -> None:  # type: ignore[no-untyped-def]
    rings = []
    for race in range(_RACES):
        start.wait(timeout=30)
        rings.append(dict(KeyRing.load_or_create(folder / str(race)).sealing_keys))
    results.put(rings)
