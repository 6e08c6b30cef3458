"""
The public keys of an issuer (RFC 7517), as far as they can be used here.

A key's type decides the algorithm of its signatures; what a token says of its own algorithm is compared with that, and
decides nothing.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any

import attrs
from joserfc.errors import JoseError
from joserfc.jwk import Key, import_key

from external_agents.domain.errors import MalformedJson, ValidationError
from external_agents.domain.json_values import JsonValue, decode, plain_value

KEYS_MAX = 100
KID_MAX = 200
RSA_BITS_BOUNDS = (2048, 8192)
"""RFC 7518, section 3.3, has the lower one; beyond the upper one a signature costs milliseconds."""

ED25519_NAMES = frozenset({"EdDSA", "Ed25519"})
"""RFC 8037 and RFC 9864 name the same signatures."""

_PRIVATE = frozenset({"d", "p", "q", "dp", "dq", "qi", "oth", "k"})


class KeySetUnavailable(Exception):
    """There are no keys to be had. The message is for the operator: it may name hosts and addresses."""


@attrs.frozen
class VerificationKey:
    """
    Attributes:
        kid: Its name; None: it has none.
        algorithms: The names of the one algorithm that it is for.
        members: What it consists of.
    """

    kid: str | None
    algorithms: frozenset[str]
    members: tuple[tuple[str, str], ...] = attrs.field(repr=False)
    key: Key = attrs.field(repr=False, eq=False)


@attrs.frozen
class KeySet:
    """
    Attributes:
        keys: Those that can be used.
        skipped: The others, each in a line that says why.
    """

    keys: tuple[VerificationKey, ...]
    skipped: tuple[str, ...] = ()

    @classmethod
    def parse(cls, document: bytes) -> KeySet:
        """
        Raises:
            KeySetUnavailable: It is no JWK set. A set without a usable key is one.
        """
        try:
            fields = decode(document)
        except MalformedJson:
            raise KeySetUnavailable("its answer is not JSON") from None
        entries = fields.get("keys") if isinstance(fields, Mapping) else None
        if not isinstance(entries, list):
            raise KeySetUnavailable("its answer is no JWK set: there is no list of keys")
        if len(entries) > KEYS_MAX:
            raise KeySetUnavailable(f"its answer has over {KEYS_MAX} keys")
        keys, skipped = [], []
        for number, entry in enumerate(entries, 1):
            try:
                keys.append(_verification_key(entry))
            except _Unusable as reason:
                skipped.append(f"key {number} {reason}")
        return cls(tuple(keys), tuple(skipped))

    def named(self, kid: str | None) -> tuple[VerificationKey, ...]:
        """Those of this name. A token that names none can only mean a key that is the only one."""
        if kid is None:
            return self.keys if len(self.keys) == 1 else ()
        return tuple(key for key in self.keys if key.kid == kid)


class _Unusable(Exception):
    """Why a key cannot be used, as the end of a sentence."""


def _verification_key(entry: JsonValue) -> VerificationKey:
    try:
        entry = plain_value(entry)
    except ValidationError:
        raise _Unusable("has members that are given more than once, or are no text") from None
    if not isinstance(entry, dict):
        raise _Unusable("is no JSON object")
    if entry.get("use", "sig") != "sig":
        raise _Unusable("is not for signatures")
    operations = entry.get("key_ops", ["verify"])
    if not isinstance(operations, list) or "verify" not in operations:
        raise _Unusable("is not for verifying")
    if private := sorted(_PRIVATE.intersection(entry)):
        raise _Unusable(f"is no public key: it has the member {', '.join(private)}")
    kid = entry.get("kid")
    if kid is not None and not (isinstance(kid, str) and 1 <= len(kid) <= KID_MAX):
        raise _Unusable(f"has a kid that is not a string of 1 to {KID_MAX} characters")
    algorithms, members = _material(entry)
    if "alg" in entry and entry["alg"] not in list(algorithms):
        raise _Unusable(f"is for another algorithm than {' or '.join(sorted(algorithms))}")
    return VerificationKey(kid, algorithms, tuple(members.items()), _imported(members))


def _material(entry: dict[str, Any]) -> tuple[frozenset[str], dict[str, str]]:
    """What it is for, and the members that make the key: whatever else is there has no say."""
    match entry:
        case {"kty": "RSA", "n": str(n), "e": str(e)}:
            if not RSA_BITS_BOUNDS[0] <= (bits := _bits(n)) <= RSA_BITS_BOUNDS[1]:
                raise _Unusable(f"is an RSA key of {bits} bits: {RSA_BITS_BOUNDS[0]} to {RSA_BITS_BOUNDS[1]} will do")
            return frozenset({"RS256"}), {"kty": "RSA", "n": n, "e": e}
        case {"kty": "EC", "crv": "P-256", "x": str(x), "y": str(y)}:
            return frozenset({"ES256"}), {"kty": "EC", "crv": "P-256", "x": x, "y": y}
        case {"kty": "OKP", "crv": "Ed25519", "x": str(x)}:
            return ED25519_NAMES, {"kty": "OKP", "crv": "Ed25519", "x": x}
        case _:
            raise _Unusable("is of no kind that is used here: RSA, EC with P-256, OKP with Ed25519")


def _imported(members: dict[str, str]) -> Key:
    try:
        return import_key({**members})
    except (JoseError, ValueError, TypeError):
        raise _Unusable(f"is no valid {members['kty']} key") from None


def _bits(number: str) -> int:
    try:
        octets = base64.b64decode(number + "=" * (-len(number) % 4), b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise _Unusable("is no valid RSA key") from None
    return int.from_bytes(octets).bit_length()
