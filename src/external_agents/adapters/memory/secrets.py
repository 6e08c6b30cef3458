"""Secrets in memory."""

from __future__ import annotations

import secrets

from external_agents.domain.errors import SecretUnreadable
from external_agents.ports.secrets import SecretBox, SecretContext

_HANDLE_BYTES = 16


class MemorySecretBox(SecretBox):
    """
    Keeps the secrets themselves, in clear, in the memory of this process; an envelope is a random handle to one.

    It forgets none before it is itself forgotten, so it grows by every secret that is set or changed. For embedding and
    tests; what outlives the process needs a box that encrypts.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[bytes, SecretContext], bytes] = {}

    def seal(self, plaintext: bytes, context: SecretContext) -> bytes:
        handle = secrets.token_bytes(_HANDLE_BYTES)
        self._kept[handle, context] = plaintext
        return handle

    def open(self, envelope: bytes, context: SecretContext) -> bytes:
        try:
            return self._kept[envelope, context]
        except KeyError:
            raise SecretUnreadable(f"The secret {context.field} cannot be opened.") from None
