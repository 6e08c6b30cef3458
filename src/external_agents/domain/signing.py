"""
How an agent can tell that a request comes from here: signing it as Standard Webhooks, version 1, says.

The specification: https://www.standardwebhooks.com.
"""

from __future__ import annotations

import base64
import hmac
from collections.abc import Mapping
from datetime import datetime, timedelta

import attrs

from external_agents.domain.json_values import JsonValue
from external_agents.domain.schema import register_format

PREFIX = "whsec_"
KEY_BYTES_MIN = 24
KEY_BYTES_MAX = 64
PREVIOUS_KEPT_FOR = timedelta(hours=24)

SIGNING_SECRET = "signing_secret"
PREVIOUS_SIGNING_SECRET = "signing_secret.previous"
"""Their paths among an agent's secrets."""


def key_of(secret: str) -> bytes:
    """
    The key that a signing secret spells.

    Raises:
        ValueError: It is not PREFIX and then the base64 of KEY_BYTES_MIN to KEY_BYTES_MAX bytes (RFC 4648, section 4:
            padded, the unused bits zero, so that strict and lenient receivers read one key).
    """
    encoded = secret.removeprefix(PREFIX)
    if encoded == secret:
        raise ValueError("the prefix is missing")
    try:
        key = base64.b64decode(encoded)
    except ValueError:
        raise ValueError("not base64") from None
    if base64.b64encode(key).decode("ascii") != encoded:
        raise ValueError("not the base64 of what it decodes to")
    if not KEY_BYTES_MIN <= len(key) <= KEY_BYTES_MAX:
        raise ValueError("too short or too long")
    return key


def is_signing_secret(text: str) -> bool:
    try:
        key_of(text)
    except ValueError:
        return False
    return True


_EXPECTED = f"{PREFIX} and the base64 of {KEY_BYTES_MIN} to {KEY_BYTES_MAX} bytes"
register_format("signing-secret", is_signing_secret, f"must be {_EXPECTED}")

SIGNING_SECRET_SCHEMA: Mapping[str, JsonValue] = {
    "type": ["string", "null"],
    "format": "signing-secret",
    "description": f"What requests to the agent are signed with (Standard Webhooks): {_EXPECTED}. null: they are not "
    "signed. When it is replaced, requests carry the old one's signature too, for 24 h.",
    "writeOnly": True,
    "default": None,
}


def signature(secret: str, *, message_id: str, timestamp_s: int, body: bytes) -> str:
    """`v1,` and the base64 of the HMAC-SHA256 over `message_id.timestamp_s.body`."""
    mac = hmac.new(key_of(secret), f"{message_id}.{timestamp_s}.".encode(), "sha256")
    mac.update(body)
    return f"v1,{base64.b64encode(mac.digest()).decode('ascii')}"


@attrs.frozen
class SigningSecrets:
    """
    What requests to one agent are signed with.

    Attributes:
        previous: The one before; the receiver may not have changed over yet.
        previous_until: Up to when the one before is used as well, exclusive.
    """

    current: str = attrs.field(repr=False)
    previous: str | None = attrs.field(default=None, repr=False)
    previous_until: datetime | None = None

    def at(self, moment: datetime) -> SigningSecrets:
        """The same, but without the previous one once its time is over."""
        if self.previous_until is not None and moment < self.previous_until:
            return self
        return SigningSecrets(self.current)

    def replaced_by(self, secret: str | None, moment: datetime) -> SigningSecrets | None:
        """With another secret, the current one becomes the previous; with the same one nothing changes; None: gone."""
        if secret is None:
            return None
        if secret == self.current:
            return self.at(moment)
        return SigningSecrets(secret, self.current, moment + PREVIOUS_KEPT_FOR)

    def headers(self, message_id: str, body: bytes, moment: datetime) -> dict[str, str]:
        """Of a request that is sent at `moment`: its id, its time, and its signatures, the current secret's first."""
        timestamp_s = int(moment.timestamp())
        kept = self.at(moment)
        secrets = filter(None, (kept.current, kept.previous))
        return {
            "webhook-id": message_id,
            "webhook-timestamp": str(timestamp_s),
            "webhook-signature": " ".join(
                signature(secret, message_id=message_id, timestamp_s=timestamp_s, body=body) for secret in secrets
            ),
        }
