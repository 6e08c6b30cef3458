"""What becomes of an invocation: attempts, their times, what is charged, who may go away, what is down meanwhile."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Awaitable, Callable
from contextlib import suppress
from decimal import Decimal
from typing import Any

import attrs
import pytest

from external_agents import (
    AgentInactive,
    AgentNotFound,
    BudgetExceeded,
    ErrorCode,
    ExternalAgent,
    ExternalAgentInvocation,
    ExternalAgentsError,
    ExternalAgentService,
    InvocationStatus,
    JsonText,
    Money,
    Outcome,
    Principal,
    RateLimited,
    Unavailable,
    ValidationError,
)
from external_agents.adapters.memory import FunctionTransport, MemoryLedger, MemoryStore, memory_service
from external_agents.application.access import Witness
from external_agents.application.invocation import SETTLE_PATIENCE_S, Assignment, InvocationPipeline, TaskKeeper
from external_agents.application.registration import Opened
from external_agents.application.upkeep import keep_up
from external_agents.domain.auth import FixedHeaders
from external_agents.domain.budget import BudgetAccount
from external_agents.domain.errors import AdmissionInDoubt
from external_agents.domain.ids import created_at_of
from external_agents.domain.rate_limit import RateQuotas
from external_agents.domain.refusals import IdempotencyKeyInFlight, IdempotencyKeyReused
from external_agents.ports.ledger import HEARTBEAT_S, LEASE_S, Admission, AdmissionRequest
from external_agents.ports.observability import Record, RecoveryRecord
from external_agents.ports.transport import AgentRequest
from external_agents.testing.builders import (
    ALL_PERMISSIONS,
    answered,
    costing,
    make_agent,
    make_request,
    refused,
    timed_out,
)
from external_agents.testing.fakes import (
    FakeClock,
    Gate,
    RecordingObservability,
    ScriptedTransport,
    SequentialIds,
    Step,
    taking,
)
from garbage import garbage

ALICE = Principal("acme", "alice", ALL_PERMISSIONS)


class FaultyLedger(MemoryLedger):
    """Awaits a hook around the real operations: an outage, a change by someone else, a slow commit."""

    def __init__(self, store: MemoryStore, clock: FakeClock) -> None:
        super().__init__(store, clock)
        self.before_admit: Callable[[], Awaitable[None]] = _nothing
        self.after_admit: Callable[[], Awaitable[None]] = _nothing
        self.before_settle: Callable[[], Awaitable[None]] = _nothing
        self.after_settle: Callable[[], Awaitable[None]] = _nothing

    async def admit(self, request: AdmissionRequest) -> Admission:
        await self.before_admit()
        admission = await super().admit(request)
        await self.after_admit()
        return admission

    async def settle(self, finished: ExternalAgentInvocation) -> ExternalAgentInvocation:
        await self.before_settle()
        stored = await super().settle(finished)
        await self.after_settle()
        return stored


async def _nothing() -> None:
    pass


@attrs.frozen
class World:
    clock: FakeClock
    ids: SequentialIds
    store: MemoryStore
    ledger: FaultyLedger
    transport: ScriptedTransport
    observability: RecordingObservability
    service: ExternalAgentService

    async def agent(self, **changes: Any) -> ExternalAgent:
        document = {
            "name": "Research",
            "provider": "custom",
            "webhook_url": "https://agent.example.com/hook",
            "auth_type": "none",
            **changes,
        }
        return await self.service.create_agent(ALICE, document)

    async def invoked(self, agent: ExternalAgent, *steps: Step) -> ExternalAgentInvocation:
        self.transport.script.extend(steps)
        invocation = await self.service.invoke_agent(ALICE, agent.id, {"input": "hello"})
        assert await self.service.get_invocation(ALICE, agent.id, invocation.id) == invocation
        return invocation

    def pipeline(self, tasks: TaskKeeper, **options: Any) -> InvocationPipeline:
        """The service's own, by itself."""
        return InvocationPipeline(
            ledger=self.ledger,
            transport=self.transport,
            clock=self.clock,
            ids=self.ids,
            witness=Witness(self.observability),
            tasks=tasks,
            **options,
        )

    def assignment(self, agent: ExternalAgent) -> Assignment:
        request = make_request(agent, invocation_id=self.ids.new_id())
        secrets = Opened(credentials=FixedHeaders({}), signing=None)
        return Assignment(principal=ALICE, agent=agent, secrets=secrets, request=request)

    async def account(self, agent: ExternalAgent) -> BudgetAccount:
        return (await self.ledger.forecast(agent.org_id, agent.id)).account


@pytest.fixture
def world() -> World:
    clock, store = FakeClock(), MemoryStore()
    ids, ledger = SequentialIds(clock), FaultyLedger(store, clock)
    transport, observability = ScriptedTransport(), RecordingObservability()
    service = memory_service(transport, store=store, ledger=ledger, clock=clock, ids=ids, observability=observability)
    return World(clock, ids, store, ledger, transport, observability, service)


CONNECTION_FAILED = Outcome(error=ErrorCode.CONNECTION_FAILED)


class TestRequest:
    async def test_what_the_agent_receives(self, world: World) -> None:
        agent = await world.agent(auth_type="bearer", auth_config={"token": "t"}, timeout_s=12)
        body = JsonText('{ "big": 12345678901234567890123, "twice":1,"twice":2 }')
        trace_id = "0af7651916cd43dd8448eb211c80319c"
        invocation = await world.service.invoke_agent(ALICE, agent.id, body, trace_id=trace_id, lineage_hop_id="hop")
        [request] = world.transport.requests
        assert (request.org_id, request.agent_id, request.url) == ("acme", agent.id, agent.webhook_url)
        assert request.body == body == invocation.request
        assert request.timeout_s == 12
        assert request.headers["Idempotency-Key"] == str(invocation.id)
        version, trace, span, flags = request.headers["traceparent"].split("-")
        assert (version, trace, flags, len(span)) == ("00", trace_id, "01", 16)
        assert int(span, 16) > 0
        assert (invocation.trace_id, invocation.lineage_hop_id) == (trace_id, "hop")
        assert invocation.created_at == created_at_of(invocation.id)

    async def test_every_attempt_carries_the_same_key(self, world: World) -> None:
        await world.invoked(await world.agent(), refused(), CONNECTION_FAILED)
        assert len({request.headers["Idempotency-Key"] for request in world.transport.requests}) == 1
        assert len(world.transport.requests) == 3

    @pytest.mark.parametrize(
        "payload", [None, True, 0, 12345678901234567890123, 0.5, "", "\0\ud800ü", [], {}, {"a": [None, {"b": 1e300}]}]
    )
    async def test_any_json_value_is_a_payload(self, world: World, payload: object) -> None:
        agent = await world.agent()
        invocation = await world.service.invoke_agent(ALICE, agent.id, payload)
        assert invocation.request_payload == payload
        assert JsonText.parse(world.transport.requests[-1].body.text.encode()).value == payload

    @pytest.mark.parametrize("payload", [float("nan"), float("inf"), {1: 2}, object(), {"a": {1}}, b"x"])
    async def test_what_is_no_json_is_refused(self, world: World, payload: object) -> None:
        agent = await world.agent()
        with pytest.raises(ValidationError):
            await world.service.invoke_agent(ALICE, agent.id, payload)
        assert not world.transport.requests
        assert not world.store.invocations_of("acme")

    @pytest.mark.parametrize(
        "arguments",
        [
            {"lineage_hop_id": ""},
            {"lineage_hop_id": "x" * 201},
            {"lineage_hop_id": "\0"},
            {"lineage_hop_id": "\udc80"},
            {"trace_id": "x"},
            {"trace_id": "0" * 32},
            {"trace_id": "A" * 32},
            {"trace_id": "a" * 32 + "\n"},
        ],
    )
    async def test_ids_that_could_not_be_stored_or_sent(self, world: World, arguments: dict[str, str]) -> None:
        agent = await world.agent()
        with pytest.raises(ValidationError):
            await world.service.invoke_agent(ALICE, agent.id, None, **arguments)
        assert not world.store.invocations_of("acme")


class TestAttempts:
    async def test_a_success_at_once(self, world: World) -> None:
        invocation = await world.invoked(
            await world.agent(), taking(world.clock, 1.5, Outcome(status=201, answer=JsonText("[1.0]")))
        )
        assert (invocation.status, invocation.response_status) == (InvocationStatus.SUCCEEDED, 201)
        assert invocation.response == JsonText("[1.0]")
        assert invocation.execution_time_ms == 1500
        assert (invocation.error_code, invocation.error_message) == (None, None)
        assert invocation.completed_at == world.clock.now()
        [attempt] = invocation.attempts
        assert (attempt.status, attempt.error, attempt.duration_ms) == (201, None, 1500)
        assert attempt.at == invocation.created_at
        assert world.clock.slept_s == []

    @pytest.mark.parametrize(
        "step", [CONNECTION_FAILED, timed_out(), *map(refused, (408, 425, 429, 500, 502, 503, 504))]
    )
    async def test_what_is_tried_again(self, world: World, step: Outcome) -> None:
        invocation = await world.invoked(await world.agent(), step, step)
        assert invocation.status is InvocationStatus.SUCCEEDED
        assert len(invocation.attempts) == 3
        first = invocation.attempts[0]
        assert (first.status, first.error) == (
            (step.status, None) if step.error is ErrorCode.HTTP_STATUS else (None, step.error)
        )

    @pytest.mark.parametrize(
        "step",
        [
            *map(refused, (301, 307, 400, 401, 403, 404, 409, 410, 422, 501, 505, 507)),
            Outcome(error=ErrorCode.EGRESS_REFUSED),
            Outcome(error=ErrorCode.RESPONSE_TOO_LARGE, status=200, may_have_run=True),
            Outcome(error=ErrorCode.RESPONSE_ENCODED, status=200, may_have_run=True),
            Outcome(error=ErrorCode.AGENT_AUTH_FAILED, status=401),
            Outcome(error=ErrorCode.AGENT_AUTH_FAILED),
        ],
    )
    async def test_what_is_not_tried_again(self, world: World, step: Outcome) -> None:
        invocation = await world.invoked(await world.agent(), step)
        assert (invocation.status, invocation.error_code) == (InvocationStatus.FAILED, step.error)
        assert (len(invocation.attempts), len(world.transport.requests)) == (1, 1)

    async def test_the_last_attempt_decides(self, world: World) -> None:
        agent = await world.agent()
        last = refused(502, answer=JsonText('"down"'), message="The agent answered 502.")
        invocation = await world.invoked(agent, timed_out(), CONNECTION_FAILED, last)
        assert (invocation.error_code, invocation.response_status) == (ErrorCode.HTTP_STATUS, 502)
        assert (invocation.response, invocation.error_message) == (JsonText('"down"'), "The agent answered 502.")
        assert [attempt.error or attempt.status for attempt in invocation.attempts] == [
            ErrorCode.TIMEOUT, ErrorCode.CONNECTION_FAILED, 502,
        ]  # fmt: skip

    @pytest.mark.parametrize("max_attempts", [1, 2, 3])
    async def test_never_more_than_max_attempts(self, world: World, max_attempts: int) -> None:
        world.transport.otherwise = refused()
        invocation = await world.invoked(await world.agent(max_attempts=max_attempts))
        assert (len(invocation.attempts), invocation.status) == (max_attempts, InvocationStatus.FAILED)

    async def test_the_backoff_doubles_and_is_jittered(self, world: World) -> None:
        world.transport.otherwise = refused()
        agent = await world.agent()
        for jitter in (0.0, 0.5, 0.999):
            world.ids.jitter_value = jitter
            world.clock.slept_s.clear()
            await world.invoked(agent)
            assert world.clock.slept_s == [0.5 * jitter, 1.0 * jitter]

    async def test_retry_after_is_waited_for(self, world: World) -> None:
        world.transport.otherwise = refused(429, retry_after_s=29.5)
        invocation = await world.invoked(await world.agent())
        assert world.clock.slept_s == [29.5, 29.5]
        assert invocation.execution_time_ms == 59_000

    async def test_a_short_retry_after_does_not_shorten_the_backoff(self, world: World) -> None:
        await world.invoked(await world.agent(), refused(503, retry_after_s=0))
        assert world.clock.slept_s == [0.25]

    async def test_a_long_retry_after_ends_the_attempts(self, world: World) -> None:
        invocation = await world.invoked(await world.agent(), refused(503, retry_after_s=30.5))
        assert (len(invocation.attempts), world.clock.slept_s) == (1, [])

    async def test_everything_ends_within_two_minutes(self, world: World) -> None:
        async def as_slow_as_can_be(request: AgentRequest) -> Outcome:
            world.clock.advance(request.timeout_s)
            return attrs.evolve(timed_out(), retry_after_s=30)

        world.ids.jitter_value = 0.999
        world.transport.otherwise = as_slow_as_can_be
        invocation = await world.invoked(await world.agent())
        assert [request.timeout_s for request in world.transport.requests] == [30, 30]
        assert invocation.execution_time_ms == 90_000

    async def test_the_last_attempt_gets_what_is_left(self, world: World) -> None:
        async def overdue(request: AgentRequest) -> Outcome:
            world.clock.advance(50)
            return timed_out()

        world.ids.jitter_value = 0
        world.transport.otherwise = overdue
        await world.invoked(await world.agent())
        assert [request.timeout_s for request in world.transport.requests] == [30, 30, 20]


RESERVED = {"max_cost_per_invocation": "0.1", "max_monthly_cost": "10"}


class TestLease:
    """Others end what a process left that was not heard of for so long; they must not be made liars."""

    async def test_nothing_is_sent_once_it_has_run_out(self, world: World) -> None:
        agent = await world.agent()
        await world.ledger.heartbeat()

        async def stand_still() -> None:
            world.clock.advance(LEASE_S)

        world.ledger.after_admit = stand_still
        invocation = await world.invoked(agent)
        assert (invocation.status, invocation.error_code) == (InvocationStatus.UNKNOWN, ErrorCode.INTERRUPTED)
        assert world.transport.requests == []

    async def test_nothing_is_sent_again_once_it_has_run_out(self, world: World) -> None:
        agent = await world.agent()
        await world.ledger.heartbeat()

        async def stand_still(_: AgentRequest) -> Outcome:
            world.clock.advance(LEASE_S)
            return refused(503)

        invocation = await world.invoked(agent, stand_still)
        assert (invocation.status, invocation.response_status) == (InvocationStatus.FAILED, 503)
        assert len(world.transport.requests) == 1

    async def test_a_heartbeat_renews_it(self, world: World) -> None:
        agent = await world.agent()
        await world.ledger.heartbeat()

        async def be_slow(_: AgentRequest) -> Outcome:
            world.clock.advance(LEASE_S)
            await world.ledger.heartbeat()
            return refused(503)

        assert (await world.invoked(agent, be_slow)).status is InvocationStatus.SUCCEEDED


class TestCharges:
    @pytest.mark.parametrize(
        ("steps", "cost", "overrun"),
        [
            ([costing(None)], "0.1", False),
            ([costing("0.05")], "0.05", False),
            ([answered('{"metadata":{"cost":0.05}}')], "0.05", False),
            ([answered('{"metadata":{"cost":5e-2}}')], "0.05", False),
            ([costing("0")], "0", False),
            ([costing("0.100000001")], "0.100000001", True),
            ([answered('{"metadata":{"cost":999999999999.999999999}}')], "999999999999.999999999", True),
            ([refused(404)], None, False),
            ([refused(500, answer=JsonText('{"metadata":{"cost":"0.05"}}'))] * 3, None, False),
            ([CONNECTION_FAILED] * 3, None, False),
            ([Outcome(error=ErrorCode.EGRESS_REFUSED)], None, False),
            ([timed_out()] * 3, "0.1", False),
            ([timed_out(), refused(), refused(404)], "0.1", False),
            ([CONNECTION_FAILED, timed_out(), CONNECTION_FAILED], "0.1", False),
            ([timed_out(), costing("0.02")], "0.02", False),
            ([timed_out(), costing(None)], "0.1", False),
            ([Outcome(error=ErrorCode.RESPONSE_TOO_LARGE, status=200, may_have_run=True)], "0.1", False),
            ([Outcome(error=ErrorCode.RESPONSE_ENCODED, status=200, may_have_run=True)], "0.1", False),
        ],
    )
    async def test_what_is_charged(self, world: World, steps: list[Step], cost: str | None, overrun: bool) -> None:
        agent = await world.agent(budget_config=RESERVED)
        invocation = await world.invoked(agent, *steps)
        assert invocation.cost == (None if cost is None else Money(Decimal(cost), "USD"))
        assert invocation.cost_overrun is overrun
        assert await world.account(agent) == BudgetAccount(spent=Decimal(cost or 0))

    @pytest.mark.parametrize(
        "answer",
        [
            '{"metadata":{"cost":-5}}',
            '{"metadata":{"cost":-0.01}}',
            '{"metadata":{"cost":"-5"}}',
            '{"metadata":{"cost":"1e-2"}}',
            '{"metadata":{"cost":".5"}}',
            '{"metadata":{"cost":" 1"}}',
            '{"metadata":{"cost":"٣"}}',
            '{"metadata":{"cost":1000000000000}}',
            '{"metadata":{"cost":999999999999.9999999999}}',
            '{"metadata":{"cost":999999999999.99999999999999999999999}}',
            '{"metadata":{"cost":0.0000000001}}',
            '{"metadata":{"cost":123456789012.0000000000000000000000001}}',
            '{"metadata":{"cost":1e-9999999}}',
            '{"metadata":{"cost":1e-99999999999999999999999}}',
            '{"metadata":{"cost":1e99999999999999999999999}}',
            '{"metadata":{"cost":' + "1" * 5000 + "}}",
            '{"metadata":{"cost":true}}',
            '{"metadata":{"cost":null}}',
            '{"metadata":{"cost":[1]}}',
            '{"metadata":{"cost":{"amount":1}}}',
            '{"metadata":{"Cost":1}}',
            '{"metadata":"cost"}',
            '{"metadata":[{"cost":1}]}',
            '{"cost":1}',
            '[{"metadata":{"cost":1}}]',
            '"metadata"',
            "null",
        ],
    )
    async def test_any_other_figure_counts_as_absent(self, world: World, answer: str) -> None:
        agent = await world.agent(budget_config=RESERVED)
        invocation = await world.invoked(agent, answered(answer))
        assert invocation.response == JsonText(answer)
        assert invocation.cost == Money(Decimal("0.1"), "USD")
        assert not invocation.cost_overrun

    @pytest.mark.parametrize(
        ("steps", "cost"),
        [([costing(None)], None), ([costing("0.5")], "0.5"), ([timed_out()] * 3, None), ([refused(404)], None)],
    )
    async def test_without_an_amount_only_the_agents_figure_is_charged(
        self, world: World, steps: list[Step], cost: str | None
    ) -> None:
        agent = await world.agent(budget_config={"max_monthly_cost": 1, "currency": "EUR"})
        invocation = await world.invoked(agent, *steps)
        assert invocation.cost == (None if cost is None else Money(Decimal(cost), "EUR"))
        assert not invocation.cost_overrun

    async def test_a_cap_of_three_tenths_admits_three(self, world: World) -> None:
        agent = await world.agent(budget_config={"max_cost_per_invocation": 0.1, "max_monthly_cost": 0.3})
        for _ in range(3):
            await world.invoked(agent)
        with pytest.raises(BudgetExceeded):
            await world.invoked(agent)
        assert len(world.transport.requests) == 3


class TestRefusals:
    async def test_a_limit_of_two_per_minute(self, world: World) -> None:
        agent = await world.agent(rate_limit_config={"requests_per_minute": 2})
        for used in (1, 2):
            invoked = await world.service.invoke(ALICE, agent.id, None)
            assert [(quota.used, quota.remaining) for quota in invoked.quotas.quotas] == [(used, 2 - used)]
        with pytest.raises(RateLimited) as refusal:
            await world.service.invoke(ALICE, agent.id, None)
        world.clock.advance(refusal.value.retry_after_s - 1.2)
        with pytest.raises(RateLimited):
            await world.service.invoke(ALICE, agent.id, None)
        world.clock.advance(1.2)
        await world.service.invoke(ALICE, agent.id, None)
        assert len(world.transport.requests) == len(world.store.invocations_of("acme")) == 3

    async def test_an_inactive_agent_is_left_alone(self, world: World) -> None:
        agent = await world.agent(status="inactive")
        with pytest.raises(ValidationError):
            await world.service.invoke(ALICE, agent.id, object())
        with pytest.raises(AgentInactive):
            await world.service.invoke(ALICE, agent.id, None)
        assert not world.transport.requests
        assert not world.store.invocations_of("acme")
        assert [record.refusal for record in world.observability.invocations] == ["AgentInactive"]

    async def test_refusals_and_ends_are_told(self, world: World) -> None:
        agent = await world.agent(rate_limit_config={"requests_per_minute": 1})
        invocation = await world.invoked(agent)
        with pytest.raises(RateLimited):
            await world.invoked(agent)
        ended, refusal = world.observability.invocations
        assert (ended.invocation, ended.refusal, ended.trace_id) == (invocation, None, invocation.trace_id)
        assert (refusal.invocation, refusal.refusal, refusal.agent_id) == (None, "RateLimited", agent.id)

    async def test_an_admission_is_told_before_anything_is_sent(self, world: World) -> None:
        agent = await world.agent(budget_config=RESERVED)
        gate = Gate()
        world.transport.script.append(gate)
        call = asyncio.create_task(world.service.invoke_agent(ALICE, agent.id, None))
        await gate.entered.wait()
        [admitted] = world.observability.admissions
        assert (admitted.principal, admitted.invocation.status) == (ALICE, InvocationStatus.RUNNING)
        assert admitted.invocation.reservation == Money(Decimal("0.1"), "USD")
        assert not world.observability.invocations
        gate.opened.set()
        assert (await call).id == admitted.invocation.id
        assert len(world.observability.admissions) == len(world.observability.invocations) == 1

    @pytest.mark.parametrize(
        "refusal",
        [
            AgentInactive(),
            IdempotencyKeyReused(),
            IdempotencyKeyInFlight(),
            BudgetExceeded(RateQuotas()),
            Unavailable("The ledger"),
            AdmissionInDoubt("The ledger"),
        ],
        ids=lambda refusal: type(refusal).__name__,
    )
    async def test_every_refusal_is_told(self, world: World, refusal: ExternalAgentsError) -> None:
        agent = await world.agent()

        async def refuse() -> None:
            raise refusal

        world.ledger.before_admit = refuse
        with pytest.raises(type(refusal)):
            await world.service.invoke(ALICE, agent.id, None, trace_id="ab" * 16)
        [told] = world.observability.invocations
        assert (told.principal, told.agent_id, told.trace_id) == (ALICE, agent.id, "ab" * 16)
        assert (told.invocation, told.refusal) == (None, type(refusal).__name__)
        assert not world.observability.admissions

    async def test_an_agent_that_is_none_is_no_refusal(self, world: World) -> None:
        agent = await world.agent()

        async def delete() -> None:
            raise AgentNotFound

        world.ledger.before_admit = delete
        with pytest.raises(AgentNotFound):
            await world.service.invoke(ALICE, agent.id, None)
        assert not world.observability.invocations

    async def test_an_agent_that_changes_meanwhile_is_decided_on_anew(self, world: World) -> None:
        agent = await world.agent()

        async def change_once() -> None:
            world.ledger.before_admit = _nothing
            await world.service.update_agent(ALICE, agent.id, {"webhook_url": "https://new.example.com/"})

        world.ledger.before_admit = change_once
        await world.invoked(agent)
        assert [request.url for request in world.transport.requests] == ["https://new.example.com/"]
        assert len(world.store.invocations_of("acme")) == 1
        assert [record.refusal for record in world.observability.invocations] == [None]

    async def test_an_agent_that_changes_all_the_time(self, world: World) -> None:
        agent = await world.agent()

        async def change() -> None:
            await world.service.update_agent(ALICE, agent.id, {"name": "again"})

        world.ledger.before_admit = change
        with pytest.raises(Unavailable) as raised:
            await world.service.invoke(ALICE, agent.id, None)
        assert raised.value.invocation_id is None
        assert not world.store.invocations_of("acme")
        assert [record.refusal for record in world.observability.invocations] == ["Unavailable"]


class TestCallersWhoGoAway:
    async def cancelled(self, world: World, agent: ExternalAgent, entered: asyncio.Event) -> None:
        call = asyncio.create_task(world.service.invoke_agent(ALICE, agent.id, None))
        await entered.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

    async def test_while_the_agent_works(self, world: World) -> None:
        agent = await world.agent(budget_config=RESERVED)
        gate = Gate(costing("0.07"))
        world.transport.script.append(gate)
        await self.cancelled(world, agent, gate.entered)
        assert await world.service.drain(0) == 1
        gate.opened.set()
        assert await world.service.drain() == 0
        [invocation] = (await world.service.list_invocations(ALICE, agent.id)).items
        assert (invocation.status, invocation.cost) == (InvocationStatus.SUCCEEDED, Money(Decimal("0.07"), "USD"))
        assert len(world.observability.invocations) == 1

    @pytest.mark.parametrize("moment", ["before_admit", "after_admit", "before_settle", "after_settle"])
    async def test_while_the_ledger_works(self, world: World, moment: str) -> None:
        agent = await world.agent(budget_config=RESERVED)
        entered, opened = asyncio.Event(), asyncio.Event()

        async def slowly() -> None:
            entered.set()
            await opened.wait()

        setattr(world.ledger, moment, slowly)
        await self.cancelled(world, agent, entered)
        opened.set()
        assert await world.service.drain() == 0
        [invocation] = (await world.service.list_invocations(ALICE, agent.id)).items
        assert invocation.status is InvocationStatus.SUCCEEDED
        assert await world.account(agent) == BudgetAccount(spent=Decimal("0.1"))

    async def test_drain_waits_for_all(self, world: World) -> None:
        agent = await world.agent()
        gates = [Gate() for _ in range(3)]
        world.transport.script.extend(gates)
        calls = [asyncio.create_task(world.service.invoke_agent(ALICE, agent.id, number)) for number in range(3)]
        for gate in gates:
            await gate.entered.wait()
        assert await world.service.drain(0) == 3
        gates[0].opened.set()
        await calls[0]
        drained = asyncio.create_task(world.service.drain())
        for gate in gates[1:]:
            assert not drained.done()
            gate.opened.set()
        assert await drained == 0
        assert {invocation.status for invocation in await asyncio.gather(*calls)} == {InvocationStatus.SUCCEEDED}
        assert await world.service.drain() == 0


class TestOutages:
    def outage(self, world: World, lasts_s: float) -> None:
        ends_s = world.clock.monotonic_s() + lasts_s

        async def down() -> None:
            if world.clock.monotonic_s() < ends_s:
                raise Unavailable("The database")

        world.ledger.before_settle = down

    async def test_a_short_outage_is_waited_out(self, world: World) -> None:
        agent = await world.agent()
        self.outage(world, lasts_s=4)
        assert (await world.invoked(agent)).status is InvocationStatus.SUCCEEDED

    @pytest.mark.parametrize("how", ["fails", "hangs"])
    async def test_a_long_one_is_told_and_the_outcome_is_stored_later(self, world: World, how: str) -> None:
        agent = await world.agent(budget_config=RESERVED)
        over = asyncio.Event()

        async def down() -> None:
            if how == "hangs":
                await over.wait()
            elif not over.is_set():
                raise Unavailable("The database")

        world.ledger.before_settle = down
        tasks = TaskKeeper()
        pipeline = world.pipeline(tasks, settle_patience_s=0.05)
        async with asyncio.timeout(10):
            with pytest.raises(Unavailable) as raised:
                await pipeline.carry_out(world.assignment(agent))
        invocation_id = raised.value.invocation_id
        assert invocation_id is not None
        running = await world.service.get_invocation(ALICE, agent.id, invocation_id)
        assert running.status is InvocationStatus.RUNNING
        assert not world.observability.invocations
        over.set()
        assert await tasks.drain(10) == 0
        stored = await world.service.get_invocation(ALICE, agent.id, invocation_id)
        assert stored.status is InvocationStatus.SUCCEEDED
        assert await world.account(agent) == BudgetAccount(spent=Decimal("0.1"))
        assert [record.invocation for record in world.observability.invocations] == [stored]

    async def test_patience_is_of_five_seconds_and_ends_with_the_settlement(self, world: World) -> None:
        """A timer that is left behind would hold on to the answer, and to what is in it."""
        assert SETTLE_PATIENCE_S == 5
        tasks = TaskKeeper()
        invoked = await world.pipeline(tasks).carry_out(world.assignment(await world.agent()))
        assert invoked.invocation.status is InvocationStatus.SUCCEEDED
        left = weakref.ref(invoked)
        del invoked
        await tasks.drain(10)
        gc.collect()
        assert left() is None

    async def test_a_refusal_leaves_nothing_to_the_garbage_collector(self, world: World) -> None:
        async def refuse() -> None:
            raise Unavailable("The database")

        world.ledger.before_admit = refuse
        tasks = TaskKeeper()
        pipeline, assignment = world.pipeline(tasks), world.assignment(await world.agent())
        with garbage() as left:
            for _ in range(20):
                with suppress(Unavailable):
                    await pipeline.carry_out(assignment)
            await tasks.drain(10)
        assert len(left) < 20

    async def test_a_lost_confirmation_does_not_charge_twice(self, world: World) -> None:
        agent = await world.agent(budget_config=RESERVED)

        async def lose_it_once() -> None:
            world.ledger.after_settle = _nothing
            raise Unavailable("The database")

        world.ledger.after_settle = lose_it_once
        assert (await world.invoked(agent)).status is InvocationStatus.SUCCEEDED
        assert await world.account(agent) == BudgetAccount(spent=Decimal("0.1"))

    async def test_nothing_is_sent_while_admission_fails(self, world: World) -> None:
        agent = await world.agent()

        async def down() -> None:
            raise Unavailable("The database", retry_after_s=7)

        for moment in ("before_admit", "after_admit"):
            setattr(world.ledger, moment, down)
            with pytest.raises(Unavailable) as raised:
                await world.service.invoke_agent(ALICE, agent.id, None)
            assert (raised.value.retry_after_s, raised.value.invocation_id) == (7, None)
        assert not world.transport.requests

    async def test_a_transport_that_breaks_ends_the_invocation_as_unknown(self, world: World) -> None:
        async def broken(request: AgentRequest) -> Outcome:
            raise RuntimeError("a fault of the transport")

        agent = await world.agent(budget_config=RESERVED)
        invocation = await world.invoked(agent, broken)
        assert (invocation.status, invocation.error_code) == (InvocationStatus.UNKNOWN, ErrorCode.INTERRUPTED)
        assert "fault of the transport" not in (invocation.error_message or "")
        assert await world.account(agent) == BudgetAccount(spent=Decimal("0.1"))

    @pytest.mark.parametrize("moment", ["before_admit", "before_settle"])
    async def test_nobody_waits_for_ever_for_a_ledger_that_breaks(self, world: World, moment: str) -> None:
        async def broken() -> None:
            raise RuntimeError("a fault of the ledger")

        agent = await world.agent()
        setattr(world.ledger, moment, broken)
        async with asyncio.timeout(10):
            with pytest.raises(Unavailable):
                await world.service.invoke_agent(ALICE, agent.id, None)

    async def test_nobody_waits_for_ever_when_the_loop_shuts_down(self, world: World) -> None:
        agent = await world.agent()
        gate = Gate()
        world.transport.script.append(gate)
        call = asyncio.create_task(world.service.invoke_agent(ALICE, agent.id, None))
        await gate.entered.wait()
        for task in asyncio.all_tasks():
            if "InvocationPipeline" in repr(task.get_coro()):
                task.cancel()
        async with asyncio.timeout(10):
            with pytest.raises(Unavailable):
                await call


class TestUpkeep:
    async def test_it_goes_on_through_an_outage(self, world: World) -> None:
        beats: list[float] = []
        recovered = asyncio.Event()

        class Ledger(MemoryLedger):
            async def heartbeat(self) -> None:
                beats.append(world.clock.monotonic_s())
                if len(beats) == 2:
                    raise Unavailable("The database")
                await super().heartbeat()

            async def recover(self) -> int:
                if len(beats) == 4:
                    recovered.set()
                return await super().recover()

        upkeep = asyncio.create_task(keep_up(Ledger(world.store, world.clock), world.clock))
        async with asyncio.timeout(10):
            await recovered.wait()
        upkeep.cancel()
        assert beats[:4] == [0, HEARTBEAT_S, 2 * HEARTBEAT_S, 3 * HEARTBEAT_S]

    async def test_what_a_dead_instance_left_is_ended(self, world: World) -> None:
        agent = make_agent(budget_config={"max_cost_per_invocation": 1})
        world.store.agents[agent.org_id, agent.id] = agent
        dead, survivor = MemoryLedger(world.store, world.clock), MemoryLedger(world.store, world.clock)
        await dead.heartbeat()
        request = make_request(agent, invocation_id=world.ids.new_id())
        left = (await dead.admit(request)).invocation
        ended = asyncio.Event()

        class Watching(FakeClock):
            async def sleep(self, seconds: float) -> None:
                world.clock.advance(seconds)
                if world.store.invocations_of(agent.org_id)[left.id].has_ended:
                    ended.set()
                await asyncio.sleep(0)

        told: list[Record] = []
        upkeep = asyncio.create_task(keep_up(survivor, Watching(), observe=told.append))
        async with asyncio.timeout(10):
            await ended.wait()
        upkeep.cancel()
        [recovery] = told
        assert isinstance(recovery, RecoveryRecord)
        assert recovery.interrupted == 1
        assert world.store.invocations_of(agent.org_id)[left.id].status is InvocationStatus.UNKNOWN
        assert world.clock.monotonic_s() <= 60


class TestFunctionTransport:
    async def agent_on(self, function: Callable[[AgentRequest], Awaitable[Outcome]], **changes: Any) -> Any:
        service = memory_service(FunctionTransport(function), clock=FakeClock())
        agent = await service.create_agent(
            ALICE,
            {
                "name": "function",
                "provider": "custom",
                "webhook_url": "https://agent.example.com/",
                "auth_type": "none",
                **changes,
            },
        )
        return await service.invoke_agent(ALICE, agent.id, {"input": 1})

    async def test_a_function_answers(self) -> None:
        async def echo(request: AgentRequest) -> Outcome:
            return Outcome(status=200, answer=request.body)

        assert (await self.agent_on(echo)).response_payload == {"input": 1}

    async def test_an_exception_is_a_500(self) -> None:
        async def broken(request: AgentRequest) -> Outcome:
            raise ValueError("with a secret")

        invocation = await self.agent_on(broken)
        assert (invocation.response_status, len(invocation.attempts)) == (500, 3)
        assert invocation.error_message == "The agent raised ValueError."

    async def test_its_own_timeout_error_is_no_timeout_of_ours(self) -> None:
        async def broken(request: AgentRequest) -> Outcome:
            raise TimeoutError

        assert (await self.agent_on(broken)).error_code is ErrorCode.HTTP_STATUS

    async def test_it_is_cancelled_when_its_time_is_up(self) -> None:
        cancelled = asyncio.Event()

        async def slow(request: AgentRequest) -> Outcome:
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()
            raise AssertionError

        request = AgentRequest(
            org_id="acme",
            agent_id=make_agent().id,
            url="https://agent.example.com/",
            body=JsonText("null"),
            headers={},
            credentials=None,  # type: ignore[arg-type]
            timeout_s=0,
        )
        outcome = await FunctionTransport(slow).exchange(request)
        assert (outcome.error, outcome.may_have_run) == (ErrorCode.TIMEOUT, True)
        assert cancelled.is_set()
