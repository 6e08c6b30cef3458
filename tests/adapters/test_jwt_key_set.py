"""Which keys of an issuer's set are used."""

from __future__ import annotations

import json
from typing import Any

import pytest

from external_agents.adapters.identity.jwt import KeySet, KeySetUnavailable
from external_agents.adapters.identity.jwt.key_set import KEYS_MAX
from token_issuer import SigningKey, b64, number, rsa_key

EC_KEY, RSA_KEY, ED_KEY = SigningKey("ES256", "e"), SigningKey("RS256", "r"), SigningKey("EdDSA", "d")


def parsed(*keys: Any) -> KeySet:
    return KeySet.parse(json.dumps({"keys": list(keys)}).encode())


def weak_rsa(bits: int) -> dict[str, Any]:
    return {"kty": "RSA", "kid": "weak", "n": number((1 << bits) - 1), "e": "AQAB"}


def private_ec() -> dict[str, Any]:
    return {**EC_KEY.jwk, "d": number(EC_KEY.private.private_numbers().private_value, 32)}


def test_each_kind_of_key_is_for_its_own_algorithm() -> None:
    keys = parsed(EC_KEY.jwk, RSA_KEY.jwk, ED_KEY.jwk)
    assert [(key.kid, sorted(key.algorithms)) for key in keys.keys] == [
        ("e", ["ES256"]),
        ("r", ["RS256"]),
        ("d", ["Ed25519", "EdDSA"]),
    ]
    assert keys.skipped == ()
    assert keys == parsed(EC_KEY.jwk, RSA_KEY.jwk, ED_KEY.jwk)
    assert keys != parsed(EC_KEY.jwk, RSA_KEY.jwk)


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (7, "key 1 is no JSON object"),
        ({}, "key 1 is of no kind that is used here: RSA, EC with P-256, OKP with Ed25519"),
        ({"kty": "AKP", "alg": "ML-DSA-44", "pub": "AA"}, "of no kind"),
        ({"kty": ["RSA"], "n": "AQAB", "e": "AQAB"}, "of no kind"),
        ({"kty": "oct", "k": b64(bytes(32))}, "no public key: it has the member k"),
        ({**EC_KEY.jwk, "crv": "P-384"}, "of no kind"),
        ({**ED_KEY.jwk, "crv": "X25519"}, "of no kind"),
        ({**EC_KEY.jwk, "use": "enc"}, "is not for signatures"),
        ({**EC_KEY.jwk, "key_ops": ["sign"]}, "is not for verifying"),
        ({**EC_KEY.jwk, "key_ops": "verify"}, "is not for verifying"),
        ({**EC_KEY.jwk, "alg": "ES384"}, "is for another algorithm than ES256"),
        ({**RSA_KEY.jwk, "alg": "PS256"}, "is for another algorithm than RS256"),
        ({**RSA_KEY.jwk, "alg": ["RS256"]}, "is for another algorithm than RS256"),
        ({**EC_KEY.jwk, "kid": 1}, "has a kid that is not a string"),
        (private_ec(), "no public key: it has the member d"),
        (weak_rsa(1024), "is an RSA key of 1024 bits: 2048 to 8192 will do"),
        (weak_rsa(2047), "is an RSA key of 2047 bits"),
        (weak_rsa(16_384), "is an RSA key of 16384 bits"),
        ({**RSA_KEY.jwk, "e": "AA"}, "is no valid RSA key"),
        ({**RSA_KEY.jwk, "n": "*" * 400}, "is no valid RSA key"),
        ({**RSA_KEY.jwk, "n": "é" * 400}, "is no valid RSA key"),
        ({**EC_KEY.jwk, "x": number(1, 32)}, "is no valid EC key"),
        ({**EC_KEY.jwk, "x": "A"}, "is no valid EC key"),
        ({**ED_KEY.jwk, "x": b64(bytes(31))}, "is no valid OKP key"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_used_is_skipped(entry: Any, reason: str) -> None:
    keys = parsed(entry, RSA_KEY.jwk)
    assert [key.kid for key in keys.keys] == ["r"]
    [told] = keys.skipped
    assert reason in told


def test_a_key_with_a_member_twice_is_skipped() -> None:
    text = json.dumps({"keys": [EC_KEY.jwk, RSA_KEY.jwk]}).replace('{"kid"', '{"kty": "oct", "kid"', 1)
    keys = KeySet.parse(text.encode())
    assert ([key.kid for key in keys.keys], len(keys.skipped)) == (["r"], 1)


def test_members_of_no_meaning_have_none() -> None:
    strange = {**RSA_KEY.jwk, "x5u": "no URL", "x5c": 7, "x5t": [], "ext": True, "issuer": "https://x"}
    assert [key.kid for key in parsed(strange).keys] == ["r"]
    plain = {name: value for name, value in RSA_KEY.jwk.items() if name not in {"use", "alg"}}
    assert parsed(plain) == parsed(strange)


def test_names() -> None:
    nameless = SigningKey("EdDSA", None)
    several = parsed(EC_KEY.jwk, {**ED_KEY.jwk, "kid": "e"}, nameless.jwk)
    assert [sorted(key.algorithms)[0] for key in several.named("e")] == ["ES256", "Ed25519"]
    assert several.named("x") == ()
    assert several.named(None) == ()
    for only in (nameless, EC_KEY):
        [key] = parsed(only.jwk).named(None)
        assert key.kid == only.kid


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        (b"", "not JSON"),
        (b"<html>", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "no JWK set"),
        (b"{}", "no JWK set"),
        (b'{"keys": {}}', "no JWK set"),
        (b'{"keys": "RSA"}', "no JWK set"),
        (json.dumps({"keys": [{}] * (KEYS_MAX + 1)}).encode(), "over 100 keys"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_no_key_set(document: bytes, reason: str) -> None:
    with pytest.raises(KeySetUnavailable, match=reason):
        KeySet.parse(document)


def test_a_set_without_keys_is_a_set() -> None:
    assert parsed() == KeySet(())


def test_a_strong_key_is_used() -> None:
    public = rsa_key(3072).public_key().public_numbers()
    assert len(parsed({"kty": "RSA", "n": number(public.n), "e": number(public.e)}).keys) == 1
