"""Valid values to start from; every builder takes the attributes that matter to a test by keyword."""

from __future__ import annotations

import secrets
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import attrs

from external_agents.domain.access import PERMISSIONS, Principal
from external_agents.domain.agent import AgentStatus, ExternalAgent
from external_agents.domain.ids import created_at_of, first_id_at
from external_agents.domain.invocation import Attempt, ErrorCode, ExternalAgentInvocation, InvocationStatus, Outcome
from external_agents.domain.json_values import JsonText
from external_agents.ports.ledger import AdmissionRequest

ALL_PERMISSIONS = frozenset(PERMISSIONS)


def new_org() -> str:
    """An organisation that no other test knows."""
    return f"org-{secrets.token_hex(8)}"


def id_at(moment: datetime) -> UUID:
    """A UUIDv7 made in the millisecond of `moment`."""
    return UUID(int=first_id_at(moment).int | secrets.randbits(62))


def new_id() -> UUID:
    """A UUIDv7 of this millisecond; two of one millisecond are in no order."""
    return id_at(datetime.now(UTC))


def principal_of(org_id: str, **changes: Any) -> Principal:
    """Someone of the organisation who may do everything."""
    return attrs.evolve(Principal(org_id, "tester", ALL_PERMISSIONS), **changes)


def make_agent(**changes: Any) -> ExternalAgent:
    """An active agent of a new organisation, without credentials and limits."""
    at = datetime(2026, 3, 10, 12, 0, 0, 123456, tzinfo=UTC)
    fields: dict[str, Any] = {
        "id": new_id(),
        "org_id": new_org(),
        "name": "Research",
        "description": "Answers questions.",
        "provider": "custom",
        "webhook_url": "https://agent.example.com/hook",
        "auth_type": "none",
        "auth_config": {},
        "platform_config": {},
        "rate_limit_config": None,
        "budget_config": None,
        "tags": (),
        "timeout_s": 30.0,
        "max_attempts": 3,
        "status": AgentStatus.ACTIVE,
        "created_by": "tester",
        "updated_by": "tester",
        "created_at": at,
        "updated_at": at,
    }
    return ExternalAgent(**{**fields, **changes})


def next_version(agent: ExternalAgent, **fields: Any) -> ExternalAgent:
    """The agent as another subject changed it."""
    return agent.changed(fields, by="editor", at=datetime(2026, 3, 11, 8, 30, tzinfo=UTC))


def make_request(agent: ExternalAgent, **changes: Any) -> AdmissionRequest:
    """The request to admit an invocation of this version of the agent, now."""
    fields: dict[str, Any] = {
        "invocation_id": new_id(),
        "agent": agent,
        "initiated_by": "tester",
        "request": JsonText('{"input":"hello"}'),
        "trace_id": secrets.token_hex(16),
    }
    return AdmissionRequest(**{**fields, **changes})


def make_finished_call(agent: ExternalAgent, **changes: Any) -> ExternalAgentInvocation:
    """A finished call that the host made itself, as `InvocationLedger.record` takes it; created at its id's time."""
    invocation_id = changes.get("id", new_id())
    fields: dict[str, Any] = {
        "id": invocation_id,
        "org_id": agent.org_id,
        "external_agent_id": agent.id,
        "initiated_by": "tester",
        "status": InvocationStatus.SUCCEEDED,
        "request": JsonText('{"input":"hello"}'),
        "response": JsonText('{"output":"world"}'),
        "response_status": 200,
        "trace_id": secrets.token_hex(16),
        "created_at": created_at_of(invocation_id),
        "completed_at": created_at_of(invocation_id),
    }
    return ExternalAgentInvocation(**{**fields, **changes})


def answered(text: str = '{"output":"world"}') -> Outcome:
    """A 200 with this JSON."""
    return Outcome(status=200, answer=JsonText(text))


def costing(cost: Decimal | str | None) -> Outcome:
    """A 200 whose answer names its cost; None: it names none."""
    return answered() if cost is None else answered(f'{{"metadata":{{"cost":"{cost}"}}}}')


def refused(status: int = 503, **changes: Any) -> Outcome:
    """A complete answer with a status that is no success."""
    return Outcome(**{"error": ErrorCode.HTTP_STATUS, "status": status, **changes})


def timed_out() -> Outcome:
    """Nobody knows whether the agent has done its work."""
    return Outcome(error=ErrorCode.TIMEOUT, may_have_run=True, message="The agent did not answer in time.")


def conclude(
    invocation: ExternalAgentInvocation, outcome: Outcome | None = None, *, currency: str = "USD", **changes: Any
) -> ExternalAgentInvocation:
    """A running invocation at its end after one attempt with this outcome (by default a success without a cost)."""
    outcome = outcome or answered()
    at = datetime(2026, 3, 10, 12, 0, 1, 654321, tzinfo=UTC)
    ended = invocation.concluded(
        outcome,
        (Attempt.of(outcome, at, 7),),
        currency=currency,
        charged_anyway=outcome.may_have_run,
        execution_time_ms=7,
        at=at,
    )
    return attrs.evolve(ended, **changes)
