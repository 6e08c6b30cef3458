"""Fakes for the clock, the source of ids, and other people's services."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from datetime import UTC, datetime, timedelta
from typing import TypeAlias
from uuid import UUID

from external_agents.domain.ids import first_id_at
from external_agents.domain.invocation import Outcome
from external_agents.ports.observability import (
    AdmissionRecord,
    DecisionRecord,
    InvocationRecord,
    ObservabilityManager,
    Record,
)
from external_agents.ports.system import Clock, IdSource
from external_agents.ports.transport import AgentRequest, AgentTransport
from external_agents.testing.builders import answered


class FakeClock(Clock):
    """Stands still until it is advanced; a sleep advances it at once, by what was slept for."""

    def __init__(self, start: datetime = datetime(2026, 3, 10, 12, tzinfo=UTC)) -> None:
        self._start = start
        self._elapsed_s = 0.0
        self.slept_s: list[float] = []

    def now(self) -> datetime:
        return self._start + timedelta(seconds=self._elapsed_s)

    def monotonic_s(self) -> float:
        return self._elapsed_s

    async def sleep(self, seconds: float) -> None:
        self.slept_s.append(seconds)
        self.advance(seconds)
        await asyncio.sleep(0)

    def advance(self, seconds: float) -> None:
        self._elapsed_s += max(0.0, seconds)


class SequentialIds(IdSource):
    """Ids in the order in which they are asked for, at the clock's time; `jitter` as it is set."""

    def __init__(self, clock: Clock, jitter: float = 0.5) -> None:
        self._clock = clock
        self._issued = 0
        self.jitter_value = jitter

    def new_id(self) -> UUID:
        self._issued += 1
        return UUID(int=first_id_at(self._clock.now()).int + self._issued)

    def new_trace_id(self) -> str:
        self._issued += 1
        return f"{self._issued:032x}"

    def jitter(self) -> float:
        return self.jitter_value


Behaviour: TypeAlias = Callable[[AgentRequest], Awaitable[Outcome]]
Step: TypeAlias = Outcome | Behaviour
"""What an exchange comes to: at once, or by whatever the behaviour does."""


class ScriptedTransport(AgentTransport):
    """Plays its script, one step an exchange, and after it `otherwise`; keeps the requests."""

    def __init__(self, script: Iterable[Step] = (), *, otherwise: Step | None = None) -> None:
        self.script = deque(script)
        self.otherwise: Step = otherwise or answered()
        self.requests: list[AgentRequest] = []

    async def exchange(self, request: AgentRequest) -> Outcome:
        self.requests.append(request)
        step = self.script.popleft() if self.script else self.otherwise
        return step if isinstance(step, Outcome) else await step(request)


class Gate:
    """A behaviour that keeps an exchange open until the test lets it end."""

    def __init__(self, outcome: Outcome | None = None) -> None:
        self.entered = asyncio.Event()
        self.opened = asyncio.Event()
        self.outcome = outcome or answered()

    async def __call__(self, request: AgentRequest) -> Outcome:
        self.entered.set()
        await self.opened.wait()
        return self.outcome


def taking(clock: FakeClock, seconds: float, outcome: Outcome) -> Behaviour:
    """A behaviour during which the clock advances."""

    async def behave(request: AgentRequest) -> Outcome:
        clock.advance(seconds)
        return outcome

    return behave


class RecordingObservability(ObservabilityManager):
    """Keeps every record."""

    def __init__(self) -> None:
        self.records: list[Record] = []

    def __call__(self, record: Record) -> None:
        self.records.append(record)

    @property
    def decisions(self) -> list[DecisionRecord]:
        return [record for record in self.records if isinstance(record, DecisionRecord)]

    @property
    def admissions(self) -> list[AdmissionRecord]:
        return [record for record in self.records if isinstance(record, AdmissionRecord)]

    @property
    def invocations(self) -> list[InvocationRecord]:
        return [record for record in self.records if isinstance(record, InvocationRecord)]
