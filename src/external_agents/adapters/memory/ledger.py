"""Limits, budgets and the record of invocations in memory."""

from __future__ import annotations

from decimal import Decimal
from uuid import UUID, uuid4

import attrs

from external_agents.adapters.memory.store import KeyEntry, MemoryStore
from external_agents.domain.agent import AgentStatus, ExternalAgent
from external_agents.domain.budget import BudgetAccount, Money, budget_month
from external_agents.domain.errors import AgentInactive, AgentNotFound, InvocationNotFound, StaleVersion
from external_agents.domain.idempotency import KEPT_FOR, replayed
from external_agents.domain.ids import created_at_of
from external_agents.domain.invocation import ExternalAgentInvocation, InvocationStatus
from external_agents.domain.rate_limit import RateQuotas, RateWindows
from external_agents.domain.refusals import BudgetExceeded, RateLimited
from external_agents.ports.ledger import LEASE_S, Admission, AdmissionRequest, Forecast, InvocationLedger
from external_agents.ports.system import Clock


class MemoryLedger(InvocationLedger):
    """
    The ledger of one instance on a shared store. No operation awaits anything, so each is atomic on its event loop.

    Windows, leases and idempotency keys follow the clock's monotonic time, months its time of day. An expired key stays
    until it comes again.
    """

    def __init__(self, store: MemoryStore, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._instance = uuid4()

    async def admit(self, request: AdmissionRequest) -> Admission:
        agent = self._admissible(request)
        created_at = created_at_of(request.invocation_id)
        now_s = self._clock.monotonic_s()
        windows = self._windows(agent, now_s)
        if first := self._first_of_key(request, now_s):
            return Admission(invocation=first, quotas=_quotas(request, agent, windows, now_s), replayed=True)
        if isinstance(request.verdict, RateLimited):
            raise request.verdict
        if request.verdict is None and (refusal := windows.refusal(agent.limits, now_s)):
            window, retry_after_s = refusal
            raise RateLimited(window.value, retry_after_s, windows.quotas(agent.limits, now_s))
        budget = agent.budget
        account_key = ((agent.org_id, agent.id), budget.currency, budget_month(created_at))
        account = self._store.accounts.get(account_key, BudgetAccount())
        if not account.admits(budget):
            raise BudgetExceeded(_quotas(request, agent, windows, now_s))
        invocation = ExternalAgentInvocation(
            id=request.invocation_id,
            org_id=agent.org_id,
            external_agent_id=agent.id,
            lineage_hop_id=request.lineage_hop_id,
            initiated_by=request.initiated_by,
            request=request.request,
            reservation=None if budget.per_invocation is None else Money(budget.per_invocation, budget.currency),
            trace_id=request.trace_id,
            created_at=created_at,
        )
        if request.verdict is None:
            windows = windows.taken()
            self._store.windows[agent.org_id, agent.id] = windows
        self._store.accounts[account_key] = account.reserve(invocation.reserved_amount)
        self._store.invocations_of(agent.org_id)[invocation.id] = invocation
        self._store.running[agent.org_id, invocation.id] = self._instance
        if request.idempotency_key is not None:
            entry = KeyEntry(request.request_hash, invocation.id, now_s)
            self._store.idempotency_keys[(agent.org_id, agent.id), request.idempotency_key] = entry
        return Admission(invocation=invocation, quotas=_quotas(request, agent, windows, now_s))

    async def settle(self, finished: ExternalAgentInvocation) -> ExternalAgentInvocation:
        """
        Raises:
            InvocationNotFound: It was never admitted.
        """
        stored = self._store.invocations_of(finished.org_id).get(finished.id)
        if stored is None:
            raise InvocationNotFound
        if stored.status is InvocationStatus.RUNNING:
            self._end(finished)
            return finished
        if stored.status is InvocationStatus.UNKNOWN and not stored.attempts:
            stored = attrs.evolve(stored, attempts=finished.attempts)
            self._store.invocations_of(finished.org_id)[finished.id] = stored
        return stored

    async def record(self, finished: ExternalAgentInvocation) -> None:
        self._store.invocations_of(finished.org_id)[finished.id] = finished

    async def forecast(self, org_id: str, agent_id: UUID) -> Forecast:
        agent = self._store.agent(org_id, agent_id)
        now, now_s = self._clock.now(), self._clock.monotonic_s()
        windows = self._windows(agent, now_s)
        month = budget_month(now)
        account = self._store.accounts.get(((org_id, agent_id), agent.budget.currency, month), BudgetAccount())
        return Forecast(
            at=now,
            quotas=windows.quotas(agent.limits, now_s),
            rate_limited=windows.refusal(agent.limits, now_s) is not None,
            month=month,
            budget=None if agent.budget_config is None else agent.budget,
            account=account,
            over_budget=not account.admits(agent.budget),
        )

    async def heartbeat(self) -> None:
        self._store.heard_of_s[self._instance] = self._clock.monotonic_s()

    def holds_lease(self) -> bool:
        """Also before its first heartbeat: where nobody sends any, nobody recovers."""
        now_s = self._clock.monotonic_s()
        return now_s < self._store.heard_of_s.get(self._instance, now_s) + LEASE_S

    async def recover(self) -> int:
        earliest_s = self._clock.monotonic_s() - LEASE_S
        heard_of_s = self._store.heard_of_s
        left = [
            self._store.invocations_of(org_id)[invocation_id]
            for (org_id, invocation_id), instance in self._store.running.items()
            if instance != self._instance and heard_of_s.get(instance, earliest_s) <= earliest_s
        ]
        for invocation in left:
            self._end(invocation.interrupted(self._clock.now()))
        return len(left)

    def _admissible(self, request: AdmissionRequest) -> ExternalAgent:
        agent = self._store.agent(request.org_id, request.agent_id)
        if agent.is_deleted:
            raise AgentNotFound
        if agent.version != request.agent.version:
            raise StaleVersion
        if agent.status is AgentStatus.INACTIVE:
            raise AgentInactive
        return agent

    def _first_of_key(self, request: AdmissionRequest, now_s: float) -> ExternalAgentInvocation | None:
        if request.idempotency_key is None:
            return None
        agent_key = (request.org_id, request.agent_id)
        entry = self._store.idempotency_keys.get((agent_key, request.idempotency_key))
        if entry is None or entry.admitted_at_s + KEPT_FOR.total_seconds() <= now_s:
            return None
        first = self._store.invocations_of(request.org_id)[entry.invocation_id]
        return replayed(first, entry.request_hash, request.request_hash)

    def _windows(self, agent: ExternalAgent, now_s: float) -> RateWindows:
        return self._store.windows.get((agent.org_id, agent.id), RateWindows()).advanced(now_s)

    def _end(self, ended: ExternalAgentInvocation) -> None:
        invocations = self._store.invocations_of(ended.org_id)
        reservation = invocations[ended.id].reservation
        if reservation is not None:
            self._book(ended, reservation.currency, released=reservation.amount)
        if ended.cost is not None:
            self._book(ended, ended.cost.currency, charged=ended.cost.amount)
        invocations[ended.id] = ended
        del self._store.running[ended.org_id, ended.id]

    def _book(
        self,
        ended: ExternalAgentInvocation,
        currency: str,
        *,
        released: Decimal = Decimal(0),
        charged: Decimal = Decimal(0),
    ) -> None:
        key = ((ended.org_id, ended.external_agent_id), currency, budget_month(ended.created_at))
        self._store.accounts[key] = self._store.accounts.get(key, BudgetAccount()).settle(released, charged)


def _quotas(request: AdmissionRequest, agent: ExternalAgent, windows: RateWindows, now_s: float) -> RateQuotas:
    return windows.quotas(agent.limits, now_s) if request.verdict is None else request.verdict.quotas
