"""Secrets at rest."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol, TypeAlias
from uuid import UUID

import attrs

from external_agents.domain.agent import ExternalAgent


@attrs.frozen(kw_only=True)
class SecretContext:
    """
    Where a secret belongs. An envelope opens in the same context only, so envelopes cannot be swapped between rows.

    Attributes:
        field: Its path, `auth_config.key`.
        destination: The origins that the secret is sent to; empty where the secret itself says it.
    """

    org_id: str
    agent_id: str
    field: str
    destination: str


class SecretBox(Protocol):
    """Seals secrets so that the store never sees them."""

    @abstractmethod
    def seal(self, plaintext: bytes, context: SecretContext) -> bytes:
        """The envelope; a new one at each call."""
        ...

    @abstractmethod
    def open(self, envelope: bytes, context: SecretContext) -> bytes:
        """
        Raises:
            SecretUnreadable: Altered, moved, or sealed with a key that is not there.
        """
        ...


@attrs.frozen(kw_only=True, order=True)
class SecretPlace:
    """Which secret: of which agent, and its path, `auth_config.key`."""

    org_id: str
    agent_id: UUID
    field: str


@attrs.frozen(kw_only=True)
class KeyUse:
    """How many sealed secrets, and how many API keys in force, can be used only with a certain secret key."""

    secrets: int = 0
    api_keys: int = 0


@attrs.frozen(kw_only=True)
class HashKey:
    """
    What API keys were hashed with.

    Attributes:
        hash_key_id: The secret key that it comes from.
        sealed_with: The later secret key that it is sealed with, and `envelope`; None: it is sealed nowhere yet.
    """

    hash_key_id: str
    sealed_with: str | None = None
    envelope: bytes | None = attrs.field(default=None, repr=False)


@attrs.frozen(kw_only=True)
class Resealed:
    """
    Attributes:
        resealed: How many secrets.
        unreadable: Those that could not be opened, and why.
        last: The last place that was looked at; None: there is none behind `after`.
    """

    resealed: int
    unreadable: Mapping[SecretPlace, str]
    last: SecretPlace | None


Reseal: TypeAlias = Callable[[ExternalAgent, str], bytes]
"""The envelope at a path of an agent made anew; raises SecretUnreadable."""


class EnvelopeStore(Protocol):
    """
    All envelopes, of all organisations, by the ids of the keys that they were sealed with.

    Raises:
        Unavailable: The store cannot be reached. From every method.
    """

    @abstractmethod
    async def uses(self) -> Mapping[str, KeyUse]:
        """What hangs on each secret key, by its id. An API key hangs on what seals its hash key, if anything does."""
        ...

    @abstractmethod
    async def key_ids(self) -> Collection[frozenset[str]]:
        """Of each set one secret key at least is needed. Quick, however many envelopes there are."""
        ...

    @abstractmethod
    async def reseal(self, key_id: str, reseal: Reseal, *, after: SecretPlace | None) -> Resealed:
        """
        Replace the next envelopes that were sealed with a key, in the order of their places, behind `after`.

        What somebody else is changing at this moment is passed over. Nothing else of an agent changes, its version
        included.
        """
        ...

    @abstractmethod
    async def hash_keys(self) -> Sequence[HashKey]:
        """Those of the API keys in force."""
        ...

    @abstractmethod
    async def put_hash_key(self, key: HashKey) -> None:
        """In place of what was sealed for the same id before."""
        ...
