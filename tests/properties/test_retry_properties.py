"""The retry schedule, whatever agents answer and however long they take."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from external_agents.domain.invocation import ErrorCode, Outcome
from external_agents.domain.retry import (
    BACKOFF_MAX_S,
    RETRIED_STATUSES,
    RETRY_AFTER_MAX_S,
    TOTAL_S,
    attempt_timeout_s,
    backoff_s,
    is_retried,
    next_delay_s,
)

JITTERS = st.floats(0, 1, exclude_max=True)
OUTCOMES = st.builds(
    Outcome,
    error=st.none() | st.sampled_from(list(ErrorCode)),
    status=st.none() | st.integers(100, 599) | st.sampled_from(sorted(RETRIED_STATUSES)),
    retry_after_s=st.none() | st.floats(0, 200) | st.sampled_from([0.0, 30.0, 30.001]),
    may_have_run=st.booleans(),
)


@settings(max_examples=300)
@given(
    st.lists(st.tuples(OUTCOMES, st.floats(0, 1), JITTERS), min_size=3, max_size=3),
    st.floats(1, 30),
    st.integers(1, 3),
    st.floats(0, 90),
)
def test_everything_ends_within_the_total(
    attempts: list[tuple[Outcome, float, float]], timeout_s: float, max_attempts: int, elapsed_s: float
) -> None:
    """`elapsed_s` starts anywhere, so that the end of the total is met as well."""
    for number, (outcome, share, jitter) in enumerate(attempts, 1):
        allowed_s = attempt_timeout_s(timeout_s, elapsed_s)
        assert 0 <= allowed_s <= timeout_s
        elapsed_s += allowed_s * share
        assert elapsed_s <= TOTAL_S + 1e-9
        delay_s = next_delay_s(outcome, attempt=number, max_attempts=max_attempts, elapsed_s=elapsed_s, jitter=jitter)
        if number == max_attempts or not is_retried(outcome):
            assert delay_s is None
        if delay_s is None:
            return
        assert 0 <= delay_s < TOTAL_S - elapsed_s
        assert delay_s >= (outcome.retry_after_s or 0)
        assert delay_s <= max(RETRY_AFTER_MAX_S, BACKOFF_MAX_S)
        elapsed_s += delay_s
    raise AssertionError("there is no attempt after the third")


@given(OUTCOMES, st.integers(1, 2), st.floats(0, 60), JITTERS)
def test_what_is_retried_has_a_delay_unless_the_agent_asks_for_too_much(
    outcome: Outcome, attempt: int, elapsed_s: float, jitter: float
) -> None:
    delay_s = next_delay_s(outcome, attempt=attempt, max_attempts=3, elapsed_s=elapsed_s, jitter=jitter)
    too_much = (outcome.retry_after_s or 0) > RETRY_AFTER_MAX_S
    assert (delay_s is not None) == (is_retried(outcome) and not too_much)


@given(OUTCOMES)
def test_what_is_retried(outcome: Outcome) -> None:
    if outcome.error in {None, ErrorCode.EGRESS_REFUSED, ErrorCode.RESPONSE_TOO_LARGE, ErrorCode.RESPONSE_ENCODED}:
        assert not is_retried(outcome)
    if outcome.error in {ErrorCode.CONNECTION_FAILED, ErrorCode.TIMEOUT}:
        assert is_retried(outcome)
    if outcome.error is ErrorCode.HTTP_STATUS:
        assert is_retried(outcome) == (outcome.status in {408, 425, 429, 500, 502, 503, 504})


@given(st.integers(1, 50), JITTERS)
def test_the_backoff_is_within_its_bounds(attempt: int, jitter: float) -> None:
    assert 0 <= backoff_s(attempt, jitter) < min(8.0, 0.5 * 2 ** (attempt - 1)) + 1e-9
    assert backoff_s(attempt, 0.0) == 0
