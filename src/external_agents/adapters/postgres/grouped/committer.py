"""
Turning what waits into batches, one call of the database at a time.

One call in flight: a second one would only wait for the locks of the first, while it could have taken along what
arrived meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from typing import Any, Generic, TypeVar
from uuid import UUID

import attrs
import psycopg
from psycopg.rows import namedtuple_row
from sqlalchemy.ext.asyncio import AsyncEngine

from external_agents.adapters.postgres.engine import LOCK_TIMEOUT_S, reading
from external_agents.adapters.postgres.errors import (
    concerns_everyone,
    is_conflict,
    leaves_doubt,
    translate_errors,
    translated,
)
from external_agents.adapters.postgres.grouped.arrays import register_arrays
from external_agents.adapters.postgres.grouped.batch import CALL, Admitted, Admitting, Batch, Settling
from external_agents.adapters.postgres.grouped.fair_queue import FairQueue, Lane, QueueFull
from external_agents.domain.errors import AdmissionInDoubt, Unavailable
from external_agents.domain.invocation import ExternalAgentInvocation
from external_agents.ports.ledger import AdmissionRequest
from external_agents.ports.observability import BatchRecord

BATCH_MAX = 128
"""Of each kind."""
BATCH_BYTES_MAX = 4 * 1024 * 1024
WAITING_MAX = 10_000
"""Of each kind."""
WAITING_BYTES_MAX = 128 * 1024 * 1024
LINGER_S = 0.001
LINGER_FROM = 8
"""With so many invocations under way, waiting a moment makes batches larger; with fewer it would only cost time."""
SHARED_LOCK_WAIT_S = 0.5
"""What a batch waits for a lock. Then its agents go on each by itself, so that the one that is held up is alone."""
ALONE_FOR_S = 10.0
"""An agent that was held up stays by itself for so long."""
ALONE_AT_ONCE = 2
PATIENCE_S = 5.0
"""What a caller waits for the database."""

_DATABASE = "The database"
_TOO_MUCH = "The service, which has too much to do,"

_log = logging.getLogger(__name__)

Item = TypeVar("Item", Admitting, Settling)
Observe = Callable[[BatchRecord], None]


class _Line(Generic[Item]):
    """What waits of one kind, bounded in number and bytes."""

    def __init__(self) -> None:
        self._queue: FairQueue[Item] = FairQueue(WAITING_MAX)
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._queue)

    def put(self, item: Item) -> None:
        """
        Raises:
            QueueFull: It was not taken.
        """
        if self._bytes and self._bytes + item.size_bytes > WAITING_BYTES_MAX:
            raise QueueFull
        self._queue.put(item.lane, item)
        self._bytes += item.size_bytes

    def put_back(self, item: Item) -> None:
        self._queue.put_back(item.lane, item)
        self._bytes += item.size_bytes

    def take(self) -> Item | None:
        """The next whose caller still waits."""
        while self._queue:
            item = self._queue.take()
            self._bytes -= item.size_bytes
            if not item.answer.done():
                return item
        return None


@attrs.define(eq=False)
class _Lines:
    """`alone`: of the one agent that they are for; None: of all the others."""

    alone: Lane | None = None
    admittings: _Line[Admitting] = attrs.field(factory=_Line)
    settlings: _Line[Settling] = attrs.field(factory=_Line)
    pumping: bool = False
    batch_max: int = BATCH_MAX

    def __len__(self) -> int:
        return len(self.admittings) + len(self.settlings)

    @property
    def lock_wait(self) -> str:
        return f"{round(1000 * (SHARED_LOCK_WAIT_S if self.alone is None else LOCK_TIMEOUT_S))}ms"

    def put_back(self, items: list[Admitting | Settling]) -> None:
        """First in their order again."""
        for item in reversed(items):
            if isinstance(item, Admitting):
                self.admittings.put_back(item)
            else:
                self.settlings.put_back(item)

    def put(self, item: Admitting | Settling) -> None:
        if isinstance(item, Admitting):
            self.admittings.put(item)
        else:
            self.settlings.put(item)

    def next_batch(self) -> Batch:
        """Settlements first: what has begun shall end."""
        batch = Batch()
        room_bytes = BATCH_BYTES_MAX
        while len(batch.settlings) < self.batch_max and room_bytes > 0 and (settling := self.settlings.take()):
            batch.settlings.append(settling)
            room_bytes -= settling.size_bytes
        left: list[Admitting] = []
        while len(batch.admittings) < self.batch_max and room_bytes > 0 and (admitting := self.admittings.take()):
            if batch.takes(admitting):
                room_bytes -= admitting.size_bytes
            else:
                left.append(admitting)
        self.put_back([*left])
        return batch

    def drop(self, since_s: float | None = None) -> list[Admitting | Settling]:
        """Take out all that has waited since before `since_s`."""
        waiting: list[Admitting | Settling] = [*iter(self.settlings.take, None), *iter(self.admittings.take, None)]
        kept = [item for item in waiting if since_s is not None and item.since_s > since_s]
        for item in kept:
            self.put(item)
        return [item for item in waiting if item not in kept]


class GroupCommitter:
    """
    Tasks of its own carry the batches; they end when nothing waits, so there is nothing to close.

    Args:
        engine: At most three of its connections are used, in ordinary times one.
        in_flight: How many invocations this process has under way.
        doubt: Told of admissions that may have been recorded, although nobody is going to carry them out.
        observe: Told of every batch.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        instance_id: UUID,
        *,
        in_flight: Callable[[], int],
        doubt: Callable[[AdmissionRequest], None],
        observe: Observe,
    ) -> None:
        self._engine = reading(engine)
        self._instance_id = instance_id
        self._in_flight = in_flight
        self._doubt = doubt
        self._observe = observe
        self._shared = _Lines()
        self._alone: dict[Lane, _Lines] = {}
        self._alone_until_s: dict[Lane, float] = {}
        self._alone_slots = asyncio.Semaphore(ALONE_AT_ONCE)
        self._tasks: set[asyncio.Task[None]] = set()

    async def admit(self, request: AdmissionRequest) -> Admitted:
        """
        Raises:
            ExternalAgentsError: As `InvocationLedger.admit` does.
            LeaseLost: A heartbeat has to come first.
        """
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Admitted] = loop.create_future()
        self._put(Admitting(request, answer, loop.time()))
        return await answer

    async def settle(self, finished: ExternalAgentInvocation) -> bool:
        """
        Whether it was running; if not, nothing was changed.

        Raises:
            Unavailable: Whether it was settled is unknown.
        """
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[bool] = loop.create_future()
        self._put(Settling(finished, answer, loop.time()))
        return await answer

    def _put(self, item: Admitting | Settling) -> None:
        lines = self._shared
        if self._alone_until_s:
            lines = self._lines_of(item.lane, item.since_s)
        try:
            lines.put(item)
        except QueueFull:
            raise Unavailable(_TOO_MUCH, retry_after_s=1) from None
        self._start(lines)

    def _lines_of(self, lane: Lane, now_s: float) -> _Lines:
        if lane in self._alone:
            return self._alone[lane]
        if self._alone_until_s.get(lane, 0.0) <= now_s:
            self._alone_until_s.pop(lane, None)
            return self._shared
        return self._alone.setdefault(lane, _Lines(lane))

    def _start(self, lines: _Lines) -> None:
        if lines.pumping:
            return
        lines.pumping = True
        self._spawn(self._pump(lines) if lines.alone is None else self._pump_alone(lines, lines.alone))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    async def _pump_alone(self, lines: _Lines, lane: Lane) -> None:
        async with self._alone_slots:
            await self._pump(lines)
        del self._alone[lane]

    async def _pump(self, lines: _Lines) -> None:
        """Until nothing waits."""
        try:
            while lines:
                try:
                    with translate_errors():
                        async with self._connection() as connection:
                            while lines:
                                await self._step(connection, lines)
                except _Lost:
                    continue
                except Unavailable as outage:
                    _fail(lines.drop(), outage)
        finally:
            lines.pumping = False
            _fail(lines.drop(), Unavailable(_DATABASE))

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
        async with self._engine.connect() as pooled:
            connection: Any = (await pooled.get_raw_connection()).driver_connection
            register_arrays(connection)
            try:
                yield connection
            except BaseException:
                await pooled.invalidate()
                raise

    async def _step(self, connection: psycopg.AsyncConnection[Any], lines: _Lines) -> None:
        if self._in_flight() >= LINGER_FROM:
            await asyncio.sleep(LINGER_S)
        batch = lines.next_batch()
        try:
            if batch:
                await self._carry(connection, batch, lines)
        except BaseException:  # Whatever broke it off, nobody waits for ever.
            self._leave_in_doubt(batch)
            raise

    async def _carry(self, connection: psycopg.AsyncConnection[Any], batch: Batch, lines: _Lines) -> None:
        began_s = time.monotonic()
        call = asyncio.ensure_future(self._call(connection, batch, lines.lock_wait))
        await self._await(call, batch, lines)
        error = call.exception()
        if error is None:
            batch.conclude(call.result())
            self._observe(
                BatchRecord(
                    admissions=len(batch.admittings),
                    settlements=len(batch.settlings),
                    waiting=len(lines),
                    duration_s=time.monotonic() - began_s,
                )
            )
        elif isinstance(error, psycopg.Error) and not leaves_doubt(error):
            self._sort_out(error, batch, lines)
        else:
            raise _Lost from error

    async def _call(self, connection: psycopg.AsyncConnection[Any], batch: Batch, lock_wait: str) -> Any:
        async with connection.cursor(binary=True, row_factory=namedtuple_row) as cursor:
            await cursor.execute(CALL, batch.parameters(self._instance_id, lock_wait), prepare=True)
            return await cursor.fetchone()

    async def _await(self, call: asyncio.Future[Any], batch: Batch, lines: _Lines) -> None:
        """Until the call has ended. Callers who have waited long enough get their answer before."""
        await asyncio.wait({call}, timeout=PATIENCE_S)
        while not call.done():
            self._leave_in_doubt(batch)
            _fail(lines.drop(asyncio.get_running_loop().time() - PATIENCE_S), Unavailable(_DATABASE))
            await asyncio.wait({call}, timeout=1.0)

    def _sort_out(self, error: psycopg.Error, batch: Batch, lines: _Lines) -> None:
        """Nothing of the batch was done. What is at fault fails alone; the others go on without it."""
        items = list(batch.items)
        at_fault = len(items) == 1 or (lines.alone is not None and is_conflict(error))
        if concerns_everyone(error) or (lines.alone is not None and at_fault):
            _fail(items, translated(error) or error)
        elif lines.alone is not None:
            lines.batch_max = 1
            lines.put_back(items)
        else:
            self._part(items)
        if lines.alone is not None:
            self._alone_until_s[lines.alone] = asyncio.get_running_loop().time() + ALONE_FOR_S

    def _part(self, items: list[Admitting | Settling]) -> None:
        """Every agent for itself, for a while."""
        until_s = asyncio.get_running_loop().time() + ALONE_FOR_S
        by_lane: dict[Lane, list[Admitting | Settling]] = {}
        for item in items:
            by_lane.setdefault(item.lane, []).append(item)
        for lane, own in by_lane.items():
            self._alone_until_s[lane] = until_s
            lines = self._alone.setdefault(lane, _Lines(lane))
            lines.put_back(own)
            self._start(lines)

    def _leave_in_doubt(self, batch: Batch) -> None:
        for admitting in batch.admittings:
            if not admitting.answer.done():
                self._doubt(admitting.request)
        _fail(batch.admittings, AdmissionInDoubt(_DATABASE))
        _fail(batch.settlings, Unavailable(_DATABASE))

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            _log.error("group commit broke off", exc_info=error)


class _Lost(Exception):
    """The connection is of no more use."""


def _fail(items: Iterable[Admitting | Settling], error: Exception) -> None:
    for item in items:
        if not item.answer.done():
            item.answer.set_exception(error)
