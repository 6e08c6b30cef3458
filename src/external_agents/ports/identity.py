"""Who is asking."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Protocol
from uuid import UUID

import attrs

from external_agents.domain.access import Principal
from external_agents.ports.secrets import SecretContext


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
        sealed_hash_key: What the hash was made with, sealed in `hash_key_context` with a later secret key, so that the
            first one can be retired.
        last_used_at: Coarse: the key was used then, and not in any later hour (UTC) than that one.
    """

    id: UUID
    principal: Principal
    hash_key_id: str
    secret_hash: bytes = attrs.field(repr=False)
    created_at: datetime
    expires_at: datetime | None = None
    revoked_at: datetime | None = None
    sealed_hash_key: bytes | None = attrs.field(default=None, repr=False)
    # No part of what the key is: whoever remembers a key need not forget it because it was used.
    last_used_at: datetime | None = attrs.field(default=None, eq=False)


def hash_key_context(hash_key_id: str) -> SecretContext:
    """Of the key that API keys are hashed with; it belongs to the service and to no organisation."""
    return SecretContext(org_id="", agent_id="", field=f"api_key_hash_key.{hash_key_id}", destination="")


def hour_of(moment: datetime) -> datetime:
    """The hour (UTC) that it lies in, as its beginning."""
    return moment.astimezone(UTC).replace(minute=0, second=0, microsecond=0)


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

    @abstractmethod
    async def note_uses(self, uses: Mapping[UUID, datetime]) -> None:
        """
        When keys were used. A key is written once an hour (UTC) at most, whoever notes it: the first use noted in an
        hour stays, earlier hours are passed over, and so are unknown keys.
        """
        ...
