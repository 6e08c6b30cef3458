"""What a token endpoint answered (RFC 6749, sections 5.1 and 5.2)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime

import attrs

from external_agents.adapters.webhook.answer import Answer, retry_after_s
from external_agents.adapters.webhook.failures import Unanswered
from external_agents.domain.errors import MalformedJson
from external_agents.domain.http_fields import is_field_value
from external_agents.domain.invocation import ErrorCode, Outcome
from external_agents.domain.json_values import JsonValue, decode
from external_agents.domain.retry import RETRIED_STATUSES

TOKEN_LENGTH_MAX = 8192
KEPT_WITHOUT_EXPIRY_S = 60.0
KEPT_MAX_S = 86400.0
LEEWAY_MAX_S = 30.0
"""A token is not used in its last seconds, a tenth of its life at most: it has to live until the agent looks at it."""

_REASONS = frozenset(
    "invalid_request invalid_client invalid_grant unauthorized_client unsupported_grant_type invalid_scope".split()
)
_NOT_UNDERSTOOD = frozenset({"invalid_request", "invalid_client"})


@attrs.frozen
class Token:
    """
    Attributes:
        kept_until_s: By the clock's monotonic time.
    """

    text: str = attrs.field(repr=False)
    kept_until_s: float


def read_token(answer: Answer, asked_at_s: float, now: datetime) -> Token:
    """
    Raises:
        Unanswered: The answer holds no token.
    """
    if not answer.is_success:
        raise _refusal(answer, now)
    fields = _fields(answer)
    text, kind = fields.get("access_token"), fields.get("token_type", "bearer")
    if not isinstance(text, str) or len(text) > TOKEN_LENGTH_MAX or not is_field_value(text):
        raise _failure("The token endpoint gave no usable token.")
    if not isinstance(kind, str) or not kind.lower().startswith("bearer"):
        raise _failure("The token endpoint gave no bearer token.")
    return Token(text, asked_at_s + _kept_s(fields.get("expires_in")))


def wants_other_authentication(answer: Answer) -> bool:
    """Whether the endpoint may have refused the way in which the client showed its secret, rather than the secret."""
    if answer.status == 401:
        return True
    return answer.status == 400 and _fields(answer).get("error", "invalid_request") in _NOT_UNDERSTOOD


def failure_of(outcome: Outcome) -> Outcome:
    """What it means for an agent that its token endpoint gave no answer that could be taken."""
    if outcome.error in {ErrorCode.RESPONSE_TOO_LARGE, ErrorCode.RESPONSE_ENCODED}:
        return Outcome(error=ErrorCode.AGENT_AUTH_FAILED, message=outcome.message)
    return attrs.evolve(outcome, may_have_run=False)


def _refusal(answer: Answer, now: datetime) -> Unanswered:
    reason = _fields(answer).get("error")
    told = f" ({reason})" if isinstance(reason, str) and reason in _REASONS else ""
    # The status itself is not told: it would be taken for the agent's.
    passing = answer.status in RETRIED_STATUSES
    return _failure(
        f"The token endpoint answered {answer.status}{told}.",
        passing=passing,
        retry_after_s=retry_after_s(answer.fields, now) if passing else None,
    )


def _failure(message: str, *, passing: bool = False, retry_after_s: float | None = None) -> Unanswered:
    return Unanswered(
        Outcome(error=ErrorCode.AGENT_AUTH_FAILED, message=message, passing=passing, retry_after_s=retry_after_s)
    )


def _fields(answer: Answer) -> Mapping[str, JsonValue]:
    try:
        fields = decode(bytes(answer.body))
    except MalformedJson:
        return {}
    return fields if isinstance(fields, Mapping) else {}


def _kept_s(expires_in: JsonValue) -> float:
    """Some providers give the seconds as a string, some give none."""
    try:
        life_s = KEPT_WITHOUT_EXPIRY_S if expires_in is None else float(expires_in)
    except (TypeError, ValueError, OverflowError):
        life_s = KEPT_WITHOUT_EXPIRY_S
    if math.isnan(life_s):
        life_s = KEPT_WITHOUT_EXPIRY_S
    life_s = min(max(0.0, life_s), KEPT_MAX_S)
    return life_s - min(LEEWAY_MAX_S, life_s / 10)
