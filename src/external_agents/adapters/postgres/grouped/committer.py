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
from contextvars import Context
from typing import Any, TypeAlias
from uuid import UUID

import attrs
import psycopg
from psycopg.rows import args_row
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.util import greenlet_spawn

from external_agents.adapters.postgres.engine import is_open, reading
from external_agents.adapters.postgres.errors import (
    concerns_everyone,
    is_conflict,
    leaves_doubt,
    translate_errors,
    translated,
)
from external_agents.adapters.postgres.grouped.apart import Apart, Lone
from external_agents.adapters.postgres.grouped.arrays import register_arrays
from external_agents.adapters.postgres.grouped.batch import CALL, Admitted, Admitting, Batch, Outcome, Settling
from external_agents.adapters.postgres.grouped.fair_queue import QueueFull
from external_agents.adapters.postgres.grouped.lines import Lines
from external_agents.application.gathering import gather_newcomers
from external_agents.domain.errors import AdmissionInDoubt, Unavailable
from external_agents.domain.invocation import ExternalAgentInvocation
from external_agents.ports.ledger import AdmissionRequest
from external_agents.ports.observability import BatchRecord

SHARED_LOCK_WAIT_S = 0.5
"""What a batch waits for a lock. Then its agents go on each by itself, so that the one that is held up is alone."""
APART_AT_ONCE = 2
PATIENCE_S = 4.0
"""What a caller waits for the database."""
OVERDUE_EVERY_S = 0.25
CALLS_HELD_MAX = 32
"""After so many calls a connection goes back to the pool for a moment, where other shards' queues may wait for it."""

TASK_NAME = "external-agents group commit"
HELD_IDLE_S = 0.02
"""A connection is kept for so long when nothing waits: to take one from the pool costs as much as a call."""

_DATABASE = "The database"
_TOO_MUCH = "The service, which has too much to do,"

_log = logging.getLogger(__name__)

Observe = Callable[[BatchRecord], None]

_Cursor: TypeAlias = psycopg.AsyncCursor[Outcome]

register_arrays(psycopg.adapters)


@attrs.define(eq=False)
class _Side:
    """Those who share batches, or those who go apart; and the tasks that carry theirs."""

    waiting: Lines | Apart
    pumps_max: int
    pumps: int = 0
    arrival: asyncio.Future[None] | None = None

    def wake(self) -> None:
        if self.arrival is not None and not self.arrival.done():
            self.arrival.set_result(None)

    async def has_more(self, hold_s: float) -> bool:
        """Whether something waits, or comes within so long."""
        if not self.waiting and hold_s:
            loop = asyncio.get_running_loop()
            self.arrival = loop.create_future()
            timer = loop.call_later(hold_s, self.wake)
            try:
                await self.arrival
            finally:
                timer.cancel()
                self.arrival = None
        return bool(self.waiting)


@attrs.define(eq=False)
class _Turn:
    """A batch; `lone`: of that one agent, which goes by itself."""

    batch: Batch
    lone: Lone | None = None

    @property
    def lock_wait(self) -> str:
        return f"{round(1000 * (self.lone.lock_wait_s if self.lone else SHARED_LOCK_WAIT_S))}ms"


class GroupCommitter:
    """
    Tasks of its own carry the batches; they end soon after nothing waits. `end` is for who cannot wait so long.

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
        self._shared = Lines()
        self._apart = Apart()
        self._together, self._alone = self._sides = _Side(self._shared, 1), _Side(self._apart, APART_AT_ONCE)
        self._tasks: set[asyncio.Task[None]] = set()
        event.listen(engine.sync_engine, "engine_disposed", lambda _: self._let_go())

    async def admit(self, request: AdmissionRequest) -> Admitted:
        """
        Raises:
            ExternalAgentsError: As `InvocationLedger.admit` does.
            LeaseLost: A heartbeat has to come first.
        """
        admitted: Admitted = await self._put(Admitting(request, asyncio.get_running_loop().create_future(), _now_s()))
        return admitted

    async def settle(self, finished: ExternalAgentInvocation) -> bool:
        """
        Whether it was running; if not, nothing was changed.

        Raises:
            Unavailable: Whether it was settled is unknown.
        """
        settled: bool = await self._put(Settling(finished, asyncio.get_running_loop().create_future(), _now_s()))
        return settled

    async def end(self) -> None:
        """When nobody asks any more: the connections lie in the pool again, and those that hang are cut."""
        self._let_go()
        if self._tasks:
            _, hanging = await asyncio.wait(self._tasks, timeout=PATIENCE_S)
            for task in hanging:
                task.cancel()
            await asyncio.gather(*hanging, return_exceptions=True)

    def _put(self, item: Admitting | Settling) -> asyncio.Future[Any]:
        """
        The answer, to be awaited and not to be kept: it holds what it raises, which holds the frame that awaits it, and
        a variable there would close a circle that only the garbage collector finds.
        """
        lone = self._apart.of(item.lane, item.since_s)
        try:
            (lone.lines if lone else self._shared).put(item)
        except QueueFull:
            raise Unavailable(_TOO_MUCH, retry_after_s=1) from None
        if lone:
            self._apart.await_turn(lone)
        self._start(self._alone if lone else self._together)
        return item.answer

    def _start_all(self) -> None:
        for side in self._sides:
            if side.waiting:
                self._start(side)

    def _start(self, side: _Side) -> None:
        side.wake()
        if side.pumps < side.pumps_max:
            side.pumps += 1
            self._spawn(self._pump(side))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        # In no caller's context: what it says and does is of everybody's.
        task = asyncio.create_task(work, context=Context(), name=TASK_NAME)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    async def _pump(self, side: _Side) -> None:
        """Until nothing waits."""
        waiting = side.waiting
        try:
            while waiting:
                try:
                    with translate_errors():
                        async with self._cursor() as cursor:
                            for _ in range(CALLS_HELD_MAX):
                                if not await side.has_more(HELD_IDLE_S if side is self._together else 0.0):
                                    break
                                if not is_open(cursor.connection):
                                    raise _Lost
                                await self._step(cursor, waiting)
                except _Lost:
                    continue
                except Unavailable as outage:
                    _fail(waiting.remove(), outage)
                await asyncio.sleep(0)
        finally:
            side.pumps -= 1
            if not side.pumps:
                _fail(waiting.remove(), Unavailable(_DATABASE))

    @asynccontextmanager
    async def _cursor(self) -> AsyncIterator[_Cursor]:
        """One for many calls: to make it and to learn what its rows mean takes a fifth of what a call costs here."""
        pool = self._engine.sync_engine.pool
        pooled = await self._engine.connect()
        try:
            connection: Any = (await pooled.get_raw_connection()).driver_connection
            async with connection.cursor(binary=True, row_factory=args_row(Outcome)) as cursor:
                yield cursor
        except BaseException:
            await pooled.invalidate()
            raise
        finally:
            # `async with` would do so in a task of its own, before which the engine can be disposed of.
            await pooled.close()
            if self._engine.sync_engine.pool is not pool:
                await greenlet_spawn(pool.dispose)  # Which was done before this connection lay in it again.

    def _let_go(self) -> None:
        """What is held while nothing waits goes to the pool; one whose engine was disposed of closes it then."""
        for side in self._sides:
            side.wake()

    async def _step(self, cursor: _Cursor, waiting: Lines | Apart) -> None:
        if isinstance(waiting, Apart):
            lone = waiting.next_turn()
            turn = _Turn(lone.lines.next_batch(lone.batch_max), lone)
        else:
            await gather_newcomers(self._shared.__len__, others=self._in_flight() - 1, enough=self._shared.enough)
            turn = _Turn(waiting.next_batch())
        try:
            if turn.batch:
                await self._carry(cursor, turn, waiting)
        except BaseException:  # Whatever broke it off, nobody waits for ever.
            self._leave_in_doubt(turn.batch)
            raise
        finally:
            if turn.lone:
                self._apart.end_turn(turn.lone)

    async def _carry(self, cursor: _Cursor, turn: _Turn, waiting: Lines | Apart) -> None:
        batch = turn.batch
        left = len(turn.lone.lines if turn.lone else self._shared)
        try:
            parameters = batch.parameters(self._instance_id, turn.lock_wait)
        except Exception as unfit:  # Some value has no form that the database would take; nothing was sent.
            self._sort_out(unfit, turn)
            return
        began_s = time.monotonic()
        patience = _Patience(lambda: self._answer_overdue(batch, waiting))
        outcome, error = None, None
        try:
            await cursor.execute(CALL, parameters, prepare=True)
            outcome = await cursor.fetchone()
        except Exception as failure:
            error = failure
        finally:
            patience.end()
        if patience.has_ended:
            # What nobody waits for any more is certain to be found from now on.
            for admitting in batch.admittings:
                self._doubt(admitting.request)
        if outcome is not None:
            batch.conclude(outcome)
            if turn.lone:
                self._shared.put_back(self._apart.went_well(turn.lone, _now_s()))
                self._start_all()
            self._tell(batch, left, time.monotonic() - began_s)
        elif isinstance(error, psycopg.Error) and not leaves_doubt(error):
            self._sort_out(error, turn)
        else:
            raise _Lost from error

    def _answer_overdue(self, batch: Batch, waiting: Lines | Apart) -> None:
        """Callers who have waited long enough get their answer before the call has ended."""
        self._leave_in_doubt(batch)
        _fail(waiting.remove(before_s=_now_s() - PATIENCE_S), Unavailable(_DATABASE))

    def _tell(self, batch: Batch, waiting: int, duration_s: float) -> None:
        try:
            self._observe(
                BatchRecord(
                    admissions=len(batch.admittings),
                    settlements=len(batch.settlings),
                    waiting=waiting,
                    duration_s=duration_s,
                )
            )
        except Exception:
            _log.exception("a batch could not be told")

    def _sort_out(self, error: Exception, turn: _Turn) -> None:
        """Nothing of the batch was done. What is at fault fails alone; the others go on without it."""
        now_s = _now_s()
        items = list(turn.batch.items)
        held_up = is_conflict(error)
        if concerns_everyone(error):
            _fail(items, translated(error) or error)
            return
        if turn.lone is None:
            self._apart.part(items, now_s)
            self._start_all()
            return
        self._apart.was_at_fault(turn.lone, now_s, held_up=held_up)
        if len(items) == 1 and not held_up:
            _fail(items, translated(error) or error)
            items = []
        # With all that waits of it, so that the next batch of the others goes without it.
        turn.lone.lines.put_back([*items, *self._shared.remove(turn.lone.lane)])
        if held_up:
            late_s = now_s - PATIENCE_S
            _fail([*turn.lone.lines.remove(before_s=late_s), *self._apart.remove(late_s)], Unavailable(_DATABASE))

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


class _Patience:
    """Runs out after PATIENCE_S, and then every OVERDUE_EVERY_S, until it is ended."""

    def __init__(self, run_out: Callable[[], None]) -> None:
        self.has_ended = False
        self._run_out = run_out
        self._timer = asyncio.get_running_loop().call_later(PATIENCE_S, self._ran_out)

    def end(self) -> None:
        self._timer.cancel()

    def _ran_out(self) -> None:
        self.has_ended = True
        self._timer = asyncio.get_running_loop().call_later(OVERDUE_EVERY_S, self._ran_out)
        self._run_out()


class _Lost(Exception):
    """The connection is of no more use."""


def _fail(items: Iterable[Admitting | Settling], error: Exception) -> None:
    for item in items:
        if not item.answer.done():
            item.answer.set_exception(error)
            item.answer.exception()  # Marks it as seen: its caller may be on the way out.


def _now_s() -> float:
    return asyncio.get_running_loop().time()
