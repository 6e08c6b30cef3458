"""Decisions and invocations as log events."""

from __future__ import annotations

import logging
from typing import Any

import attrs
import structlog

from external_agents.domain.access import Principal
from external_agents.domain.invocation import InvocationStatus
from external_agents.ports.observability import (
    BatchRecord,
    DecisionRecord,
    InvocationRecord,
    ObservabilityManager,
    Record,
)

LOGGER_NAME = "external_agents.observability"


class StructlogObservability(ObservabilityManager):
    """
    One event a record.

    | record | event | level |
    |---|---|---|
    | decision: allowed, or of a list / denied / failed | `decision` | debug / info / warning |
    | invocation: succeeded / ended otherwise | `invocation` | info / warning |
    | invocation that was not admitted | `invocation_refused` | info |
    | batch of the ledger's | `batch` | debug |
    | admission: its invocation's end tells more | none | |

    Written are ids, names of fields' values that this service gave, costs and durations; never a payload, an answer,
    or a message that an agent had a part in.
    """

    def __init__(self) -> None:
        # Bound here: unbound, it would be bound at each event.
        self._log = structlog.stdlib.get_logger(LOGGER_NAME).bind() if structlog.is_configured() else _hosts_logger()

    def __call__(self, record: Record) -> None:
        if isinstance(record, InvocationRecord):
            self._invocation(record)
        elif isinstance(record, DecisionRecord):
            self._decision(record)
        elif isinstance(record, BatchRecord) and self._log.is_enabled_for(logging.DEBUG):
            self._log.debug("batch", **attrs.asdict(record))

    def _decision(self, record: DecisionRecord) -> None:
        unremarkable = not record.errors and (record.allowed or record.filters)
        if unremarkable and not self._log.is_enabled_for(logging.DEBUG):
            return
        write = self._log.warning if record.errors else self._log.debug if unremarkable else self._log.info
        write(
            "decision",
            **_who(record.principal),
            action=record.action.value,
            agent_id=str(record.agent_id) if record.agent_id else None,
            allowed=record.allowed,
            policy_ids=list(record.policy_ids),
            errors=list(record.errors),
        )

    def _invocation(self, record: InvocationRecord) -> None:
        invocation = record.invocation
        if invocation is None:
            self._log.info("invocation_refused", refusal=record.refusal, **_call(record))
            return
        write = self._log.info if invocation.status is InvocationStatus.SUCCEEDED else self._log.warning
        write(
            "invocation",
            **_call(record),
            invocation_id=str(invocation.id),
            status=invocation.status.value,
            error_code=invocation.error_code.value if invocation.error_code else None,
            response_status=invocation.response_status,
            attempts=len(invocation.attempts),
            execution_time_ms=invocation.execution_time_ms,
            cost=invocation.cost.plain_amount if invocation.cost else None,
            currency=invocation.cost.currency if invocation.cost else None,
            cost_overrun=invocation.cost_overrun,
        )


def _hosts_logger() -> structlog.stdlib.BoundLogger:
    """For a host that has not set up structlog, which would print to stdout: its own `logging`, fields as `extra`."""
    logger: structlog.stdlib.BoundLogger = structlog.wrap_logger(
        logging.getLogger(LOGGER_NAME),
        processors=[structlog.stdlib.filter_by_level, structlog.stdlib.render_to_log_kwargs],
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    return logger


def _who(principal: Principal) -> dict[str, Any]:
    return {"org_id": principal.org_id, "subject": principal.subject}


def _call(record: InvocationRecord) -> dict[str, Any]:
    return {**_who(record.principal), "agent_id": str(record.agent_id), "trace_id": record.trace_id}
