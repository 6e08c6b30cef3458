"""Which HTTP header fields a tenant may name, and what their values may hold (RFC 9110, section 5)."""

from __future__ import annotations

import re

_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,200}")
_VALUE = re.compile(r"[\x21-\x7e](?:[\x20-\x7e\t]*[\x21-\x7e])?")

_OURS = frozenset(
    "host connection transfer-encoding te trailer upgrade expect accept-encoding cookie forwarded"
    " idempotency-key traceparent".split()
)
_OUR_PREFIXES = ("content-", "x-forwarded-", "proxy-", "webhook-")


def tenant_may_set(name: str) -> bool:
    """Whether `name` is a header's name and none that steers the connection, the framing, or our own guarantees."""
    lowered = name.lower()
    return _TOKEN.fullmatch(name) is not None and lowered not in _OURS and not lowered.startswith(_OUR_PREFIXES)


def is_field_value(value: str) -> bool:
    """Whether `value` passes through HTTP unchanged: visible ASCII, inner spaces."""
    return _VALUE.fullmatch(value) is not None
