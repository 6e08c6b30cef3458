"""The invocation pipeline: admitted, owned by a task of its own, attempted, settled, told."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Coroutine
from datetime import datetime
from typing import Any
from uuid import UUID

import attrs

from external_agents.application.access import Witness
from external_agents.application.registration import Opened
from external_agents.domain.access import Principal
from external_agents.domain.agent import ExternalAgent
from external_agents.domain.errors import ExternalAgentsError, NotFound, StaleVersion, Unavailable
from external_agents.domain.invocation import Attempt, ExternalAgentInvocation, Outcome
from external_agents.domain.rate_limit import RateQuotas
from external_agents.domain.retry import attempt_timeout_s, next_delay_s
from external_agents.domain.signing import SigningSecrets
from external_agents.ports.ledger import AdmissionRequest, InvocationLedger
from external_agents.ports.observability import REPLAYED, AdmissionRecord, InvocationRecord
from external_agents.ports.system import Clock, IdSource
from external_agents.ports.transport import AgentRequest, AgentTransport

SETTLE_PATIENCE_S = 5.0
"""How long a caller waits for a settlement that fails or hangs; the settlement itself is tried until it is stored."""

_log = logging.getLogger(__name__)


class TaskKeeper:
    """Tasks that belong to the process, not to a request: a caller who goes away cancels none of them."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    async def drain(self, timeout_s: float) -> int:
        """Wait for all of them, at most `timeout_s`. Returns how many were left running."""
        if not self._tasks:
            return 0
        _, left = await asyncio.wait(set(self._tasks), timeout=timeout_s)
        return len(left)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            _log.error("an invocation's task failed; recovery ends the invocation after this process", exc_info=error)


@attrs.frozen
class Invoked:
    """
    An invocation as it ended, and what is left of the agent's limits.

    Attributes:
        quotas: As they stood at the admission.
        replayed: It had ended before, and is the answer to another request with its idempotency key; then `quotas` are
            those of now.
    """

    invocation: ExternalAgentInvocation
    quotas: RateQuotas
    replayed: bool = False


@attrs.frozen(kw_only=True)
class Assignment:
    """What is to be invoked: the agent as it was decided on, its secrets, what the ledger is asked for."""

    principal: Principal
    agent: ExternalAgent
    secrets: Opened
    request: AdmissionRequest


class InvocationPipeline:
    """Carries out invocations, from their admission to their record."""

    def __init__(
        self,
        *,
        ledger: InvocationLedger,
        transport: AgentTransport,
        clock: Clock,
        ids: IdSource,
        witness: Witness,
        tasks: TaskKeeper,
        settle_patience_s: float = SETTLE_PATIENCE_S,
    ) -> None:
        self._ledger = ledger
        self._transport = transport
        self._clock = clock
        self._ids = ids
        self._witness = witness
        self._tasks = tasks
        self._patience = _Patience(settle_patience_s)

    async def carry_out(self, assignment: Assignment) -> Invoked:
        """
        Admit and invoke. Cancelling this call cancels neither: an admission whose answer nobody takes would never end.

        Raises:
            AgentNotFound, StaleVersion, AgentInactive, IdempotencyKeyReused, IdempotencyKeyInFlight, RateLimited,
            BudgetExceeded: As `InvocationLedger.admit` does.
            Unavailable: It was not admitted; or, with `invocation_id`, it has ended and that could not be stored yet.
        """
        return await self._begin(assignment)

    def tell_refusal(self, principal: Principal, agent_id: UUID, trace_id: str, refusal: str) -> None:
        """Leave a record of what stands against an admission."""
        self._witness(
            InvocationRecord(
                at=self._clock.now(), principal=principal, agent_id=agent_id, trace_id=trace_id, refusal=refusal
            )
        )

    def _begin(self, assignment: Assignment) -> asyncio.Future[Invoked]:
        """
        The answer, to be awaited and not to be kept: it holds what it raises, which holds the frame that awaits it, and
        a variable there would close a circle that only the garbage collector finds.
        """
        answer: asyncio.Future[Invoked] = asyncio.get_running_loop().create_future()
        self._tasks.start(self._run(assignment, answer))
        return answer

    async def _run(self, assignment: Assignment, answer: asyncio.Future[Invoked]) -> None:
        try:
            await self._invoke(assignment, answer)
        finally:
            _answer(answer, Unavailable("The service"))  # Whatever broke it off, nobody waits for ever.

    async def _invoke(self, assignment: Assignment, answer: asyncio.Future[Invoked]) -> None:
        try:
            admission = await self._ledger.admit(assignment.request)
        except ExternalAgentsError as refusal:
            if not isinstance(refusal, StaleVersion | NotFound):  # It is decided on anew; it is none.
                self._tell_refusal(assignment, type(refusal).__name__)
            _answer(answer, refusal)
            del answer  # Or the refusal, which holds this frame, would hold itself.
            return
        if admission.replayed:
            self._tell_refusal(assignment, REPLAYED)
            _answer(answer, Invoked(admission.invocation, admission.quotas, replayed=True))
            return
        self._witness(
            AdmissionRecord(at=self._clock.now(), principal=assignment.principal, invocation=admission.invocation)
        )
        try:
            finished = await self._attempt(assignment, admission.invocation)
        except Exception:
            _log.exception("invocation %s broke off; what its agent did is unknown", admission.invocation.id)
            finished = admission.invocation.interrupted(self._clock.now())
        stored = await self._settle(admission.invocation, finished, answer)
        self._witness(
            InvocationRecord(
                at=self._clock.now(),
                principal=assignment.principal,
                agent_id=assignment.agent.id,
                trace_id=stored.trace_id,
                invocation=stored,
            )
        )
        _answer(answer, Invoked(stored, admission.quotas))

    async def _attempt(self, assignment: Assignment, invocation: ExternalAgentInvocation) -> ExternalAgentInvocation:
        agent = assignment.agent
        started_s = self._clock.monotonic_s()
        elapsed_s = 0.0
        outcome: Outcome | None = None
        attempts: tuple[Attempt, ...] = ()
        may_have_run = False
        delay_s: float | None = 0.0
        while delay_s is not None:
            if attempts:
                await self._clock.sleep(delay_s)
            if not self._ledger.holds_lease():
                _log.warning("invocation %s is not sent: others may have taken this process for dead", invocation.id)
                break
            outcome, attempt = await self._exchange(assignment, invocation, self._clock.monotonic_s() - started_s)
            attempts += (attempt,)
            may_have_run |= outcome.may_have_run
            elapsed_s = self._clock.monotonic_s() - started_s
            delay_s = next_delay_s(
                outcome,
                attempt=len(attempts),
                max_attempts=agent.max_attempts,
                elapsed_s=elapsed_s,
                jitter=self._ids.jitter(),
            )
        if outcome is None:
            return invocation.interrupted(self._clock.now())
        return invocation.concluded(
            outcome,
            attempts,
            currency=agent.budget.currency,
            charged_anyway=may_have_run,
            execution_time_ms=round(elapsed_s * 1000),
            at=self._clock.now(),
        )

    async def _exchange(
        self, assignment: Assignment, invocation: ExternalAgentInvocation, elapsed_s: float
    ) -> tuple[Outcome, Attempt]:
        agent = assignment.agent
        at, began_s = self._clock.now(), self._clock.monotonic_s()
        outcome = await self._transport.exchange(
            AgentRequest(
                org_id=agent.org_id,
                agent_id=agent.id,
                url=agent.webhook_url,
                body=invocation.request,
                headers=_headers(assignment.secrets.signing, invocation, at),
                credentials=assignment.secrets.credentials,
                timeout_s=attempt_timeout_s(agent.timeout_s, elapsed_s),
            )
        )
        return outcome, Attempt.of(outcome, at, round((self._clock.monotonic_s() - began_s) * 1000))

    def _tell_refusal(self, assignment: Assignment, refusal: str) -> None:
        self.tell_refusal(assignment.principal, assignment.agent.id, assignment.request.trace_id, refusal)

    async def _settle(
        self, running: ExternalAgentInvocation, finished: ExternalAgentInvocation, answer: asyncio.Future[Invoked]
    ) -> ExternalAgentInvocation:
        # Beside it, because a settlement may hang as well as fail.
        caller = self._patience.begin(answer, finished.id)
        pause_s = 0.1
        try:
            while True:
                try:
                    return await self._ledger.settle(finished)
                except Unavailable as outage:
                    _log.warning("settling invocation %s waits: %s", finished.id, outage)
                except Exception:
                    # What the ledger cannot take must not stay running for as long as this process lives.
                    _log.exception("invocation %s could not be settled; what it came to is lost", finished.id)
                    finished = running.interrupted(self._clock.now())
                await self._clock.sleep(pause_s)
                pause_s = min(2.0, pause_s * 2)
        finally:
            caller.answer = None


@attrs.define(eq=False)
class _Caller:
    """Who waits for an invocation to be settled; `answer`: None once it is."""

    answer: asyncio.Future[Invoked] | None
    invocation_id: UUID
    until_s: float


class _Patience:
    """
    Answers callers who have waited for so long.

    All wait equally long, so that the first to begin is the first to be answered, and one timer serves all.
    """

    def __init__(self, wait_s: float) -> None:
        self._wait_s = wait_s
        self._callers: deque[_Caller] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None

    def begin(self, answer: asyncio.Future[Invoked], invocation_id: UUID) -> _Caller:
        loop = asyncio.get_running_loop()
        caller = _Caller(answer, invocation_id, loop.time() + self._wait_s)
        if self._loop is not loop:  # The first, or the loop before has ended with all its callers.
            self._loop = loop
            self._callers.clear()
            loop.call_at(caller.until_s, self._run_out, loop)
        self._callers.append(caller)
        return caller

    def _run_out(self, loop: asyncio.AbstractEventLoop) -> None:
        callers, now_s = self._callers, loop.time()
        while callers and (callers[0].answer is None or callers[0].until_s <= now_s):
            caller = callers.popleft()
            if caller.answer is not None:
                _answer(caller.answer, Unavailable("The ledger", invocation_id=caller.invocation_id))
        if callers:
            loop.call_at(callers[0].until_s, self._run_out, loop)
        else:
            self._loop = None


def _answer(future: asyncio.Future[Invoked], result: Invoked | Exception) -> None:
    """Whoever waited may have gone, or have been answered before."""
    if future.done():
        return
    if isinstance(result, Exception):
        future.set_exception(result)
        future.exception()  # Marks it as seen: nobody may be waiting.
    else:
        future.set_result(result)


def _headers(signing: SigningSecrets | None, invocation: ExternalAgentInvocation, sent_at: datetime) -> dict[str, str]:
    """Of one attempt: by its id the agent knows the invocation again, and by the time how fresh the attempt is."""
    headers = {"Idempotency-Key": str(invocation.id), "traceparent": _traceparent(invocation)}
    if signing is None:
        return headers
    return {**headers, **signing.headers(str(invocation.id), invocation.request.text.encode(), sent_at)}


def _traceparent(invocation: ExternalAgentInvocation) -> str:
    """W3C Trace Context, version 00, sampled; the span is named after the random half of the invocation's id."""
    return f"00-{invocation.trace_id}-{invocation.id.int & 0xFFFFFFFFFFFFFFFF:016x}-01"
