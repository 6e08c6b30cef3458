"""What InvocationLedger promises to those who keep the rate limits elsewhere."""

from __future__ import annotations

from typing import Any

import pytest

from external_agents.domain.agent import AgentStatus, ExternalAgent
from external_agents.domain.errors import AgentInactive, StaleVersion
from external_agents.domain.rate_limit import Quota, RateQuotas, Window
from external_agents.domain.refusals import BudgetExceeded, RateLimited
from external_agents.ports.ledger import AdmissionRequest
from external_agents.ports.rate_limiter import Place
from external_agents.testing.ledger import changed, request_at, stored_agent
from external_agents.testing.stores import Store

QUOTAS = RateQuotas((Quota(Window.DAY, 7, 5, 12.5),))
"""None that a ledger's own windows could come to."""


def with_place(store: Store, agent: ExternalAgent, **changes: Any) -> AdmissionRequest:
    return request_at(store, agent, verdict=Place(QUOTAS, "token"), **changes)


class LedgerVerdictContract:
    """
    For InvocationLedger, where the request says what a `RateLimiter` decided.

    Fixtures:
        store (Store): of any scope.
    """

    async def test_a_place_stands_for_the_ledgers_own_windows(self, store: Store) -> None:
        agent = await stored_agent(store, rate_limit_config={"requests_per_day": 1})
        ledger = await store.new_ledger()
        for _ in range(3):
            admission = await ledger.admit(with_place(store, agent))
            assert admission.quotas == QUOTAS
            assert await store.invocation_reader.exists(agent.org_id, admission.invocation.id)
        [quota] = (await ledger.admit(request_at(store, agent))).quotas.quotas
        assert quota.used == 1, "it has counted none of those that had a place"
        assert (await ledger.admit(with_place(store, agent))).quotas == QUOTAS
        with pytest.raises(RateLimited):
            await ledger.admit(request_at(store, agent))

    async def test_a_place_does_not_stand_for_the_budget(self, store: Store) -> None:
        agent = await stored_agent(store, budget_config={"max_cost_per_invocation": 1, "max_monthly_cost": 1})
        ledger = await store.new_ledger()
        assert (await ledger.admit(with_place(store, agent))).invocation.reservation is not None
        with pytest.raises(BudgetExceeded) as refusal:
            await ledger.admit(with_place(store, agent))
        assert refusal.value.quotas == QUOTAS

    async def test_a_refusal_is_raised_in_its_place(self, store: Store) -> None:
        """After the agent's version and status, before its budget."""
        agent = await stored_agent(store, budget_config={"max_monthly_cost": 0})
        ledger = await store.new_ledger()
        verdict = RateLimited("day", 99, QUOTAS)
        request = request_at(store, agent, verdict=verdict)
        with pytest.raises(RateLimited) as refusal:
            await ledger.admit(request)
        assert refusal.value is verdict
        assert not await store.invocation_reader.exists(agent.org_id, request.invocation_id)
        inactive = await changed(store, agent, status=AgentStatus.INACTIVE)
        with pytest.raises(StaleVersion):
            await ledger.admit(request_at(store, agent, verdict=verdict))
        with pytest.raises(AgentInactive):
            await ledger.admit(request_at(store, inactive, verdict=verdict))
