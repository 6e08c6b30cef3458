"""API keys and credentials in memory."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from uuid import UUID

import attrs

from external_agents.domain.access import Principal
from external_agents.domain.errors import Unauthenticated
from external_agents.ports.identity import ApiKey, ApiKeyStore, Authenticator, hour_of


class MemoryApiKeyStore(ApiKeyStore):
    def __init__(self) -> None:
        self._keys: dict[UUID, ApiKey] = {}

    async def add(self, key: ApiKey) -> None:
        self._keys[key.id] = key

    async def find(self, *key_ids: UUID) -> Sequence[ApiKey]:
        return [self._keys[key_id] for key_id in key_ids if key_id in self._keys]

    async def list(self, org_id: str) -> Sequence[ApiKey]:
        keys = [key for key in self._keys.values() if key.principal.org_id == org_id]
        return sorted(keys, key=lambda key: (key.created_at, key.id), reverse=True)

    async def revoke(self, key_id: UUID, at: datetime) -> bool:
        key = self._keys.get(key_id)
        if key is not None and key.revoked_at is None:
            self._keys[key_id] = attrs.evolve(key, revoked_at=at)
        return key is not None

    async def note_uses(self, uses: Mapping[UUID, datetime]) -> None:
        for key_id, at in uses.items():
            key = self._keys.get(key_id)
            if key is not None and (key.last_used_at is None or key.last_used_at < hour_of(at)):
                self._keys[key_id] = attrs.evolve(key, last_used_at=at)


class MemoryAuthenticator(Authenticator):
    """Knows the tokens that it gave out itself, by their hashes, until they are withdrawn."""

    def __init__(self) -> None:
        self._principals: dict[bytes, Principal] = {}

    def issue(self, principal: Principal) -> str:
        """A new bearer token for the principal."""
        token = secrets.token_urlsafe(32)
        self._principals[_hash(token)] = principal
        return token

    def withdraw(self, bearer_token: str) -> None:
        self._principals.pop(_hash(bearer_token), None)

    async def authenticate(self, bearer_token: str) -> Principal:
        try:
            return self._principals[_hash(bearer_token)]
        except KeyError:
            raise Unauthenticated("The credentials are not known.") from None


def _hash(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()
