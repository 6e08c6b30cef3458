"""Who is asking."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from datetime import datetime
from typing import Protocol
from uuid import UUID

import attrs

from external_agents.domain.access import Principal


class Authenticator(Protocol):
    """Turns the credentials of a request into a principal."""

    @abstractmethod
    async def authenticate(self, bearer_token: str) -> Principal:
        """
        Args:
            bearer_token: What stood behind `Authorization: Bearer`.

        Raises:
            Unauthenticated: Unknown, malformed, expired or revoked.
            Unavailable: It cannot be decided now.
        """
        ...


@attrs.frozen(kw_only=True)
class ApiKey:
    """
    What is kept of an API key: whom it stands for, and a keyed hash of its secret part, never the secret.

    Attributes:
        hash_key_id: Which of the service's secret keys the hash was made with.
    """

    id: UUID
    principal: Principal
    hash_key_id: str
    secret_hash: bytes = attrs.field(repr=False)
    created_at: datetime
    expires_at: datetime | None = None
    revoked_at: datetime | None = None


class ApiKeyStore(Protocol):
    """
    API keys by id; the one place that is read before the organisation is known.

    Raises:
        Unavailable: The store cannot be reached. From every method.
    """

    @abstractmethod
    async def add(self, key: ApiKey) -> None: ...

    @abstractmethod
    async def find(self, *key_ids: UUID) -> Sequence[ApiKey]:
        """Those of these keys that there are, revoked and expired ones included, in any order."""
        ...

    @abstractmethod
    async def list(self, org_id: str) -> Sequence[ApiKey]:
        """All keys of an organisation, newest first, revoked and expired ones included."""
        ...

    @abstractmethod
    async def revoke(self, key_id: UUID, at: datetime) -> bool:
        """Whether there was such a key; revoking twice keeps the first time."""
        ...
