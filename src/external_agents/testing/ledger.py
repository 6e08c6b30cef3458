"""What InvocationLedger promises, apart from what only the passing of time shows (`ledger_time`)."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import attrs
import pytest

from external_agents.domain.agent import AgentStatus, ExternalAgent
from external_agents.domain.budget import BudgetAccount, BudgetConfig, Money, budget_month
from external_agents.domain.errors import AgentInactive, AgentNotFound, ExternalAgentsError, StaleVersion
from external_agents.domain.ids import created_at_of
from external_agents.domain.invocation import ExternalAgentInvocation, InvocationStatus
from external_agents.domain.json_values import JsonText
from external_agents.domain.rate_limit import Window
from external_agents.domain.refusals import AdmissionRefused, BudgetExceeded, RateLimited
from external_agents.ports.ledger import Admission, AdmissionRequest, Forecast, InvocationLedger
from external_agents.ports.repositories import InvocationQuery
from external_agents.testing.builders import (
    conclude,
    costing,
    id_at,
    make_agent,
    make_finished_call,
    make_request,
    new_id,
    new_org,
    next_version,
    refused,
    timed_out,
)
from external_agents.testing.stores import Store

FIRST_MONTH = datetime(2026, 1, 31, 23, 59, 59, 999000, tzinfo=UTC)
SECOND_MONTH = datetime(2026, 2, 1, tzinfo=UTC)
CLOCKS_APART = timedelta(seconds=5)
"""What a store's clock and a test's may differ by."""


async def stored_agent(store: Store, **changes: Any) -> ExternalAgent:
    agent = make_agent(**changes)
    await store.agent_writer.create(agent)
    return agent


async def changed(store: Store, agent: ExternalAgent, **fields: Any) -> ExternalAgent:
    agent = next_version(agent, **fields)
    await store.agent_writer.update(agent)
    return agent


def request_at(store: Store, agent: ExternalAgent, **changes: Any) -> AdmissionRequest:
    """A request of the store's present."""
    return make_request(agent, **{"invocation_id": id_at(store.now()), **changes})


async def rows_of(store: Store, agent: ExternalAgent) -> Sequence[ExternalAgentInvocation]:
    query = InvocationQuery(org_id=agent.org_id, agent_ids=frozenset({agent.id}))
    return await store.invocation_reader.list(query, limit=1000)


async def balanced(store: Store, ledger: InvocationLedger, agent: ExternalAgent) -> Forecast:
    """The forecast, once its figures are found equal to the sums over the rows of this month and currency."""
    forecast = await ledger.forecast(agent.org_id, agent.id)
    rows = [row for row in await rows_of(store, agent) if budget_month(row.created_at) == budget_month(store.now())]
    currency = agent.budget.currency
    costs = [row.cost for row in rows if row.cost is not None]
    reservations = [
        row.reservation for row in rows if row.reservation is not None and row.status is InvocationStatus.RUNNING
    ]
    assert forecast.account.spent == _sum_in(currency, costs)
    assert forecast.account.reserved == _sum_in(currency, reservations)
    return forecast


def _sum_in(currency: str, amounts: Sequence[Money]) -> Decimal:
    return sum((money.amount for money in amounts if money.currency == currency), Decimal(0))


def split(results: Sequence[Admission | BaseException]) -> tuple[list[Admission], list[BaseException]]:
    admitted = [result for result in results if isinstance(result, Admission)]
    return admitted, [result for result in results if isinstance(result, BaseException)]


def usd(amount: str) -> Money:
    return Money(Decimal(amount), "USD")


class LedgerContract:
    """
    For InvocationLedger over one store.

    Fixtures:
        store (Store): of any scope. Its ledgers are opened with `new_ledger`.
    """

    async def test_an_admission_is_recorded_as_running(self, store: Store) -> None:
        agent = await stored_agent(store)
        ledger = await store.new_ledger()
        request = request_at(
            store, agent, lineage_hop_id="hop", initiated_by="billing", request=JsonText("[1.0,  2e3]")
        )
        admission = await ledger.admit(request)
        assert admission.invocation == ExternalAgentInvocation(
            id=request.invocation_id,
            org_id=agent.org_id,
            external_agent_id=agent.id,
            lineage_hop_id="hop",
            initiated_by="billing",
            status=InvocationStatus.RUNNING,
            request=JsonText("[1.0,  2e3]"),
            trace_id=request.trace_id,
            created_at=created_at_of(request.invocation_id),
        )
        assert admission.quotas.quotas == ()
        assert list(await rows_of(store, agent)) == [admission.invocation]

    async def test_the_reservation_is_the_agents_amount_even_without_a_cap(self, store: Store) -> None:
        agent = await stored_agent(store, budget_config={"max_cost_per_invocation": "0.000000001", "currency": "CHF"})
        ledger = await store.new_ledger()
        admission = await ledger.admit(request_at(store, agent))
        assert admission.invocation.reservation == Money(Decimal("0.000000001"), "CHF")
        assert (await balanced(store, ledger, agent)).account.reserved == Decimal("0.000000001")

    async def test_a_refusal_leaves_no_trace(self, store: Store) -> None:
        ledger = await store.new_ledger()
        agent = await stored_agent(
            store,
            rate_limit_config={"requests_per_minute": 5},
            budget_config={"max_cost_per_invocation": 1, "max_monthly_cost": 5},
        )
        await ledger.admit(request_at(store, agent))
        before = await balanced(store, ledger, agent)
        full = await changed(store, agent, rate_limit_config={"requests_per_minute": 1})
        poor = attrs.evolve(
            next_version(full, rate_limit_config=agent.rate_limit_config),
            budget_config={
                "max_cost_per_invocation": 1,
                "max_monthly_cost": 1,
            },
        )
        switched_off = next_version(poor, status=AgentStatus.INACTIVE)
        cases: list[tuple[ExternalAgent | None, AdmissionRequest, type[ExternalAgentsError]]] = [
            (None, request_at(store, attrs.evolve(agent, id=new_id())), AgentNotFound),
            (None, request_at(store, attrs.evolve(full, org_id=new_org())), AgentNotFound),
            (None, request_at(store, attrs.evolve(full, version=1)), StaleVersion),
            (None, request_at(store, attrs.evolve(full, version=3)), StaleVersion),
            (None, request_at(store, full), RateLimited),
            (poor, request_at(store, poor), BudgetExceeded),
            (switched_off, request_at(store, switched_off), AgentInactive),
        ]
        for update, request, error in cases:
            if update is not None:
                await store.agent_writer.update(update)
            with pytest.raises(error):
                await ledger.admit(request)
            assert not await store.invocation_reader.exists(request.org_id, request.invocation_id)
        restored = await changed(
            store,
            switched_off,
            status=AgentStatus.ACTIVE,
            rate_limit_config=agent.rate_limit_config,
            budget_config=agent.budget_config,
        )
        after = await balanced(store, ledger, restored)
        assert after.account == before.account
        assert [quota.used for quota in after.quotas.quotas] == [1]
        assert len(await rows_of(store, agent)) == 1

    async def test_a_deleted_agent_is_not_found(self, store: Store) -> None:
        agent = await stored_agent(store)
        deleted = agent.deleted(by="tester", at=store.now())
        await store.agent_writer.delete(deleted)
        ledger = await store.new_ledger()
        for version in (1, 2):
            with pytest.raises(AgentNotFound):
                await ledger.admit(request_at(store, attrs.evolve(deleted, version=version)))
        assert not await rows_of(store, agent)

    async def test_a_stale_version_is_told_before_the_status(self, store: Store) -> None:
        agent = await stored_agent(store)
        await changed(store, agent, status=AgentStatus.INACTIVE)
        with pytest.raises(StaleVersion):
            await (await store.new_ledger()).admit(request_at(store, agent))

    @pytest.mark.parametrize("window", list(Window))
    async def test_a_window_admits_its_limit(self, store: Store, window: Window) -> None:
        agent = await stored_agent(store, rate_limit_config={f"requests_per_{window.value}": 3})
        ledger = await store.new_ledger()
        for used in (1, 2, 3):
            [quota] = (await ledger.admit(request_at(store, agent))).quotas.quotas
            assert (quota.window, quota.limit, quota.used, quota.remaining) == (window, 3, used, 3 - used)
            assert 0 < quota.resets_in_s <= window.seconds * 1.02
        with pytest.raises(RateLimited) as refusal:
            await ledger.admit(request_at(store, agent))
        assert 1 <= refusal.value.retry_after_s <= window.seconds * 1.02 + 1
        [quota] = refusal.value.quotas.quotas
        assert (quota.window, quota.used, quota.remaining) == (window, 3, 0)

    async def test_quotas_stand_in_the_order_of_the_windows(self, store: Store) -> None:
        agent = await stored_agent(
            store, rate_limit_config={"requests_per_day": 9, "requests_per_minute": 7, "requests_per_hour": 8}
        )
        admission = await (await store.new_ledger()).admit(request_at(store, agent))
        assert [(quota.window, quota.limit) for quota in admission.quotas.quotas] == [
            (Window.MINUTE, 7),
            (Window.HOUR, 8),
            (Window.DAY, 9),
        ]

    async def test_the_windows_are_taken_all_or_none(self, store: Store) -> None:
        agent = await stored_agent(
            store, rate_limit_config={"requests_per_minute": 5, "requests_per_hour": 5, "requests_per_day": 1}
        )
        ledger = await store.new_ledger()
        await ledger.admit(request_at(store, agent))
        for _ in range(3):
            with pytest.raises(RateLimited):
                await ledger.admit(request_at(store, agent))
        forecast = await ledger.forecast(agent.org_id, agent.id)
        assert [quota.used for quota in forecast.quotas.quotas] == [1, 1, 1]

    async def test_a_limit_of_zero_admits_none(self, store: Store) -> None:
        ledger = await store.new_ledger()
        for window in Window:
            agent = await stored_agent(store, rate_limit_config={f"requests_per_{window.value}": 0})
            with pytest.raises(RateLimited) as refusal:
                await ledger.admit(request_at(store, agent))
            assert refusal.value.retry_after_s == window.seconds
            assert (await ledger.forecast(agent.org_id, agent.id)).rate_limited

    async def test_a_limit_added_later_counts_what_was_admitted_before(self, store: Store) -> None:
        agent = await stored_agent(store)
        ledger = await store.new_ledger()
        for _ in range(3):
            await ledger.admit(request_at(store, agent))
        limited = await changed(store, agent, rate_limit_config={"requests_per_minute": 4, "requests_per_day": 4})
        admission = await ledger.admit(request_at(store, limited))
        assert [quota.used for quota in admission.quotas.quotas] == [4, 4]
        with pytest.raises(RateLimited):
            await ledger.admit(request_at(store, limited))

    async def test_a_lowered_limit_counts_what_was_admitted_before(self, store: Store) -> None:
        agent = await stored_agent(store, rate_limit_config={"requests_per_hour": 5})
        ledger = await store.new_ledger()
        for _ in range(4):
            await ledger.admit(request_at(store, agent))
        lowered = await changed(store, agent, rate_limit_config={"requests_per_hour": 2})
        with pytest.raises(RateLimited) as refusal:
            await ledger.admit(request_at(store, lowered))
        [quota] = refusal.value.quotas.quotas
        assert (quota.limit, quota.used, quota.remaining) == (2, 4, 0)
        raised = await changed(store, lowered, rate_limit_config={"requests_per_hour": 5})
        await ledger.admit(request_at(store, raised))

    async def test_agents_have_windows_of_their_own(self, store: Store) -> None:
        first = await stored_agent(store, rate_limit_config={"requests_per_day": 1})
        sibling = await stored_agent(store, org_id=first.org_id, rate_limit_config={"requests_per_day": 1})
        namesake = await stored_agent(store, id=first.id, rate_limit_config={"requests_per_day": 1})
        ledger = await store.new_ledger()
        for agent in (first, sibling, namesake):
            await ledger.admit(request_at(store, agent))
        for agent in (first, sibling, namesake):
            with pytest.raises(RateLimited):
                await ledger.admit(request_at(store, agent))

    async def test_room_for_some_admits_exactly_some(self, store: Store) -> None:
        """Concurrent callers on two instances, against a window, then against a cap."""
        ledgers = [await store.new_ledger(), await store.new_ledger()]
        room = 7
        configs: list[tuple[dict[str, Any], type[AdmissionRefused]]] = [
            ({"rate_limit_config": {"requests_per_minute": room}}, RateLimited),
            ({"budget_config": {"max_cost_per_invocation": "0.1", "max_monthly_cost": "0.7"}}, BudgetExceeded),
        ]
        for config, refusal in configs:
            agent = await stored_agent(store, **config)
            results = await asyncio.gather(
                *(ledgers[number % 2].admit(request_at(store, agent)) for number in range(40)), return_exceptions=True
            )
            admitted, refusals = split(results)
            assert len(admitted) == room
            assert {type(error) for error in refusals} == {refusal}
            rows = await rows_of(store, agent)
            assert {row.id for row in rows} == {admission.invocation.id for admission in admitted}
            await balanced(store, ledgers[0], agent)

    async def test_settlements_and_admissions_together_keep_the_books(self, store: Store) -> None:
        agent = await stored_agent(store, budget_config={"max_cost_per_invocation": "0.3", "max_monthly_cost": "2.5"})
        ledger, other = await store.new_ledger(), await store.new_ledger()
        outcomes = [costing(None), costing("0.05"), costing("0.4"), refused(), timed_out()]

        async def one(number: int) -> bool:
            mine = ledger if number % 2 else other
            try:
                admission = await mine.admit(request_at(store, agent))
            except BudgetExceeded:
                return False
            await mine.settle(conclude(admission.invocation, outcomes[number % len(outcomes)]))
            return True

        ran = [await asyncio.gather(*(one(number) for number in range(10))) for _ in range(3)]
        assert any(any(batch) for batch in ran)
        assert not all(all(batch) for batch in ran)
        forecast = await balanced(store, ledger, agent)
        assert forecast.account.reserved == 0
        assert forecast.account.spent <= Decimal("2.5") + 10 * Decimal("0.1")

    @pytest.mark.parametrize(
        ("cost", "spent"),
        [(usd("1"), "1"), (usd("0.25"), "0.25"), (usd("3.5"), "3.5"), (usd("0"), "0"), (None, "0")],
    )
    async def test_a_settlement_turns_the_reservation_into_the_cost(
        self, store: Store, cost: Money | None, spent: str
    ) -> None:
        agent = await stored_agent(store, budget_config={"max_cost_per_invocation": 1})
        ledger = await store.new_ledger()
        admitted = (await ledger.admit(request_at(store, agent))).invocation
        other = (await ledger.admit(request_at(store, agent))).invocation
        finished = conclude(admitted, cost=cost)
        assert await ledger.settle(finished) == finished
        account = (await balanced(store, ledger, agent)).account
        assert account == BudgetAccount(spent=Decimal(spent), reserved=Decimal(1))
        await ledger.settle(conclude(other, cost=None))
        assert (await balanced(store, ledger, agent)).account.reserved == 0

    async def test_a_settlement_happens_once(self, store: Store) -> None:
        agent = await stored_agent(store, budget_config={"max_cost_per_invocation": 1})
        ledger, other = await store.new_ledger(), await store.new_ledger()
        admitted = (await ledger.admit(request_at(store, agent))).invocation
        first = conclude(admitted, cost=usd("0.5"))
        stored = await asyncio.gather(*(instance.settle(first) for instance in (ledger, other) * 5))
        assert set(stored) == {first}
        again = conclude(admitted, refused(), cost=usd("9"))
        assert await ledger.settle(again) == first
        assert await store.invocation_reader.read(agent.org_id, agent.id, admitted.id) == first
        assert (await balanced(store, ledger, agent)).account.spent == Decimal("0.5")

    async def test_a_cap_is_reached_and_not_passed(self, store: Store) -> None:
        agent = await stored_agent(store, budget_config={"max_cost_per_invocation": "0.1", "max_monthly_cost": "0.3"})
        ledger = await store.new_ledger()
        admitted = [(await ledger.admit(request_at(store, agent))).invocation for _ in range(3)]
        with pytest.raises(BudgetExceeded):
            await ledger.admit(request_at(store, agent))
        for invocation in admitted:
            await ledger.settle(conclude(invocation))
        with pytest.raises(BudgetExceeded):
            await ledger.admit(request_at(store, agent))
        account = (await balanced(store, ledger, agent)).account
        assert account == BudgetAccount(spent=Decimal("0.3"), reserved=Decimal(0))

    async def test_a_release_makes_room(self, store: Store) -> None:
        agent = await stored_agent(store, budget_config={"max_cost_per_invocation": 1, "max_monthly_cost": 1})
        ledger = await store.new_ledger()
        admitted = (await ledger.admit(request_at(store, agent))).invocation
        with pytest.raises(BudgetExceeded):
            await ledger.admit(request_at(store, agent))
        await ledger.settle(conclude(admitted, refused()))
        await ledger.admit(request_at(store, agent))

    async def test_a_cap_without_an_amount_admits_while_it_is_not_reached(self, store: Store) -> None:
        agent = await stored_agent(store, budget_config={"max_monthly_cost": "1"})
        ledger = await store.new_ledger()
        first = (await ledger.admit(request_at(store, agent))).invocation
        second = (await ledger.admit(request_at(store, agent))).invocation
        assert first.reservation is second.reservation is None
        await ledger.settle(conclude(first, costing("0.999999999")))
        third = (await ledger.admit(request_at(store, agent))).invocation
        await ledger.settle(conclude(second, costing("0.000000001")))
        with pytest.raises(BudgetExceeded):
            await ledger.admit(request_at(store, agent))
        await ledger.settle(conclude(third, costing("2")))
        assert (await balanced(store, ledger, agent)).account.spent == 3

    async def test_a_cap_of_zero_admits_what_costs_nothing(self, store: Store) -> None:
        ledger = await store.new_ledger()
        free = await stored_agent(store, budget_config={"max_cost_per_invocation": 0, "max_monthly_cost": 0})
        assert (await ledger.admit(request_at(store, free))).invocation.reservation == usd("0")
        unknown = await stored_agent(store, budget_config={"max_monthly_cost": 0})
        with pytest.raises(BudgetExceeded):
            await ledger.admit(request_at(store, unknown))

    async def test_a_cap_added_later_counts_what_was_charged_before(self, store: Store) -> None:
        agent = await stored_agent(store)
        ledger = await store.new_ledger()
        admitted = (await ledger.admit(request_at(store, agent))).invocation
        await ledger.settle(conclude(admitted, costing("0.95")))
        capped = await changed(store, agent, budget_config={"max_cost_per_invocation": "0.1", "max_monthly_cost": 1})
        with pytest.raises(BudgetExceeded):
            await ledger.admit(request_at(store, capped))
        assert (await balanced(store, ledger, capped)).account.spent == Decimal("0.95")

    async def test_a_change_of_the_amount_settles_the_old_reservation(self, store: Store) -> None:
        agent = await stored_agent(store, budget_config={"max_cost_per_invocation": 5, "max_monthly_cost": 10})
        ledger = await store.new_ledger()
        admitted = (await ledger.admit(request_at(store, agent))).invocation
        cheaper = await changed(store, agent, budget_config={"max_cost_per_invocation": 1, "max_monthly_cost": 10})
        assert (await balanced(store, ledger, cheaper)).account.reserved == 5
        await ledger.settle(conclude(admitted, refused()))
        assert (await balanced(store, ledger, cheaper)).account.reserved == 0

    async def test_currencies_are_kept_apart(self, store: Store) -> None:
        euros = {"max_cost_per_invocation": 1, "max_monthly_cost": 2, "currency": "EUR"}
        agent = await stored_agent(store, budget_config=euros)
        ledger = await store.new_ledger()
        spent = (await ledger.admit(request_at(store, agent))).invocation
        await ledger.settle(conclude(spent, currency="EUR"))
        reserved = (await ledger.admit(request_at(store, agent))).invocation
        dollars = await changed(store, agent, budget_config={**euros, "currency": "USD"})
        account = (await balanced(store, ledger, dollars)).account
        assert account == BudgetAccount()
        await ledger.admit(request_at(store, dollars))
        await ledger.settle(conclude(reserved, currency="EUR"))
        account = (await balanced(store, ledger, dollars)).account
        assert account == BudgetAccount(spent=Decimal(0), reserved=Decimal(1))
        back = await changed(store, dollars, budget_config=euros)
        account = (await balanced(store, ledger, back)).account
        assert account == BudgetAccount(spent=Decimal(2), reserved=Decimal(0))
        with pytest.raises(BudgetExceeded):
            await ledger.admit(request_at(store, back))

    async def test_months_are_kept_apart(self, store: Store) -> None:
        """The id's millisecond decides: the last one of January, the first one of February."""
        agent = await stored_agent(store, budget_config={"max_cost_per_invocation": 1, "max_monthly_cost": 1})
        ledger = await store.new_ledger()
        january = (await ledger.admit(request_at(store, agent, invocation_id=id_at(FIRST_MONTH)))).invocation
        with pytest.raises(BudgetExceeded):
            await ledger.admit(request_at(store, agent, invocation_id=id_at(FIRST_MONTH)))
        february = (await ledger.admit(request_at(store, agent, invocation_id=id_at(SECOND_MONTH)))).invocation
        await ledger.settle(conclude(january, refused()))
        with pytest.raises(BudgetExceeded):
            await ledger.admit(request_at(store, agent, invocation_id=id_at(SECOND_MONTH)))
        again = (await ledger.admit(request_at(store, agent, invocation_id=id_at(FIRST_MONTH)))).invocation
        await ledger.settle(conclude(again))
        await ledger.settle(conclude(february))
        for month in (FIRST_MONTH, SECOND_MONTH):
            with pytest.raises(BudgetExceeded):
                await ledger.admit(request_at(store, agent, invocation_id=id_at(month)))
        account = (await balanced(store, ledger, agent)).account
        assert account == BudgetAccount()

    async def test_agents_have_accounts_of_their_own(self, store: Store) -> None:
        config = {"max_cost_per_invocation": 1, "max_monthly_cost": 1}
        first = await stored_agent(store, budget_config=config)
        sibling = await stored_agent(store, org_id=first.org_id, budget_config=config)
        namesake = await stored_agent(store, id=first.id, budget_config=config)
        ledger = await store.new_ledger()
        for agent in (first, sibling, namesake):
            invocation = (await ledger.admit(request_at(store, agent))).invocation
            await ledger.settle(conclude(invocation))
        for agent in (first, sibling, namesake):
            assert (await balanced(store, ledger, agent)).account.spent == 1

    async def test_a_full_window_is_told_before_an_empty_budget(self, store: Store) -> None:
        agent = await stored_agent(
            store,
            rate_limit_config={"requests_per_minute": 1},
            budget_config={"max_cost_per_invocation": 1, "max_monthly_cost": 1},
        )
        ledger = await store.new_ledger()
        await ledger.admit(request_at(store, agent))
        with pytest.raises(RateLimited):
            await ledger.admit(request_at(store, agent))

    async def test_an_exceeded_budget_tells_the_quotas_and_takes_no_place(self, store: Store) -> None:
        agent = await stored_agent(
            store,
            rate_limit_config={"requests_per_minute": 5},
            budget_config={"max_cost_per_invocation": 1, "max_monthly_cost": 1},
        )
        ledger = await store.new_ledger()
        await ledger.admit(request_at(store, agent))
        for _ in range(3):
            with pytest.raises(BudgetExceeded) as refusal:
                await ledger.admit(request_at(store, agent))
            assert [(quota.used, quota.remaining) for quota in refusal.value.quotas.quotas] == [(1, 4)]

    async def test_a_record_takes_no_place_and_is_charged_nothing(self, store: Store) -> None:
        agent = await stored_agent(
            store,
            rate_limit_config={"requests_per_minute": 1},
            budget_config={"max_cost_per_invocation": 1, "max_monthly_cost": 1},
        )
        ledger = await store.new_ledger()
        calls = [make_finished_call(agent, id=id_at(store.now())) for _ in range(3)]
        for call in calls:
            await ledger.record(call)
        assert {row.id for row in await rows_of(store, agent)} == {call.id for call in calls}
        forecast = await balanced(store, ledger, agent)
        assert [quota.used for quota in forecast.quotas.quotas] == [0]
        assert forecast.account == BudgetAccount()
        await ledger.admit(request_at(store, agent))

    async def test_a_forecast_tells_what_an_admission_would_meet_and_takes_nothing(self, store: Store) -> None:
        agent = await stored_agent(
            store,
            rate_limit_config={"requests_per_minute": 2},
            budget_config={"max_cost_per_invocation": 1, "max_monthly_cost": 1},
        )
        ledger = await store.new_ledger()
        for _ in range(5):
            forecast = await balanced(store, ledger, agent)
            assert not forecast.rate_limited
            assert not forecast.over_budget
            assert [(quota.used, quota.resets_in_s) for quota in forecast.quotas.quotas] == [(0, 0)]
        await ledger.admit(request_at(store, agent))
        forecast = await balanced(store, ledger, agent)
        assert not forecast.rate_limited
        assert forecast.over_budget
        richer = await changed(store, agent, budget_config={"max_cost_per_invocation": 1, "max_monthly_cost": 2})
        await ledger.admit(request_at(store, richer))
        forecast = await balanced(store, ledger, richer)
        assert forecast.rate_limited
        assert forecast.over_budget
        assert forecast.account.reserved == 2

    async def test_a_forecast_without_limits(self, store: Store) -> None:
        agent = await stored_agent(store)
        ledger = await store.new_ledger()
        forecast = await balanced(store, ledger, agent)
        assert forecast.quotas.quotas == ()
        assert not forecast.rate_limited
        assert not forecast.over_budget
        assert forecast.budget is None

    async def test_a_forecast_names_its_time_its_month_and_its_budget(self, store: Store) -> None:
        config = {"max_cost_per_invocation": "0.50", "max_monthly_cost": 7, "currency": "EUR"}
        agent = await stored_agent(store, budget_config=config)
        ledger = await store.new_ledger()
        before = store.now()
        forecast = await ledger.forecast(agent.org_id, agent.id)
        assert before - CLOCKS_APART <= forecast.at <= store.now() + CLOCKS_APART
        assert forecast.month == budget_month(forecast.at)
        assert forecast.budget == BudgetConfig(per_invocation=Decimal("0.5"), monthly_cap=Decimal(7), currency="EUR")
        unbounded = await changed(store, agent, budget_config={})
        assert (await ledger.forecast(unbounded.org_id, unbounded.id)).budget == BudgetConfig()

    async def test_a_forecast_for_an_agent_that_is_not_there(self, store: Store) -> None:
        agent = await stored_agent(store)
        ledger = await store.new_ledger()
        for org_id, agent_id in [(agent.org_id, new_id()), (new_org(), agent.id)]:
            with pytest.raises(AgentNotFound):
                await ledger.forecast(org_id, agent_id)

    async def test_who_has_just_been_heard_of_holds_its_lease(self, store: Store) -> None:
        ledger = await store.new_ledger()
        await ledger.heartbeat()
        assert ledger.holds_lease()

    async def test_recovery_leaves_living_instances_alone(self, store: Store) -> None:
        agent = await stored_agent(store)
        ledger, other = await store.new_ledger(), await store.new_ledger()
        mine = (await ledger.admit(request_at(store, agent))).invocation
        theirs = (await other.admit(request_at(store, agent))).invocation
        for instance in (ledger, other):
            await instance.heartbeat()
            await instance.recover()
        assert {row.id for row in await rows_of(store, agent) if row.status is InvocationStatus.RUNNING} == {
            mine.id,
            theirs.id,
        }
