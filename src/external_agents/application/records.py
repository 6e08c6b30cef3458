"""Calls that a host made itself and wants on record."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from uuid import UUID

from external_agents.domain.agent import ExternalAgent
from external_agents.domain.errors import Fault, ValidationError
from external_agents.domain.ids import created_at_of
from external_agents.domain.invocation import (
    TRACE_ID_PATTERN,
    ErrorCode,
    ExternalAgentInvocation,
    InvocationStatus,
)
from external_agents.domain.json_values import JsonText, JsonValue, join_path, plain_value
from external_agents.domain.schema import Schema

FINISHED_CALL_SCHEMA = {
    "type": "object",
    "properties": {
        "status": {"type": "string", "enum": ["succeeded", "failed", "unknown"]},
        "request_payload": {},
        "response_payload": {},
        "response_status": {"type": "integer", "minimum": 100, "maximum": 599},
        "execution_time_ms": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1},
        "error_code": {"type": "string", "enum": [code.value for code in ErrorCode]},
        "error_message": {"type": "string", "maxLength": 2000},
        "lineage_hop_id": {"type": "string", "minLength": 1, "maxLength": 200},
        "trace_id": {"type": "string", "pattern": TRACE_ID_PATTERN},
    },
    "required": ["status", "request_payload"],
    "additionalProperties": False,
}

_schema = Schema(FINISHED_CALL_SCHEMA)


def finished_call(
    record: JsonValue, *, agent: ExternalAgent, initiated_by: str, invocation_id: UUID, trace_id: str, at: datetime
) -> ExternalAgentInvocation:
    """
    The invocation that `record` describes.

    Raises:
        ValidationError: Every fault of the record.
    """
    faults = _schema.faults(record)
    request, response = (_payload(record, name, faults) for name in ("request_payload", "response_payload"))
    faults += _text_faults(record)
    if faults or request is None:
        raise ValidationError(faults)
    created_at = created_at_of(invocation_id)
    return ExternalAgentInvocation(
        id=invocation_id,
        org_id=agent.org_id,
        external_agent_id=agent.id,
        lineage_hop_id=record.get("lineage_hop_id"),
        initiated_by=initiated_by,
        status=InvocationStatus(record["status"]),
        request=request,
        response=response,
        response_status=_whole(record.get("response_status")),
        execution_time_ms=_whole(record.get("execution_time_ms")),
        error_code=ErrorCode(record["error_code"]) if "error_code" in record else None,
        error_message=record.get("error_message"),
        trace_id=record.get("trace_id", trace_id),
        created_at=created_at,
        completed_at=max(created_at, at),
    )


def _payload(record: JsonValue, name: str, faults: list[Fault]) -> JsonText | None:
    """None also for a payload that is no JSON, once its fault is told."""
    if not isinstance(record, Mapping) or name not in record:
        return None
    payload = record[name]
    if isinstance(payload, JsonText):
        return payload
    try:
        return JsonText.of(payload)
    except ValidationError as invalid:
        faults += [
            Fault(join_path(name, fault.path) if fault.path else name, fault.message) for fault in invalid.errors
        ]
        return None


def _text_faults(record: JsonValue) -> tuple[Fault, ...]:
    """What a text column could not hold."""
    if not isinstance(record, Mapping):
        return ()
    try:
        plain_value({name: value for name, value in record.items() if not str(name).endswith("_payload")})
    except ValidationError as invalid:
        return invalid.errors
    return ()


def _whole(value: float | None) -> int | None:
    """JSON Schema takes 200.0 for an integer too."""
    return None if value is None else int(value)
