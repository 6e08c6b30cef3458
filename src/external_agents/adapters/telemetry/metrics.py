"""
What is measured: every metric with its labels and all values that these can take.

No label has a tenant's value (organisation, subject, agent, currency, trace), so the number of series is bounded by
this file and by the routes of the API, whatever callers send.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import attrs

from external_agents.domain import errors, refusals
from external_agents.domain.access import Action
from external_agents.domain.invocation import ErrorCode, InvocationStatus

Values: TypeAlias = tuple[str, ...]

OTHER = "other"
NONE = "none"

REFUSALS = tuple(
    error.__name__
    for error in (
        errors.AgentInactive,
        refusals.IdempotencyKeyReused,
        refusals.IdempotencyKeyInFlight,
        refusals.RateLimited,
        refusals.BudgetExceeded,
        errors.Unavailable,
        errors.AdmissionInDoubt,
    )
)
STATUS_CLASSES = ("1xx", "2xx", "3xx", "4xx", "5xx")
ATTEMPT_ERRORS = tuple(code.value for code in ErrorCode if code not in {ErrorCode.HTTP_STATUS, ErrorCode.INTERRUPTED})
ENDS: tuple[Values, ...] = (
    (InvocationStatus.SUCCEEDED.value, NONE),
    *((InvocationStatus.FAILED.value, code.value) for code in ErrorCode if code is not ErrorCode.INTERRUPTED),
    (InvocationStatus.UNKNOWN.value, ErrorCode.INTERRUPTED.value),
)
"""How an invocation can end: its status and its error code."""


@attrs.frozen(kw_only=True)
class Metric:
    """
    One metric.

    Attributes:
        labels: The names of its labels.
        series: The values of the labels, of all series that are there from the start; others appear with their first
            event.
        told: The values of each label in words, where `series` does not have them.
        buckets: Upper bounds, inclusive, of a histogram's.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    meaning: str
    labels: tuple[str, ...] = ()
    series: tuple[Values, ...] = ()
    told: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


def _one_each(*values: str) -> tuple[Values, ...]:
    return tuple((value,) for value in values)


_METHOD = "the method, or `other`: one that the route does not have"
_ROUTE = "the route's template, or `other`: none"

REQUESTS = Metric(
    name="external_agents_http_requests_total",
    kind="counter",
    meaning="Requests to the API.",
    labels=("method", "route", "status"),
    told=(_METHOD, _ROUTE, "the status of the answer, or `none`: the caller left before it"),
)
REQUEST_DURATION = Metric(
    name="external_agents_http_request_duration_seconds",
    kind="histogram",
    meaning="From the arrival of a request's head to the beginning of its answer.",
    labels=("method", "route"),
    told=(_METHOD, _ROUTE),
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120),
)
ADMISSIONS = Metric(
    name="external_agents_admissions_total",
    kind="counter",
    meaning="Invocations that were admitted.",
)
REFUSED = Metric(
    name="external_agents_refusals_total",
    kind="counter",
    meaning="Invocations that were refused by what stands against them, by the name of the error.",
    labels=("reason",),
    series=_one_each(*REFUSALS, OTHER),
)
RUNNING = Metric(
    name="external_agents_invocations_running",
    kind="gauge",
    meaning="Invocations that were admitted and have not ended.",
)
ENDED = Metric(
    name="external_agents_invocations_total",
    kind="counter",
    meaning="Invocations that ended; interrupted ones are counted by the process that recovered them.",
    labels=("status", "error_code"),
    series=ENDS,
)
ATTEMPTS = Metric(
    name="external_agents_attempts_total",
    kind="counter",
    meaning="Tries to reach an agent: the class of the status it answered, or the error where no answer was taken.",
    labels=("outcome",),
    series=_one_each(*STATUS_CLASSES, *ATTEMPT_ERRORS, OTHER),
)
ATTEMPT_DURATION = Metric(
    name="external_agents_attempt_duration_seconds",
    kind="histogram",
    meaning="How long a try took, whatever came of it: the agent's latency.",
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30),
)
RESERVATIONS = Metric(
    name="external_agents_reservations_total",
    kind="counter",
    meaning=(
        "Reservations of a budget: made at an admission; then charged or released; overrun, beside charged, where the "
        "agent's cost was above the reservation. What recovery charges for a process that is gone is not among them."
    ),
    labels=("event",),
    series=_one_each("made", "charged", "released", "overrun"),
)
DECISIONS = Metric(
    name="external_agents_decisions_total",
    kind="counter",
    meaning="Access decisions; without those that only choose what a list shows.",
    labels=("action", "outcome"),
    series=tuple((action.value, outcome) for action in Action for outcome in ("allowed", "denied", "failed")),
)
BATCH_ITEMS = Metric(
    name="external_agents_batch_items",
    kind="histogram",
    meaning="How many admissions, and how many settlements, one call of the ledger's store served.",
    labels=("kind",),
    series=_one_each("admissions", "settlements"),
    buckets=(0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
)
BATCH_DURATION = Metric(
    name="external_agents_batch_duration_seconds",
    kind="histogram",
    meaning="From the start of such a call to its commit.",
    buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5),
)
QUEUE = Metric(
    name="external_agents_queue_waiting",
    kind="gauge",
    meaning="Admissions and settlements that were left waiting when the latest such call began.",
)
ERRORS = Metric(
    name="external_agents_unexpected_errors_total",
    kind="counter",
    meaning="Log lines of the level error or above: what the service did not foresee. The log tells each.",
)

METRICS = (
    REQUESTS,
    REQUEST_DURATION,
    ADMISSIONS,
    REFUSED,
    RUNNING,
    ENDED,
    ATTEMPTS,
    ATTEMPT_DURATION,
    RESERVATIONS,
    DECISIONS,
    BATCH_ITEMS,
    BATCH_DURATION,
    QUEUE,
    ERRORS,
)
