"""Several observers in the place of one."""

from __future__ import annotations

from external_agents.application.access import Witness
from external_agents.ports.observability import ObservabilityManager, Record


class FanOut(ObservabilityManager):
    """Hands every record to each of several, in order; what one of them raises is logged, and the next goes on."""

    def __init__(self, *managers: ObservabilityManager) -> None:
        self._witnesses = [Witness(manager) for manager in managers]

    def __call__(self, record: Record) -> None:
        for witness in self._witnesses:
            witness(record)
