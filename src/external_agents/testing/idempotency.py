"""What InvocationLedger promises of idempotency keys: one invocation, answered again for 24 hours."""

from __future__ import annotations

import asyncio
from decimal import Decimal
from typing import Any

import attrs
import pytest

from external_agents.domain.agent import AgentStatus, ExternalAgent
from external_agents.domain.errors import AgentInactive, AgentNotFound, ExternalAgentsError, StaleVersion
from external_agents.domain.idempotency import KEPT_FOR, KEY_LENGTH_MAX
from external_agents.domain.invocation import ExternalAgentInvocation, InvocationStatus, Outcome
from external_agents.domain.json_values import JsonText
from external_agents.domain.refusals import (
    AdmissionRefused,
    BudgetExceeded,
    IdempotencyKeyInFlight,
    IdempotencyKeyReused,
    RateLimited,
)
from external_agents.ports.ledger import LEASE_S, Admission, AdmissionRequest, InvocationLedger
from external_agents.testing.builders import conclude, costing, new_org, refused, timed_out
from external_agents.testing.ledger import balanced, changed, request_at, rows_of, stored_agent
from external_agents.testing.stores import PassTime, Store

KEY = "order-17"
LIMITED: dict[str, Any] = {
    "rate_limit_config": {"requests_per_hour": 5},
    "budget_config": {"max_cost_per_invocation": "0.2", "max_monthly_cost": "1"},
}
KEPT_S = KEPT_FOR.total_seconds()
TOLERANCE_S = 30.0
"""What a real clock may go on by while a test runs."""


def keyed(store: Store, agent: ExternalAgent, key: str = KEY, text: str = '{"a":1,"b":[2]}') -> AdmissionRequest:
    return request_at(store, agent, idempotency_key=key, request=JsonText(text))


async def used(ledger: InvocationLedger, agent: ExternalAgent) -> tuple[list[int], Decimal, Decimal]:
    """Places taken, spent, reserved."""
    forecast = await ledger.forecast(agent.org_id, agent.id)
    return [quota.used for quota in forecast.quotas.quotas], forecast.account.spent, forecast.account.reserved


class IdempotencyContract:
    """
    For InvocationLedger, where time can be made to pass.

    Fixtures:
        store (Store): of any scope.
        pass_time (PassTime): for this store; it moves what the store keeps of idempotency keys too.
    """

    @pytest.mark.parametrize(
        "outcome",
        [costing(None), costing("0.05"), refused(), timed_out()],
        ids=["free", "costly", "refused", "timeout"],
    )
    async def test_what_has_ended_is_answered_again_and_takes_nothing(self, store: Store, outcome: Outcome) -> None:
        agent = await stored_agent(store, **LIMITED)
        ledger, other = await store.new_ledger(), await store.new_ledger()
        first = await ledger.admit(keyed(store, agent))
        assert not first.replayed
        ended = await ledger.settle(conclude(first.invocation, outcome))
        before = await used(ledger, agent)
        for instance in (ledger, other, ledger):
            request = keyed(store, agent)
            again = await instance.admit(request)
            assert (again.replayed, again.invocation) == (True, ended)
            assert not await store.invocation_reader.exists(agent.org_id, request.invocation_id)
            assert [quota.used for quota in again.quotas.quotas] == [1]
        assert await used(ledger, agent) == before
        assert list(await rows_of(store, agent)) == [ended]
        await balanced(store, ledger, agent)

    async def test_a_replay_shows_the_quotas_of_now(self, store: Store) -> None:
        agent = await stored_agent(store, **LIMITED)
        ledger = await store.new_ledger()
        await self.ended(store, ledger, keyed(store, agent))
        await ledger.admit(request_at(store, agent))
        again = await ledger.admit(keyed(store, agent))
        assert [(quota.used, quota.remaining) for quota in again.quotas.quotas] == [(2, 3)]

    @pytest.mark.parametrize(
        "text", ['{ "b" : [2.0], "a" : 1e0 }', '{"\\u0061":10e-1,"b":[2]}', '{"a":9,"a":1,"b":[2]}']
    )
    async def test_equal_json_is_the_same_payload(self, store: Store, text: str) -> None:
        agent = await stored_agent(store)
        ledger = await store.new_ledger()
        ended = await self.ended(store, ledger, keyed(store, agent))
        assert (await ledger.admit(keyed(store, agent, text=text))).invocation == ended

    @pytest.mark.parametrize("text", ['{"a":1,"b":[3]}', '{"a":1}', '{"a":1,"b":2}', '{"a":"1","b":[2]}', "null"])
    async def test_another_payload_is_refused_whether_the_first_has_ended_or_not(self, store: Store, text: str) -> None:
        agent = await stored_agent(store, **LIMITED)
        ledger = await store.new_ledger()
        first = (await ledger.admit(keyed(store, agent))).invocation
        running = await used(ledger, agent)
        with pytest.raises(IdempotencyKeyReused):
            await ledger.admit(keyed(store, agent, text=text))
        assert await used(ledger, agent) == running
        ended = await ledger.settle(conclude(first))
        with pytest.raises(IdempotencyKeyReused):
            await ledger.admit(keyed(store, agent, text=text))
        assert (await ledger.admit(keyed(store, agent))).invocation == ended
        assert len(await rows_of(store, agent)) == 1

    async def test_one_that_runs_is_in_flight(self, store: Store) -> None:
        agent = await stored_agent(store, **LIMITED)
        ledger, other = await store.new_ledger(), await store.new_ledger()
        first = (await ledger.admit(keyed(store, agent))).invocation
        before = await used(ledger, agent)
        for instance in (ledger, other):
            with pytest.raises(IdempotencyKeyInFlight) as refusal:
                await instance.admit(keyed(store, agent))
            assert refusal.value.retry_after_s >= 1
        assert await used(ledger, agent) == before
        ended = await ledger.settle(conclude(first))
        assert (await other.admit(keyed(store, agent))).invocation == ended

    async def test_of_many_at_once_exactly_one_is_admitted(self, store: Store) -> None:
        """There is room for all of them: a limiter outside the ledger may hold a place for each, for a moment."""
        agent = await stored_agent(store, **{**LIMITED, "rate_limit_config": {"requests_per_hour": 20}})
        ledgers = [await store.new_ledger(), await store.new_ledger()]
        keys = ["first", "second"]
        requests = [keyed(store, agent, keys[number // 2 % 2]) for number in range(20)]
        results = await asyncio.gather(
            *(ledgers[number % 2].admit(request) for number, request in enumerate(requests)), return_exceptions=True
        )
        admitted = [result.invocation for result in results if isinstance(result, Admission)]
        assert {row.id for row in await rows_of(store, agent)} == {invocation.id for invocation in admitted}
        assert len(admitted) == 2
        others = [type(result) for result in results if not isinstance(result, Admission)]
        # Where the limits live elsewhere, a place that is about to be given back stands against others.
        assert IdempotencyKeyInFlight in others
        assert set(others) <= {IdempotencyKeyInFlight, RateLimited}
        assert await used(ledgers[0], agent) == ([2], Decimal(0), Decimal("0.4"))

    async def test_answers_and_settlements_may_race(self, store: Store) -> None:
        agent = await stored_agent(store)
        ledgers = [await store.new_ledger(), await store.new_ledger()]
        for number in range(5):
            first = (await ledgers[0].admit(keyed(store, agent, f"key {number}"))).invocation
            ended, *results = await asyncio.gather(
                ledgers[0].settle(conclude(first)),
                *(ledgers[caller % 2].admit(keyed(store, agent, f"key {number}")) for caller in range(6)),
                return_exceptions=True,
            )
            for result in results:
                assert isinstance(result, Admission | IdempotencyKeyInFlight)
                assert isinstance(result, IdempotencyKeyInFlight) or (result.replayed and result.invocation == ended)
        assert len(await rows_of(store, agent)) == 5

    @pytest.mark.parametrize(
        "key", ["k", "K", "\u043a\u043b\u044e\u0447 \u00fc", " ", "x" * KEY_LENGTH_MAX, "\U0001f511" * KEY_LENGTH_MAX]
    )
    async def test_keys_are_told_apart_to_the_character(self, store: Store, key: str) -> None:
        agent = await stored_agent(store)
        ledger = await store.new_ledger()
        ended = await self.ended(store, ledger, keyed(store, agent, key))
        for other in ("k ", key[:-1] + "y", key.swapcase() + "-"):
            assert not (await ledger.admit(keyed(store, agent, other))).replayed
        assert (await ledger.admit(keyed(store, agent, key))).invocation == ended

    async def test_a_key_belongs_to_an_agent_of_an_organisation(self, store: Store) -> None:
        first = await stored_agent(store)
        sibling = await stored_agent(store, org_id=first.org_id)
        namesake = await stored_agent(store, id=first.id, org_id=new_org())
        ledger = await store.new_ledger()
        ended = [await self.ended(store, ledger, keyed(store, agent)) for agent in (first, sibling, namesake)]
        assert len({invocation.id for invocation in ended}) == 3
        for agent, invocation in zip((first, sibling, namesake), ended, strict=True):
            assert (await ledger.admit(keyed(store, agent))).invocation == invocation

    async def test_without_a_key_nothing_is_answered_again(self, store: Store) -> None:
        agent = await stored_agent(store)
        ledger = await store.new_ledger()
        ended = await self.ended(store, ledger, keyed(store, agent))
        for _ in range(2):
            fresh = await ledger.admit(request_at(store, agent, request=ended.request))
            assert not fresh.replayed

    async def test_a_refusal_keeps_no_key(self, store: Store) -> None:
        ledger = await store.new_ledger()
        agent = await stored_agent(store)
        cases: list[tuple[dict[str, Any], type[ExternalAgentsError]]] = [
            ({"rate_limit_config": {"requests_per_minute": 0}}, RateLimited),
            ({"budget_config": {"max_monthly_cost": 0}}, BudgetExceeded),
            ({"status": AgentStatus.INACTIVE}, AgentInactive),
        ]
        for number, (stands_against, refusal) in enumerate(cases):
            agent = await changed(store, agent, **stands_against)
            with pytest.raises(refusal):
                await ledger.admit(keyed(store, agent, f"key {number}"))
            with pytest.raises(StaleVersion):
                await ledger.admit(keyed(store, attrs.evolve(agent, version=agent.version - 1), f"key {number}"))
            free = {"rate_limit_config": None, "budget_config": None, "status": AgentStatus.ACTIVE}
            agent = await changed(store, agent, **free)
            admission = await ledger.admit(keyed(store, agent, f"key {number}", text='"another"'))
            assert not admission.replayed

    async def test_a_replay_needs_no_place_and_no_budget(self, store: Store) -> None:
        agent = await stored_agent(
            store,
            rate_limit_config={"requests_per_minute": 1},
            budget_config={"max_cost_per_invocation": 1, "max_monthly_cost": 1},
        )
        ledger = await store.new_ledger()
        first = (await ledger.admit(keyed(store, agent))).invocation
        with pytest.raises(IdempotencyKeyInFlight):
            await ledger.admit(keyed(store, agent))
        with pytest.raises(AdmissionRefused):
            await ledger.admit(keyed(store, agent, "another"))
        ended = await ledger.settle(conclude(first))
        again = await ledger.admit(keyed(store, agent))
        assert again.invocation == ended
        assert [quota.remaining for quota in again.quotas.quotas] == [0]
        with pytest.raises(IdempotencyKeyReused):
            await ledger.admit(keyed(store, agent, text="{}"))
        with pytest.raises(RateLimited):
            await ledger.admit(keyed(store, agent, "another"))

    async def test_the_agents_state_is_told_before_its_keys(self, store: Store) -> None:
        agent = await stored_agent(store)
        ledger = await store.new_ledger()
        ended = await self.ended(store, ledger, keyed(store, agent))
        renamed = await changed(store, agent, name="Another")
        for text in ("{}", ended.request.text):
            with pytest.raises(StaleVersion):
                await ledger.admit(keyed(store, agent, text=text))
        assert (await ledger.admit(keyed(store, renamed))).invocation == ended
        switched_off = await changed(store, renamed, status=AgentStatus.INACTIVE)
        for text in ("{}", ended.request.text):
            with pytest.raises(AgentInactive):
                await ledger.admit(keyed(store, switched_off, text=text))
        deleted = switched_off.deleted(by="tester", at=store.now())
        await store.agent_writer.delete(deleted)
        with pytest.raises(AgentNotFound):
            await ledger.admit(keyed(store, deleted))

    async def test_a_key_is_kept_for_24_hours(self, store: Store, pass_time: PassTime) -> None:
        agent = await stored_agent(store, **LIMITED)
        ledger = await store.new_ledger()
        ended = await self.ended(store, ledger, keyed(store, agent))
        await pass_time(KEPT_S - TOLERANCE_S)
        await ledger.heartbeat()
        for _ in range(2):  # A replay does not keep it for longer.
            assert (await ledger.admit(keyed(store, agent))).invocation == ended
        await pass_time(TOLERANCE_S)
        await ledger.heartbeat()
        second = await self.ended(store, ledger, keyed(store, agent, text='"another payload"'))
        assert second.id != ended.id
        again = await ledger.admit(keyed(store, agent, text='"another payload"'))
        assert (again.replayed, again.invocation) == (True, second)
        with pytest.raises(IdempotencyKeyReused):
            await ledger.admit(keyed(store, agent))
        assert {row.id for row in await rows_of(store, agent)} == {ended.id, second.id}

    async def test_what_recovery_ended_is_answered_again_as_unknown(self, store: Store, pass_time: PassTime) -> None:
        agent = await stored_agent(store, **LIMITED)
        dead, survivor = await store.new_ledger(), await store.new_ledger()
        left = (await dead.admit(keyed(store, agent))).invocation
        with pytest.raises(IdempotencyKeyInFlight):
            await survivor.admit(keyed(store, agent))
        for _ in range(10):
            await pass_time((LEASE_S + TOLERANCE_S) / 10)
            await survivor.heartbeat()
        await survivor.recover()
        again = await survivor.admit(keyed(store, agent))
        assert (again.replayed, again.invocation.id) == (True, left.id)
        assert again.invocation.status is InvocationStatus.UNKNOWN
        assert again.invocation.cost == left.reservation
        late = await dead.settle(conclude(left))
        assert late.attempts
        assert (await survivor.admit(keyed(store, agent))).invocation == late

    async def ended(self, store: Store, ledger: InvocationLedger, request: AdmissionRequest) -> ExternalAgentInvocation:
        """The first with its key, ended."""
        admission = await ledger.admit(request)
        assert not admission.replayed
        return await ledger.settle(conclude(admission.invocation))
