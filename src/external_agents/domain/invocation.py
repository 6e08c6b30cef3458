"""One call of an agent: its record, its attempts, its outcome, its lifecycle."""

from __future__ import annotations

import enum
from datetime import datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import attrs

from external_agents.domain.budget import Money, reported_cost
from external_agents.domain.errors import IllegalTransition
from external_agents.domain.json_values import JsonText, JsonValue

TRACE_ID_PATTERN = "^(?!0{32})[0-9a-f]{32}$"
"""W3C Trace Context, section 3.2.2.3."""


class InvocationStatus(enum.StrEnum):
    PENDING = "pending"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    UNKNOWN = "unknown"
    CANCELLED = "cancelled"


_MOVES = {
    InvocationStatus.PENDING: {InvocationStatus.RUNNING, InvocationStatus.CANCELLED},
    InvocationStatus.RUNNING: {InvocationStatus.SUCCEEDED, InvocationStatus.FAILED, InvocationStatus.UNKNOWN},
}

ENDED = frozenset(InvocationStatus) - _MOVES.keys()


class ErrorCode(enum.StrEnum):
    CONNECTION_FAILED = "connection_failed"
    TIMEOUT = "timeout"
    HTTP_STATUS = "http_status"
    EGRESS_REFUSED = "egress_refused"
    RESPONSE_TOO_LARGE = "response_too_large"
    RESPONSE_ENCODED = "response_encoded"
    AGENT_AUTH_FAILED = "agent_auth_failed"
    INTERRUPTED = "interrupted"


@attrs.frozen(kw_only=True)
class Outcome:
    """
    What one attempt came to.

    Attributes:
        error: None for a 2xx answer that was taken.
        status: Of the agent's answer, where one came.
        answer: The answer's body as JSON; a body that is not JSON as a string.
        message: One line for the record; without secrets and addresses.
        retry_after_s: What the agent asked for.
        passing: Whether it is known to pass, so that trying again is worth it, although `status` does not say so.
        may_have_run: Whether the agent may have done its work although no complete answer was taken.
    """

    error: ErrorCode | None = None
    status: int | None = None
    answer: JsonText | None = None
    message: str | None = None
    retry_after_s: float | None = None
    passing: bool = False
    may_have_run: bool = False


@attrs.frozen(kw_only=True)
class Attempt:
    """One try to reach the agent: when, and what came of it: a status, or an error where no answer was taken."""

    at: datetime
    status: int | None = None
    error: ErrorCode | None = None
    duration_ms: int

    @classmethod
    def of(cls, outcome: Outcome, at: datetime, duration_ms: int) -> Attempt:
        if outcome.error in {None, ErrorCode.HTTP_STATUS}:
            return cls(at=at, status=outcome.status, duration_ms=duration_ms)
        return cls(at=at, error=outcome.error, duration_ms=duration_ms)


@attrs.frozen(kw_only=True)
class ExternalAgentInvocation:
    """
    The durable record of one call.

    `request` and `response` are the JSON texts as they were sent and received; `request_payload` and `response_payload`
    are the same as Python values.

    Attributes:
        initiated_by: The subject of the principal who asked.
        reservation: What the budget holds for it while it runs; None where nothing was reserved.
        cost: What it was charged; None where nothing was.
        cost_overrun: Whether the agent's own figure was above the reservation.
        trace_id: 32 hex digits (W3C Trace Context).
    """

    id: UUID
    org_id: str
    external_agent_id: UUID
    lineage_hop_id: str | None = None
    initiated_by: str
    status: InvocationStatus = InvocationStatus.RUNNING
    request: JsonText
    response: JsonText | None = None
    response_status: int | None = None
    attempts: tuple[Attempt, ...] = ()
    execution_time_ms: int | None = None
    error_code: ErrorCode | None = None
    error_message: str | None = None
    reservation: Money | None = None
    cost: Money | None = None
    cost_overrun: bool = False
    trace_id: str
    created_at: datetime
    completed_at: datetime | None = None

    @property
    def request_payload(self) -> JsonValue:
        return self.request.value

    @property
    def response_payload(self) -> JsonValue:
        return None if self.response is None else self.response.value

    @property
    def has_ended(self) -> bool:
        return self.status in ENDED

    def concluded(
        self,
        outcome: Outcome,
        attempts: tuple[Attempt, ...],
        *,
        currency: str,
        charged_anyway: bool,
        execution_time_ms: int,
        at: datetime,
    ) -> ExternalAgentInvocation:
        """
        This running invocation at its end.

        Args:
            outcome: Of the last attempt.
            currency: Of the agent's budget, for a cost that nothing was reserved for.
            charged_anyway: Whether any attempt may have made the agent work without a complete answer, so that a
                failure costs its reservation all the same.
        """
        succeeded = outcome.error is None
        reported = reported_cost(outcome.answer) if succeeded else None
        cost = Money(reported, currency) if reported is not None else None
        if cost is None and (succeeded or charged_anyway):
            cost = self.reservation
        return self._moved_to(
            InvocationStatus.SUCCEEDED if succeeded else InvocationStatus.FAILED,
            attempts=attempts,
            response=outcome.answer,
            response_status=outcome.status,
            error_code=outcome.error,
            error_message=outcome.message,
            cost=cost,
            cost_overrun=cost is not None and self.reservation is not None and cost.amount > self.reservation.amount,
            execution_time_ms=execution_time_ms,
            completed_at=at,
        )

    def interrupted(self, at: datetime) -> ExternalAgentInvocation:
        """This running invocation, whose process died: nobody knows what the agent did, so it is charged."""
        return self._moved_to(
            InvocationStatus.UNKNOWN,
            error_code=ErrorCode.INTERRUPTED,
            error_message="The service was interrupted while the invocation ran; it is not sent again.",
            cost=self.reservation,
            completed_at=at,
        )

    @property
    def reserved_amount(self) -> Decimal:
        return self.reservation.amount if self.reservation else Decimal(0)

    @property
    def charged_amount(self) -> Decimal:
        return self.cost.amount if self.cost else Decimal(0)

    def _moved_to(self, status: InvocationStatus, **changes: Any) -> ExternalAgentInvocation:
        if status not in _MOVES.get(self.status, ()):
            raise IllegalTransition(self.status, status)
        return attrs.evolve(self, status=status, **changes)
