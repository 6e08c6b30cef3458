"""Secrets at rest."""

from __future__ import annotations

from abc import abstractmethod
from typing import Protocol

import attrs


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
