"""API keys: giving them out, taking them back, and recognising them."""

from __future__ import annotations

import hashlib
import hmac
import logging
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Protocol
from uuid import UUID

from external_agents.adapters.identity.known_keys import KEPT_MAX, KnownKey, KnownKeys
from external_agents.adapters.identity.last_uses import LastUses
from external_agents.adapters.identity.tokens import ApiKeyToken
from external_agents.domain.access import PERMISSIONS, Principal
from external_agents.domain.errors import Fault, SecretUnreadable, Unauthenticated, Unavailable, ValidationError
from external_agents.ports.identity import ApiKey, ApiKeyStore, Authenticator, hash_key_context
from external_agents.ports.secrets import SecretBox
from external_agents.ports.system import Clock, IdSource

ATTRIBUTES_MAX = 50
ATTRIBUTE_NAME_MAX = 100
ATTRIBUTE_VALUE_MAX = 1000
EXPIRES_IN_MAX = timedelta(days=36_500)

_NO_HASH = bytes(hashlib.sha256().digest_size)

_log = logging.getLogger(__name__)


class HashKeys(Protocol):
    """
    What this module needs of a key ring.

    Attributes:
        api_key_hash_keys: 32 bytes each, by key id; the first hashes new API keys, all recognise them.
    """

    api_key_hash_keys: Mapping[str, bytes]


class _Hasher:
    """HMAC-SHA256 over the whole key. It has 256 random bits, so a slow password hash would protect nothing more."""

    def __init__(self, key_ring: HashKeys, secret_box: SecretBox | None = None) -> None:
        self._keys = key_ring.api_key_hash_keys
        self._secret_box = secret_box
        self.first_id = next(iter(self._keys))

    def new_hash(self, token: ApiKeyToken) -> bytes:
        return hmac.digest(self._keys[self.first_id], token.text.encode("ascii"), "sha256")

    def matches(self, token: ApiKeyToken, key: ApiKey | None) -> bool:
        """Takes the same steps whether there is such a key or not."""
        hash_key = self._hash_key(key) if key else None
        presented = hmac.digest(hash_key or self._keys[self.first_id], token.text.encode("ascii"), "sha256")
        is_equal = hmac.compare_digest(presented, key.secret_hash if key else _NO_HASH)
        return is_equal and hash_key is not None

    def _hash_key(self, key: ApiKey) -> bytes | None:
        if key.hash_key_id in self._keys:
            return self._keys[key.hash_key_id]
        if key.sealed_hash_key is not None and self._secret_box is not None:
            with suppress(SecretUnreadable):
                return self._secret_box.open(key.sealed_hash_key, hash_key_context(key.hash_key_id))
        _log.warning("API key %s was made with the secret key %s, which is not configured", key.id, key.hash_key_id)
        return None


class ApiKeyAuthenticator(Authenticator):
    """
    Recognises API keys; what the store takes back is refused within 2 s. It has nothing to close.

    Args:
        secret_box: Opens what API keys were hashed with under secret keys that are no longer in the ring.
    """

    def __init__(
        self, *, store: ApiKeyStore, key_ring: HashKeys, clock: Clock, secret_box: SecretBox | None = None
    ) -> None:
        self._known = KnownKeys(store, clock)
        self._hasher = _Hasher(key_ring, secret_box)
        self._clock = clock
        self._uses = LastUses(store, clock)
        # By the digest of the whole token: who presents the same again has proved that it knows the secret.
        self._proved: OrderedDict[bytes, ApiKey] = OrderedDict()

    async def authenticate(self, bearer_token: str) -> Principal:
        proof = hashlib.sha256(bearer_token.encode("utf-8", "surrogatepass")).digest()
        proved = self._proved.get(proof)
        if proved is not None and self._holds(proved):
            self._uses.note(proved.id)
            return proved.principal
        key = await self._recognise(bearer_token)
        self._uses.note(key.id)
        self._proved[proof] = key
        if len(self._proved) > KEPT_MAX:
            self._proved.popitem(last=False)
        return key.principal

    async def tell_last_uses(self) -> None:
        """
        Let the store know when keys were last used; to be called from the background, every few seconds.

        Raises:
            Unavailable: It cannot be reached; the next call tells it.
        """
        await self._uses.tell()

    def _holds(self, proved: ApiKey) -> bool:
        """Whether it is still what is known of the key, and need not be read again."""
        known = self._known.get(proved.id)
        return known is not None and known.key is proved and self._in_force(proved) and not self._known.is_due(known)

    async def _recognise(self, bearer_token: str) -> ApiKey:
        token = ApiKeyToken.parse(bearer_token)
        if token is None:
            raise _refusal()
        known = self._known.get(token.key_id) or await self._known.join(token.key_id)
        # An unknown key takes the same steps as a known one, here and below.
        if not self._opens(token, known.key if known else None):
            known = None  # A refusal comes from the store alone.
        if known is None or self._known.is_due(known):
            known = await self._read(token, known)
        return known.key

    async def _read(self, token: ApiKeyToken, fallback: KnownKey | None) -> KnownKey:
        try:
            known = await self._known.read(token.key_id)
        except Unavailable:
            if fallback is None or not self._known.holds(fallback) or not self._in_force(fallback.key):
                raise
            return fallback
        if not self._opens(token, known.key if known else None) or known is None:
            raise _refusal()
        return self._known.keep(known)

    def _opens(self, token: ApiKeyToken, key: ApiKey | None) -> bool:
        matches = self._hasher.matches(token, key)
        return key is not None and matches and self._in_force(key)

    def _in_force(self, key: ApiKey) -> bool:
        return key.revoked_at is None and (key.expires_at is None or self._clock.now() < key.expires_at)


class ApiKeys:
    """What the operator does with API keys."""

    def __init__(self, *, store: ApiKeyStore, key_ring: HashKeys, clock: Clock, ids: IdSource) -> None:
        self._store = store
        self._hasher = _Hasher(key_ring)
        self._clock = clock
        self._ids = ids

    async def issue(
        self,
        org_id: str,
        subject: str,
        permissions: Collection[str] | None = None,
        attributes: Mapping[str, str] | None = None,
        expires_in: timedelta | None = None,
    ) -> tuple[str, ApiKey]:
        """
        Make a key.

        Args:
            permissions: Some of `domain.access.PERMISSIONS`, or none; None: all of them.
            attributes: What policies see as tags of the subject.
            expires_in: None: never.

        Returns:
            The key itself, which nobody can show a second time, and what is kept of it.

        Raises:
            ValidationError: Every fault of the arguments.
        """
        permissions = frozenset(PERMISSIONS if permissions is None else permissions)
        attributes = attributes or {}
        faults = [
            *_principal_faults(org_id, subject),
            *_permission_faults(permissions),
            *_attribute_faults(attributes),
        ]
        if expires_in is not None and not timedelta(0) < expires_in <= EXPIRES_IN_MAX:
            faults.append(Fault("expires_in", f"must be more than none and at most {EXPIRES_IN_MAX.days} days"))
        if faults:
            raise ValidationError(faults)
        now = self._clock.now()
        token = ApiKeyToken.new(self._ids.new_id())
        key = ApiKey(
            id=token.key_id,
            principal=Principal(org_id, subject, permissions, attributes),
            hash_key_id=self._hasher.first_id,
            secret_hash=self._hasher.new_hash(token),
            created_at=now,
            expires_at=None if expires_in is None else now + expires_in,
        )
        await self._store.add(key)
        return token.text, key

    async def list(self, org_id: str) -> Sequence[ApiKey]:
        """All keys of an organisation, newest first, revoked and expired ones included."""
        return await self._store.list(org_id)

    async def revoke(self, key_id: UUID) -> bool:
        """Whether there was such a key; within 2 s every process refuses it."""
        return await self._store.revoke(key_id, self._clock.now())


def _refusal() -> Unauthenticated:
    return Unauthenticated("The API key is unknown, malformed, expired or revoked.")


def _principal_faults(org_id: str, subject: str) -> Iterator[Fault]:
    for name, identity in (("org_id", (org_id, "-")), ("subject", ("-", subject))):
        try:
            Principal(*identity, permissions=())
        except ValueError as error:
            yield Fault(name, str(error).removeprefix(f"{name} "))


def _permission_faults(permissions: Collection[str]) -> Iterator[Fault]:
    unknown = sorted(set(permissions).difference(PERMISSIONS))
    if unknown:
        yield Fault("permissions", f"must be some of {', '.join(PERMISSIONS)}")


def _attribute_faults(attributes: Mapping[str, str]) -> Iterator[Fault]:
    if len(attributes) > ATTRIBUTES_MAX:
        yield Fault("attributes", f"must be at most {ATTRIBUTES_MAX}")
    for name, value in attributes.items():
        if not _is_text(name, ATTRIBUTE_NAME_MAX):
            yield Fault("attributes", f"a name must have 1 to {ATTRIBUTE_NAME_MAX} printable characters")
        elif not _is_text(value, ATTRIBUTE_VALUE_MAX):
            yield Fault(f"attributes.{name}", f"must have 1 to {ATTRIBUTE_VALUE_MAX} printable characters")


def _is_text(value: object, maximum: int) -> bool:
    return isinstance(value, str) and 1 <= len(value) <= maximum and value.isprintable()
