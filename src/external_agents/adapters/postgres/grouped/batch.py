"""What one call of `external_agents_commit` is given, and what its answer means for everyone who waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from datetime import date, datetime
from sys import getsizeof
from typing import Any, TypeAlias
from uuid import UUID

import attrs

from external_agents.adapters.postgres.columns import storable
from external_agents.adapters.postgres.grouped.arrays import (
    Booleans,
    Bytes,
    Dates,
    Integers,
    Moments,
    Shorts,
    Texts,
    Uuids,
)
from external_agents.adapters.postgres.grouped.fair_queue import Lane
from external_agents.adapters.postgres.instances import LeaseLost
from external_agents.adapters.postgres.rows import attempts_text
from external_agents.domain.agent import ExternalAgent
from external_agents.domain.budget import Money, budget_month
from external_agents.domain.errors import AgentInactive, AgentNotFound, StaleVersion
from external_agents.domain.ids import created_at_of
from external_agents.domain.invocation import ExternalAgentInvocation
from external_agents.domain.rate_limit import BUCKETS, Quota, RateQuotas, RateWindows, Window, WindowCount
from external_agents.domain.refusals import (
    BudgetExceeded,
    IdempotencyKeyInFlight,
    IdempotencyKeyReused,
    RateLimited,
)
from external_agents.ports.ledger import Admission, AdmissionRequest
from external_agents.ports.rate_limiter import Place

PARAMETERS = 36
CALL = f"SELECT * FROM external_agents_commit({', '.join(['%s'] * PARAMETERS)})"  # noqa: S608

_WIDTH = BUCKETS + 1
"""The counts of a window and their sum."""
_COUNTED, _PLACED, _REFUSED = 0, 1, 2
_NOT_FOUND, _STALE, _INACTIVE, _REUSED, _IN_FLIGHT, _RATE_LIMITED, _OVER_BUDGET, _EARLIER = 1, 2, 3, 4, 5, 6, 7, 8


@attrs.frozen
class Earlier:
    """The invocation that answers for another with the same idempotency key."""

    invocation_id: UUID
    quotas: RateQuotas


Admitted: TypeAlias = Admission | Earlier
Account: TypeAlias = tuple[str, int, str, date]
"""An organisation, the number of its agent's id, a currency and a month."""


@attrs.define
class Outcome:
    """The row that a call returns, column by column; the migration says what they are."""

    settled: Sequence[bool] | None
    has_lease: bool | None
    moment: datetime | None
    g_state: Sequence[int] | None
    g_admitted: Sequence[int] | None
    g_refusal: Sequence[int] | None
    g_heads: Sequence[int] | None
    g_counts: Sequence[int] | None
    i_item: Sequence[int] | None
    i_state: Sequence[int] | None
    i_invocation_id: Sequence[UUID] | None


@attrs.define(eq=False)
class Admitting:
    request: AdmissionRequest
    answer: asyncio.Future[Admitted]
    since_s: float
    lane: Lane = attrs.field(init=False)
    created_at: datetime = attrs.field(init=False)
    size_bytes: int = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        agent = self.request.agent
        self.lane = agent.org_id, agent.id.int
        self.created_at = created_at_of(self.request.invocation_id)
        self.size_bytes = getsizeof(self.request.request.text)


@attrs.define(eq=False)
class Settling:
    """`answer`: whether it was running, and so is settled now."""

    finished: ExternalAgentInvocation
    answer: asyncio.Future[bool]
    since_s: float
    lane: Lane = attrs.field(init=False)
    size_bytes: int = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        finished = self.finished
        self.lane = finished.org_id, finished.external_agent_id.int
        self.size_bytes = getsizeof(finished.response.text) if finished.response else 0


@attrs.define(eq=False)
class _Group:
    """Admissions of one version of an agent that are decided together."""

    agent: ExternalAgent
    kind: int
    month: date
    items: list[Admitting] = attrs.field(factory=list)

    @property
    def account(self) -> Account | None:
        if self.agent.budget_config is None:
            return None
        return self.agent.org_id, self.agent.id.int, self.agent.budget.currency, self.month


@attrs.define(eq=False)
class Batch:
    """`month`: of all admissions."""

    settlings: list[Settling] = attrs.field(factory=list)
    admittings: list[Admitting] = attrs.field(factory=list)
    month: date | None = None
    _groups: dict[tuple[str, int, int, int], _Group] = attrs.field(factory=dict)
    _keys: set[tuple[Lane, str]] = attrs.field(factory=set)

    def takes(self, item: Admitting) -> bool:
        """
        Add an admission, unless it has to wait for the next batch.

        It has to when it is of another month, when its key is in this one, or when others are in it whose places are
        taken elsewhere, and its own is not, or the other way round: the two would be decided on one state of the
        agent's account.
        """
        month = budget_month(item.created_at)
        agent, kind = item.request.agent, _kind_of(item.request)
        if self.month not in (None, month):
            return False
        name = (*item.lane, agent.version, kind)
        group = self._groups.get(name)
        if group is None and kind != _REFUSED and (*item.lane, agent.version, _PLACED - kind) in self._groups:
            return False
        if (key := item.request.idempotency_key) is not None:
            if (item.lane, key) in self._keys:
                return False
            self._keys.add((item.lane, key))
        self.month = month
        if group is None:
            group = self._groups[name] = _Group(agent, kind, month)
        group.items.append(item)
        self.admittings.append(item)
        return True

    @property
    def items(self) -> Iterator[Admitting | Settling]:
        yield from self.settlings
        yield from self.admittings

    def __len__(self) -> int:
        return len(self.settlings) + len(self.admittings)

    def parameters(self, instance_id: UUID, lock_wait: str) -> Sequence[Any]:
        groups = self._in_order()
        finished = [settling.finished for settling in self.settlings]
        released = [_account(one, one.reservation) for one in finished]
        charged = [_account(one, one.cost) for one in finished]
        accounts = {*released, *charged, *(group.account for group in groups)}
        ordered: list[Account] = sorted(account for account in accounts if account is not None)
        index: dict[Account | None, int | None] = {account: n for n, account in enumerate(ordered, 1)}
        index[None] = None
        return (
            *(next(self.items).lane[0], lock_wait),
            *(Texts([one[0] for one in ordered]), Uuids([one[1] for one in ordered])),
            *(Texts([one[2] for one in ordered]), Dates([one[3] for one in ordered])),
            *(_settling_columns(finished, released, charged, index) if finished else _NO_SETTLINGS),
            instance_id,
            *(_admitting_columns(groups, index, with_keys=bool(self._keys)) if groups else _NO_ADMITTINGS),
        )

    def _in_order(self) -> list[_Group]:
        """Of their agents' keys, as locks are taken."""
        return [self._groups[name] for name in sorted(self._groups)]

    def conclude(self, outcome: Outcome) -> None:
        """Answer everyone with what the call returned."""
        for settling, settled in zip(self.settlings, outcome.settled or (), strict=True):
            _give(settling.answer, settled)
        if self.admittings and not outcome.has_lease:
            for admitting in self.admittings:
                _refuse(admitting.answer, LeaseLost())
        elif self.admittings:
            _Verdicts(self._in_order(), outcome).give()


def _account(finished: ExternalAgentInvocation, money: Money | None) -> Account | None:
    if money is None:
        return None
    return finished.org_id, finished.external_agent_id.int, money.currency, budget_month(finished.created_at)


_Index: TypeAlias = Mapping[Account | None, int | None]


def _settling_columns(
    finished: Sequence[ExternalAgentInvocation],
    released: Sequence[Account | None],
    charged: Sequence[Account | None],
    index: _Index,
) -> Iterator[Any]:
    yield Texts([one.org_id for one in finished])
    yield Uuids([one.id.int for one in finished])
    yield Integers([index[account] for account in released])
    yield Integers([index[account] for account in charged])
    yield Texts([one.status for one in finished])
    yield Texts([one.response.text if one.response else None for one in finished])
    yield Integers([one.response_status for one in finished])
    yield Texts([attempts_text(one.attempts) for one in finished])
    yield Integers([one.execution_time_ms for one in finished])
    yield Texts([one.error_code for one in finished])
    yield Texts([storable(one.error_message) for one in finished])
    yield Texts([str(one.cost.amount) if one.cost else None for one in finished])
    yield Booleans([one.cost_overrun for one in finished])
    yield Moments([one.completed_at for one in finished])


def _admitting_columns(groups: Sequence[_Group], index: _Index, *, with_keys: bool) -> Iterator[Any]:
    """Group by group, as `_Verdicts` counts them."""
    yield Texts([group.agent.org_id for group in groups])
    yield Uuids([group.agent.id.int for group in groups])
    yield Integers([group.agent.version for group in groups])
    yield Shorts([group.kind for group in groups])
    yield Integers([len(group.items) for group in groups])
    yield Integers([index[group.account] for group in groups])
    items = [(n, item) for n, group in enumerate(groups, 1) for item in group.items]
    requests = [item.request for _, item in items]
    yield Integers([n for n, _ in items])
    yield Uuids([request.invocation_id.int for request in requests])
    yield Texts([request.initiated_by for request in requests])
    yield Texts([request.request.text for request in requests])
    yield Texts([request.trace_id for request in requests])
    yield Texts([storable(request.lineage_hop_id) for request in requests])
    yield Moments([item.created_at for _, item in items])
    keyed = requests if with_keys else ()
    yield Texts([request.idempotency_key for request in keyed])
    yield Bytes([request.request_hash if request.idempotency_key else None for request in keyed])


_NO_SETTLINGS = (*_settling_columns((), (), (), {}),)
_NO_ADMITTINGS = (*_admitting_columns((), {}, with_keys=False),)


class _Verdicts:
    """What became of each admission of a batch."""

    def __init__(self, groups: list[_Group], outcome: Outcome) -> None:
        assert outcome.moment is not None, "admitting begins with the clock"
        self._of_groups = zip(
            groups, outcome.g_state or (), outcome.g_admitted or (), outcome.g_refusal or (), strict=True
        )
        self._heads, self._counts = outcome.g_heads or (), outcome.g_counts or ()
        self._now_s = outcome.moment.timestamp()
        self._earlier = {
            item: (state, invocation_id)
            for item, state, invocation_id in zip(
                outcome.i_item or (), outcome.i_state or (), outcome.i_invocation_id or (), strict=True
            )
        }
        self._counted = 0

    def give(self) -> None:
        first = 1
        for group, state, admitted, refusal in self._of_groups:
            if state:
                for item in group.items:
                    _refuse(item.answer, _STATES[state]())
            else:
                self._give_group(group, first, admitted, refusal)
            first += len(group.items)

    def _give_group(self, group: _Group, first: int, admitted: int, refusal: int) -> None:
        limits = group.agent.limits
        windows = self._next_windows() if group.kind == _COUNTED and limits else None
        quotas = windows.quotas(limits, self._now_s) if windows else RateQuotas()
        budget = group.agent.budget
        reservation = None if budget.per_invocation is None else Money(budget.per_invocation, budget.currency)
        place = 0
        for number, item in enumerate(group.items, first):
            outside = item.request.verdict
            own_quotas = outside.quotas if outside is not None else quotas
            if number in self._earlier:
                self._give_earlier(item, *self._earlier[number], own_quotas)
                continue
            place += 1
            if place <= admitted:
                invocation = _running(item, reservation)
                after = own_quotas if outside else _before(quotas, admitted - place)
                _give(item.answer, Admission(invocation=invocation, quotas=after))
            elif refusal == _OVER_BUDGET:
                _refuse(item.answer, BudgetExceeded(own_quotas))
            elif isinstance(outside, RateLimited):
                _refuse(item.answer, outside)
            else:
                assert windows is not None, "only limits refuse"
                refused = windows.refusal(limits, self._now_s)
                assert refused is not None, "a full window refuses"
                _refuse(item.answer, RateLimited(refused[0].value, refused[1], quotas))

    def _give_earlier(self, item: Admitting, state: int, invocation_id: UUID, quotas: RateQuotas) -> None:
        if state == _REUSED:
            _refuse(item.answer, IdempotencyKeyReused())
        elif state == _IN_FLIGHT:
            _refuse(item.answer, IdempotencyKeyInFlight())
        else:
            _give(item.answer, Earlier(invocation_id, quotas))

    def _next_windows(self) -> RateWindows:
        """The answer has those of counted groups with limits one after the other."""
        first = len(Window) * self._counted
        self._counted += 1
        return RateWindows(
            *(
                WindowCount(self._heads[n], tuple(self._counts[n * _WIDTH : n * _WIDTH + BUCKETS]))
                for n in range(first, first + len(Window))
            )
        )


_STATES: dict[int, type[AgentNotFound | StaleVersion | AgentInactive]] = {
    _NOT_FOUND: AgentNotFound,
    _STALE: StaleVersion,
    _INACTIVE: AgentInactive,
}


def _kind_of(request: AdmissionRequest) -> int:
    if request.verdict is None:
        return _COUNTED
    return _PLACED if isinstance(request.verdict, Place) else _REFUSED


def _running(item: Admitting, reservation: Money | None) -> ExternalAgentInvocation:
    request = item.request
    return ExternalAgentInvocation(
        id=request.invocation_id,
        org_id=request.org_id,
        external_agent_id=request.agent_id,
        lineage_hop_id=request.lineage_hop_id,
        initiated_by=request.initiated_by,
        request=request.request,
        reservation=reservation,
        trace_id=request.trace_id,
        created_at=item.created_at,
    )


def _before(quotas: RateQuotas, later: int) -> RateQuotas:
    """The quotas before so many later admissions of the same moment."""
    if not later:
        return quotas
    return RateQuotas(
        tuple(Quota(quota.window, quota.limit, quota.used - later, quota.resets_in_s) for quota in quotas.quotas)
    )


def _give(answer: asyncio.Future[Any], result: object) -> None:
    if not answer.done():
        answer.set_result(result)


def _refuse(answer: asyncio.Future[Any], error: Exception) -> None:
    if not answer.done():
        answer.set_exception(error)
        answer.exception()  # Marks it as seen: its caller may be on the way out.
