"""Invocations that a caller asks for more than once: the same key, the same payload, one invocation."""

from __future__ import annotations

import hashlib
import json
from datetime import timedelta
from decimal import MAX_EMAX, Context, Decimal

from external_agents.domain.invocation import ExternalAgentInvocation
from external_agents.domain.json_values import JsonText
from external_agents.domain.refusals import IdempotencyKeyInFlight, IdempotencyKeyReused

KEY_LENGTH_MAX = 255
"""In characters."""
KEPT_FOR = timedelta(hours=24)
"""From its admission an invocation is found again by its key for so long."""

_MARK = "\ud800\udc00"
"""
Begins a number in the canonical form.

No string that is read from JSON holds these two in a row: the escapes `\\ud800\\udc00` are read as U+10000, and neither
half stands in UTF-8 by itself. So a number is never taken for a string.
"""


def fingerprint(payload: JsonText) -> bytes:
    """
    32 bytes, alike for equal JSON alone.

    Equal are payloads whatever the order of their members, their white space, the escapes in their strings, and the
    spelling of their numbers: `1`, `1.0` and `10E-1` are one number, `0` and `-0` too, and 1e400 is not 1e401, though
    no double holds them. Of a member that an object names twice the last value counts, as in `JsonText.value`.

    The time is linear in the payload's length, but for the sorting of an object's members.
    """
    value = json.loads(payload.text, parse_int=_whole, parse_float=_number)
    canonical = json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).digest()


def replayed(first: ExternalAgentInvocation, first_hash: bytes, request_hash: bytes) -> ExternalAgentInvocation:
    """
    What answers a request that comes with the key of an earlier one: the first invocation, however it ended.

    Args:
        first_hash: The fingerprint of the payload that the key came with first.
        request_hash: Of the payload that it comes with now.

    Raises:
        IdempotencyKeyReused: It comes with another payload. That is wrong whether the first has ended or not.
        IdempotencyKeyInFlight: The first has not ended.
    """
    if first_hash != request_hash:
        raise IdempotencyKeyReused
    if not first.has_ended:
        raise IdempotencyKeyInFlight
    return first


def _whole(number: str) -> str:
    """As `_number`, in less time."""
    significant = number.rstrip("0")
    if significant in {"", "-"}:
        return f"{_MARK}0"
    return f"{_MARK}{significant}e{len(number) - len(significant)}"


def _number(number: str) -> str:
    """Its digits without zeros at either end, and the power of ten that they count: `-1.50e3` → `-15e2`."""
    mantissa, _, exponent = number.lower().partition("e")
    whole, _, fraction = mantissa.lstrip("-").partition(".")
    digits = (whole + fraction).lstrip("0")
    significant = digits.rstrip("0")
    if not significant:
        return f"{_MARK}0"
    sign = "-" if mantissa.startswith("-") else ""
    return f"{_MARK}{sign}{significant}e{_sum(exponent, len(digits) - len(significant) - len(fraction))}"


def _sum(exponent: str, shift: int) -> str:
    """Exact and linear, where an exponent has a million digits; int() refuses over 4,300 and is quadratic in them."""
    if not exponent:
        return str(shift)
    context = Context(prec=len(exponent) + 20, Emax=MAX_EMAX)
    return f"{context.add(Decimal(exponent), Decimal(shift)):f}"
