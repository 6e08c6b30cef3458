"""What InvocationLedger promises about the passing of time: places come free, leases run out."""

from __future__ import annotations

import asyncio
from decimal import Decimal

import attrs
import pytest

from external_agents.domain.budget import BudgetAccount
from external_agents.domain.invocation import ErrorCode, ExternalAgentInvocation, InvocationStatus
from external_agents.domain.rate_limit import Window
from external_agents.domain.refusals import RateLimited
from external_agents.ports.ledger import HEARTBEAT_S, LEASE_S, InvocationLedger
from external_agents.testing.builders import conclude, costing, make_finished_call, timed_out
from external_agents.testing.ledger import balanced, request_at, stored_agent
from external_agents.testing.stores import PassTime, Store

TOLERANCE_S = 5.0
"""What a real clock may go on by while a test runs."""


class LedgerTimeContract:
    """
    For InvocationLedger, where time can be made to pass.

    A store with a clock of its own (a database) makes time pass by moving what it holds into the past: the buckets of
    its windows by that many seconds, and its heartbeats. Moving by whole buckets is enough. The times of invocations
    stay as they are.

    Fixtures:
        store (Store): of any scope.
        pass_time (PassTime): for this store.
    """

    @pytest.mark.parametrize("window", list(Window))
    async def test_a_place_comes_free_after_the_window_and_not_before(
        self, store: Store, pass_time: PassTime, window: Window
    ) -> None:
        agent = await stored_agent(store, rate_limit_config={f"requests_per_{window.value}": 2})
        ledger = await store.new_ledger()
        await ledger.admit(request_at(store, agent))
        await pass_time(window.seconds / 2)
        await ledger.admit(request_at(store, agent))
        await pass_time(window.seconds / 2 - window.bucket_s - TOLERANCE_S)
        with pytest.raises(RateLimited):
            await ledger.admit(request_at(store, agent))
        await pass_time(2 * window.bucket_s + TOLERANCE_S)
        [quota] = (await ledger.admit(request_at(store, agent))).quotas.quotas
        assert quota.used == 2
        with pytest.raises(RateLimited):
            await ledger.admit(request_at(store, agent))

    async def test_a_window_is_empty_after_a_long_rest(self, store: Store, pass_time: PassTime) -> None:
        agent = await stored_agent(store, rate_limit_config={"requests_per_minute": 2, "requests_per_day": 3})
        ledger = await store.new_ledger()
        for _ in range(2):
            await ledger.admit(request_at(store, agent))
        await pass_time(3600)
        quotas = (await ledger.admit(request_at(store, agent))).quotas.quotas
        assert [quota.used for quota in quotas] == [1, 3]

    @pytest.mark.parametrize("window", list(Window))
    async def test_whoever_waits_as_told_is_admitted(self, store: Store, pass_time: PassTime, window: Window) -> None:
        agent = await stored_agent(store, rate_limit_config={f"requests_per_{window.value}": 3})
        ledger = await store.new_ledger()
        for _ in range(3):
            await ledger.admit(request_at(store, agent))
            await pass_time(3 * window.bucket_s)
        with pytest.raises(RateLimited) as refusal:
            await ledger.admit(request_at(store, agent))
        await pass_time(refusal.value.retry_after_s + window.bucket_s)
        await ledger.admit(request_at(store, agent))

    @pytest.mark.parametrize("window", list(Window))
    async def test_a_forecast_follows_the_windows(self, store: Store, pass_time: PassTime, window: Window) -> None:
        agent = await stored_agent(store, rate_limit_config={f"requests_per_{window.value}": 3})
        ledger = await store.new_ledger()
        for used in (1, 2, 3):
            await ledger.admit(request_at(store, agent))
            [quota] = (await ledger.forecast(agent.org_id, agent.id)).quotas.quotas
            assert (quota.used, quota.remaining) == (used, 3 - used)
            await pass_time(window.seconds / 4)
        for used in (2, 1, 0):
            forecast = await ledger.forecast(agent.org_id, agent.id)
            [quota] = forecast.quotas.quotas
            assert (quota.used, forecast.rate_limited) == (used + 1, used == 2)
            assert 0 < quota.resets_in_s <= window.seconds / 4 + 2 * window.bucket_s
            before = forecast.at
            await pass_time(quota.resets_in_s + window.bucket_s)
            forecast = await ledger.forecast(agent.org_id, agent.id)
            [quota] = forecast.quotas.quotas
            assert (quota.used, quota.remaining) == (used, 3 - used)
            assert forecast.at > before

    async def test_what_a_dead_instance_left_running_is_ended_and_charged(
        self, store: Store, pass_time: PassTime
    ) -> None:
        agent = await stored_agent(store, budget_config={"max_cost_per_invocation": "0.2"})
        dead, survivor = await store.new_ledger(), await store.new_ledger()
        left = (await dead.admit(request_at(store, agent))).invocation
        settled = await dead.settle(conclude((await dead.admit(request_at(store, agent))).invocation))
        kept = (await survivor.admit(request_at(store, agent))).invocation
        await self.outlive(survivor, pass_time)
        assert await survivor.recover() >= 1
        ended = await self.read(store, left)
        assert ended == attrs.evolve(left.interrupted(left.created_at), completed_at=ended.completed_at)
        assert ended.completed_at is not None
        assert (ended.status, ended.error_code) == (InvocationStatus.UNKNOWN, ErrorCode.INTERRUPTED)
        assert ended.cost == left.reservation is not None
        assert await self.read(store, kept) == kept
        assert await self.read(store, settled) == settled
        account = (await balanced(store, survivor, agent)).account
        assert account == BudgetAccount(spent=Decimal("0.4"), reserved=Decimal("0.2"))

    async def test_recovery_happens_once(self, store: Store, pass_time: PassTime) -> None:
        agent = await stored_agent(store, budget_config={"max_cost_per_invocation": 1})
        dead = await store.new_ledger()
        survivors = [await store.new_ledger() for _ in range(3)]
        await dead.admit(request_at(store, agent))
        await self.outlive(survivors[0], pass_time)
        await asyncio.gather(*(survivor.heartbeat() for survivor in survivors))
        counts = await asyncio.gather(*(survivor.recover() for survivor in survivors))
        assert sum(counts) >= 1
        assert await survivors[0].recover() == 0
        assert (await balanced(store, survivors[0], agent)).account.spent == 1

    async def test_an_instance_within_its_lease_is_alive(self, store: Store, pass_time: PassTime) -> None:
        agent = await stored_agent(store)
        quiet, other = await store.new_ledger(), await store.new_ledger()
        running = (await quiet.admit(request_at(store, agent))).invocation
        await pass_time(LEASE_S - TOLERANCE_S)
        await other.heartbeat()
        await other.recover()
        assert await self.read(store, running) == running

    async def test_a_recorded_call_is_not_recovered(self, store: Store, pass_time: PassTime) -> None:
        agent = await stored_agent(store)
        dead, survivor = await store.new_ledger(), await store.new_ledger()
        call = make_finished_call(agent)
        await dead.record(call)
        await self.outlive(survivor, pass_time)
        await survivor.recover()
        assert await self.read(store, call) == call

    async def test_a_settlement_after_the_verdict_is_kept_as_evidence(self, store: Store, pass_time: PassTime) -> None:
        agent = await stored_agent(store, budget_config={"max_cost_per_invocation": 1})
        dead, survivor = await store.new_ledger(), await store.new_ledger()
        left = (await dead.admit(request_at(store, agent))).invocation
        await self.outlive(survivor, pass_time)
        await survivor.recover()
        verdict = await self.read(store, left)
        late = conclude(left, costing("0.25"))
        with_evidence = attrs.evolve(verdict, attempts=late.attempts)
        assert await dead.settle(late) == with_evidence
        assert await self.read(store, left) == with_evidence
        assert await dead.settle(conclude(left, timed_out())) == with_evidence
        assert await dead.settle(late) == with_evidence
        assert (await balanced(store, survivor, agent)).account.spent == 1

    async def test_the_living_settle_what_they_admitted_long_ago(self, store: Store, pass_time: PassTime) -> None:
        agent = await stored_agent(store, budget_config={"max_cost_per_invocation": 1})
        ledger, other = await store.new_ledger(), await store.new_ledger()
        admitted = (await ledger.admit(request_at(store, agent))).invocation
        for _ in range(12):
            await pass_time(HEARTBEAT_S)
            await ledger.heartbeat()
            await other.heartbeat()
            await other.recover()
        finished = conclude(admitted)
        assert await ledger.settle(finished) == finished

    async def outlive(self, survivor: InvocationLedger, pass_time: PassTime) -> None:
        """Every lease runs out but the survivor's."""
        for _ in range(10):
            await pass_time((LEASE_S + TOLERANCE_S) / 10)
            await survivor.heartbeat()

    async def read(self, store: Store, invocation: ExternalAgentInvocation) -> ExternalAgentInvocation:
        return await store.invocation_reader.read(invocation.org_id, invocation.external_agent_id, invocation.id)
