"""Which outcomes of an attempt are tried again, and when. Pure: the clock and the jitter are arguments."""

from __future__ import annotations

from external_agents.domain.invocation import ErrorCode, Outcome

TOTAL_S = 120.0
"""Everything about one invocation ends within this, from its admission on."""

RETRY_AFTER_MAX_S = 30.0
BACKOFF_BASE_S = 0.5
BACKOFF_MAX_S = 8.0

RETRIED_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
RETRIED_ERRORS = frozenset({ErrorCode.CONNECTION_FAILED, ErrorCode.TIMEOUT})


def is_retried(outcome: Outcome) -> bool:
    """Whether trying again could end differently. An answer that was refused, or a redirect, would only come again."""
    if outcome.error in RETRIED_ERRORS or outcome.passing:
        return True
    return outcome.error is ErrorCode.HTTP_STATUS and outcome.status in RETRIED_STATUSES


def backoff_s(attempt: int, jitter: float) -> float:
    """
    Exponential backoff with full jitter.

    Source: Marc Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.

    Args:
        attempt: The attempt that failed, from 1.
        jitter: Uniform in [0, 1).
    """
    return jitter * min(BACKOFF_MAX_S, BACKOFF_BASE_S * 2.0 ** (attempt - 1))


def next_delay_s(outcome: Outcome, *, attempt: int, max_attempts: int, elapsed_s: float, jitter: float) -> float | None:
    """
    Seconds to wait before the next attempt, or None when there is none.

    A Retry-After that asks for more than 30 s, or more than is left of the 120 s, ends the attempts.
    """
    if attempt >= max_attempts or not is_retried(outcome):
        return None
    left_s = TOTAL_S - elapsed_s
    if outcome.retry_after_s is not None and outcome.retry_after_s > min(RETRY_AFTER_MAX_S, left_s):
        return None
    delay_s = max(backoff_s(attempt, jitter), outcome.retry_after_s or 0.0)
    return delay_s if delay_s < left_s else None


def attempt_timeout_s(timeout_s: float, elapsed_s: float) -> float:
    """What one attempt may take in total: the agent's own bound, or what is left."""
    return max(0.0, min(timeout_s, TOTAL_S - elapsed_s))
