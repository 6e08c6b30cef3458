"""What a caller says of an invocation beside the agent: judged once the agent may be invoked, before its state."""

from __future__ import annotations

import re
from collections.abc import Iterator
from uuid import UUID

import attrs

from external_agents.domain.access import Principal
from external_agents.domain.agent import AgentStatus, ExternalAgent
from external_agents.domain.errors import AgentInactive, Fault, ValidationError
from external_agents.domain.idempotency import KEY_LENGTH_MAX
from external_agents.domain.invocation import TRACE_ID_PATTERN
from external_agents.domain.json_values import JsonText, JsonValue, judged_value
from external_agents.ports.ledger import AdmissionRequest

LINEAGE_HOP_ID_MAX = 200

_TRACE_ID = re.compile(TRACE_ID_PATTERN)


@attrs.frozen(kw_only=True)
class InvocationRequest:
    """A payload, and what comes with it."""

    payload: JsonValue | JsonText
    trace_id: str
    lineage_hop_id: str | None
    idempotency_key: str | None

    def admission_of(self, agent: ExternalAgent, principal: Principal, invocation_id: UUID) -> AdmissionRequest:
        """
        What the ledger is asked for.

        Raises:
            ValidationError: Every fault of what comes with the payload; or the payload is no JSON value.
            AgentInactive: The agent is switched off.
        """
        if faults := [*self._faults()]:
            raise ValidationError(faults)
        payload = self.payload if isinstance(self.payload, JsonText) else JsonText.of(self.payload)
        if agent.status is AgentStatus.INACTIVE:
            raise AgentInactive
        return AdmissionRequest(
            invocation_id=invocation_id,
            agent=agent,
            initiated_by=principal.subject,
            request=payload,
            trace_id=self.trace_id,
            lineage_hop_id=self.lineage_hop_id,
            idempotency_key=self.idempotency_key,
        )

    def _faults(self) -> Iterator[Fault]:
        yield from _text_faults("lineage_hop_id", self.lineage_hop_id, LINEAGE_HOP_ID_MAX)
        yield from _text_faults("idempotency_key", self.idempotency_key, KEY_LENGTH_MAX)
        if not _TRACE_ID.fullmatch(self.trace_id):
            yield Fault("trace_id", "must be 32 lower-case hex digits, not all zero")


def _text_faults(name: str, text: str | None, length_max: int) -> Iterator[Fault]:
    if text is None:
        return
    if not 1 <= len(text) <= length_max:
        yield Fault(name, f"must have 1 to {length_max} characters")
    yield from judged_value(text, name)[1]
