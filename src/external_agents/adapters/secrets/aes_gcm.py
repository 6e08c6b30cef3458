"""Sealing secrets with AES-256-GCM (NIST SP 800-38D)."""

from __future__ import annotations

import os
import re

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from external_agents.adapters.secrets.key_ring import KEY_ID_PATTERN, KeyRing
from external_agents.domain.errors import SecretUnreadable
from external_agents.ports.secrets import SecretBox, SecretContext

_VERSION = 1
_NONCE_BYTES = 12
_TAG_BYTES = 16


class AesGcmSecretBox(SecretBox):
    """
    Envelope: a version byte, the key id with its length in front, a random nonce of 12 bytes, ciphertext, tag.

    Authenticated along with it: version and key id, organisation, agent, field and destination, each with its length.
    """

    def __init__(self, key_ring: KeyRing) -> None:
        self._first_id = key_ring.key_ids[0]
        self._ciphers = {key_id: AESGCM(key) for key_id, key in key_ring.sealing_keys.items()}

    def seal(self, plaintext: bytes, context: SecretContext) -> bytes:
        header = _header(self._first_id)
        nonce = os.urandom(_NONCE_BYTES)
        return header + nonce + self._ciphers[self._first_id].encrypt(nonce, plaintext, _bound_to(header, context))

    def open(self, envelope: bytes, context: SecretContext) -> bytes:
        key_id = envelope_key_id(envelope)
        if key_id not in self._ciphers:
            raise SecretUnreadable(f"A secret was sealed with the key {key_id}, which is not configured.")
        header = _header(key_id)
        nonce, sealed = envelope[len(header) :][:_NONCE_BYTES], envelope[len(header) + _NONCE_BYTES :]
        try:
            return self._ciphers[key_id].decrypt(nonce, sealed, _bound_to(header, context))
        except InvalidTag:
            raise SecretUnreadable("A sealed secret was altered or moved.") from None


def envelope_key_id(envelope: bytes) -> str:
    """
    The id of the key that an envelope says it was sealed with; nothing proves it but opening it.

    Raises:
        SecretUnreadable: This is no envelope.
    """
    if len(envelope) < 2 or envelope[0] != _VERSION:
        raise SecretUnreadable("A sealed secret is of an unknown version, or was altered.")
    key_id = envelope[2 : 2 + envelope[1]].decode("latin-1")
    if len(envelope) < 2 + envelope[1] + _NONCE_BYTES + _TAG_BYTES or re.fullmatch(KEY_ID_PATTERN, key_id) is None:
        raise SecretUnreadable("A sealed secret was cut off or altered.")
    return key_id


def _header(key_id: str) -> bytes:
    return bytes([_VERSION, len(key_id)]) + key_id.encode("ascii")


def _bound_to(header: bytes, context: SecretContext) -> bytes:
    parts = [text.encode() for text in (context.org_id, context.agent_id, context.field, context.destination)]
    return b"".join(len(part).to_bytes(4) + part for part in [header, *parts])
