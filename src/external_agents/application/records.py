"""Calls that a host made itself and wants on record."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from external_agents.domain.agent import ExternalAgent
from external_agents.domain.errors import ValidationError
from external_agents.domain.invocation import ErrorCode, ExternalAgentInvocation, InvocationStatus
from external_agents.domain.json_values import JsonText, JsonValue
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
        "trace_id": {"type": "string", "pattern": "^[0-9a-f]{32}$"},
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
    if faults:
        raise ValidationError(faults)
    response = record.get("response_payload")
    return ExternalAgentInvocation(
        id=invocation_id,
        org_id=agent.org_id,
        external_agent_id=agent.id,
        lineage_hop_id=record.get("lineage_hop_id"),
        initiated_by=initiated_by,
        status=InvocationStatus(record["status"]),
        request=JsonText.of(record["request_payload"]),
        response=None if response is None else JsonText.of(response),
        response_status=record.get("response_status"),
        execution_time_ms=record.get("execution_time_ms"),
        error_code=ErrorCode(record["error_code"]) if "error_code" in record else None,
        error_message=record.get("error_message"),
        trace_id=record.get("trace_id", trace_id),
        created_at=at,
        completed_at=at,
    )
