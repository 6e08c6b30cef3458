"""What a running process does in the background: prove that it lives, and end what dead ones left behind."""

from __future__ import annotations

import logging

from external_agents.application.access import Witness
from external_agents.domain.errors import Unavailable
from external_agents.ports.ledger import HEARTBEAT_S, InvocationLedger
from external_agents.ports.observability import ObservabilityManager, RecoveryRecord
from external_agents.ports.system import Clock

_log = logging.getLogger(__name__)


async def keep_up(
    ledger: InvocationLedger,
    clock: Clock,
    every_s: float = HEARTBEAT_S,
    *,
    observe: ObservabilityManager | None = None,
) -> None:
    """Heartbeat and recovery every `every_s` seconds, until cancelled; `observe` is told of what was recovered."""
    witness = Witness(observe) if observe else None
    while True:
        try:
            await ledger.heartbeat()
            if recovered := await ledger.recover():
                _log.warning("%d interrupted invocations ended as unknown", recovered)
                if witness:
                    witness(RecoveryRecord(at=clock.now(), interrupted=recovered))
        except Unavailable as outage:
            _log.warning("heartbeat and recovery wait: %s", outage)
        await clock.sleep(every_s)
