"""Records in memory."""

from __future__ import annotations

from collections import deque

from external_agents.ports.observability import ObservabilityManager, Record

RECORDS_MAX = 10_000


class MemoryObservability(ObservabilityManager):
    """Keeps the latest records, payloads and answers included."""

    def __init__(self, records_max: int = RECORDS_MAX) -> None:
        self.records: deque[Record] = deque(maxlen=records_max)

    def __call__(self, record: Record) -> None:
        self.records.append(record)
