"""
JSON Web Tokens, signed by one issuer.

What is in a token is read here, strictly; joserfc, which takes no spelling of base64url but the canonical one, verifies
the signature. RFC 8725 lists what has gone wrong elsewhere: here the key decides the algorithm, and nothing in a token
decides where a key is found, or how it is read.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import logging
from collections import OrderedDict
from collections.abc import Mapping

import attrs
from joserfc import jws
from joserfc.errors import JoseError, UnsupportedAlgorithmError
from joserfc.jwa import JWSAlgModel

from external_agents.adapters.identity.jwt.claims import Admitted, Claims, TokenRefused, admit
from external_agents.adapters.identity.jwt.issuer_keys import IssuerKeys
from external_agents.adapters.identity.jwt.key_set import ED25519_NAMES, KeySet, VerificationKey
from external_agents.domain.access import Principal
from external_agents.domain.errors import MalformedJson, Unauthenticated, ValidationError
from external_agents.domain.json_values import JsonValue, decode, plain_value
from external_agents.ports.identity import Authenticator
from external_agents.ports.system import Clock

TOKEN_LENGTH_MAX = 16_384
PROOFS_MAX = 2_048
PROVED_S = 60.0
"""So long a token is not verified a second time."""

ALGORITHMS = frozenset({"RS256", "ES256", *ED25519_NAMES})
TYPES = frozenset({"jwt", "at+jwt", "application/jwt", "application/at+jwt"})
"""Other types are statements of another kind, such as that somebody has logged out (RFC 8725, section 3.11)."""

REFUSED_PARAMETERS = ("crit", "b64", "jwk", "jku", "x5u", "x5c", "enc", "zip")
"""
Of a header: keys and places of keys, which an attacker would choose; encryption; and what changes how a token is read.

No extension is understood here, so none that is critical (RFC 7515, section 4.1.11).
"""

_log = logging.getLogger(__name__)


class _Registry(jws.JWSRegistry):
    """joserfc's, with our algorithms and bounds. Its own warns of the name EdDSA, which RFC 9864 replaces."""

    max_header_length = TOKEN_LENGTH_MAX
    max_payload_length = TOKEN_LENGTH_MAX

    def get_alg(self, name: str) -> JWSAlgModel:
        if name not in ALGORITHMS:
            raise UnsupportedAlgorithmError
        return self.algorithms[name]


_REGISTRY = _Registry(strict_check_header=False)


@attrs.frozen
class _Proof:
    """A token that was verified at `proved_s`, in the clock's monotonic time."""

    admitted: Admitted
    proved_s: float


class JwtAuthenticator(Authenticator):
    """
    Recognises the tokens that `issuer` made for `audience`.

    A token that was verified is remembered for a minute, until it expires, or until the issuer's keys change.
    """

    def __init__(self, *, issuer: str, audience: str, keys: IssuerKeys, clock: Clock) -> None:
        """
        Args:
            keys: Remain their owner's, who closes them.
        """
        self._issuer = issuer
        self._audience = audience
        self._keys = keys
        self._clock = clock
        # By the digest of the whole token, under the keys that they were verified with.
        self._proofs: OrderedDict[bytes, _Proof] = OrderedDict()
        self._proved_with: KeySet | None = None

    async def authenticate(self, bearer_token: str) -> Principal:
        try:
            if len(bearer_token) > TOKEN_LENGTH_MAX or not bearer_token.isascii():
                raise TokenRefused("it is too long, or not ASCII")
            digest = hashlib.sha256(bearer_token.encode("ascii")).digest()
            return self._proved(digest) or await self._prove(bearer_token, digest)
        except TokenRefused as refusal:
            _log.debug("a JWT was refused: %s", refusal)
            raise Unauthenticated("The token is malformed, expired, or not for this service.") from None

    def _proved(self, digest: bytes) -> Principal | None:
        if self._proved_with is not self._keys.kept():
            self._proofs.clear()
        proof = self._proofs.get(digest)
        if proof is None:
            return None
        if self._clock.monotonic_s() - proof.proved_s >= PROVED_S or self._now() >= proof.admitted.until:
            del self._proofs[digest]
            return None
        return proof.admitted.principal

    async def _prove(self, token: str, digest: bytes) -> Principal:
        header = _header(token)
        kid = header.get("kid")
        if kid is not None and not isinstance(kid, str):
            raise TokenRefused("kid is no string")
        keys = await self._keys.for_kid(kid)
        key = next((key for key in keys.named(kid) if header["alg"] in key.algorithms), None)
        if key is None:
            raise TokenRefused("the issuer has no such key")
        claims = _claims(token, key)
        admitted = admit(claims, issuer=self._issuer, audience=self._audience, now=self._now())
        self._remember(digest, admitted, keys)
        return admitted.principal

    def _remember(self, digest: bytes, admitted: Admitted, keys: KeySet) -> None:
        if self._proved_with is not keys:
            self._proofs.clear()
            self._proved_with = keys
        self._proofs[digest] = _Proof(admitted, self._clock.monotonic_s())
        if len(self._proofs) > PROOFS_MAX:
            self._proofs.popitem(last=False)

    def _now(self) -> float:
        return self._clock.now().timestamp()


def _header(token: str) -> Mapping[str, JsonValue]:
    header, _, _ = token.partition(".")
    fields = _object(_octets(header))
    algorithm = fields.get("alg")
    if not isinstance(algorithm, str) or algorithm not in ALGORITHMS:
        raise TokenRefused("its algorithm is none that is used here")
    if any(name in fields for name in REFUSED_PARAMETERS):
        raise TokenRefused("its header brings a key, or asks to be read in another way")
    kind = fields.get("typ", "JWT")
    if not isinstance(kind, str) or kind.lower() not in TYPES:
        raise TokenRefused("its type is another")
    return fields


def _claims(token: str, key: VerificationKey) -> Claims:
    try:
        verified = jws.deserialize_compact(token, key.key, registry=_REGISTRY)
    except (JoseError, ValueError):
        raise TokenRefused("its signature does not hold") from None
    if verified.payload is None:
        raise TokenRefused("it is empty")
    return _object(verified.payload)


def _octets(part: str) -> bytes:
    try:
        return base64.b64decode(part + "=" * (-len(part) % 4), b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise TokenRefused("its header is not base64url") from None


def _object(text: bytes) -> dict[str, JsonValue]:
    """With no member given twice, not too deep, and in text that can be kept (RFC 8725, section 2.4)."""
    try:
        value = plain_value(decode(text))
    except (MalformedJson, ValidationError):
        raise TokenRefused("a part is not plain JSON") from None
    if not isinstance(value, dict):
        raise TokenRefused("a part is no JSON object")
    return value
