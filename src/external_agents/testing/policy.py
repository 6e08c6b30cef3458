"""What PolicyDecisionPoint promises, and the guardrails that no policy weakens."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal

import pytest

from external_agents.domain.access import PERMISSIONS, AccessRequest, Action, Principal
from external_agents.domain.agent import AgentStatus, ExternalAgent
from external_agents.ports.policy import PolicyDecisionPoint
from external_agents.testing.builders import ALL_PERMISSIONS, make_agent, new_org, principal_of

NOW = datetime(2026, 3, 10, 12, 0, 0, 123456, tzinfo=UTC)


def asked(principal: Principal, action: Action, agent: ExternalAgent | None) -> AccessRequest:
    return AccessRequest(principal, action, agent, NOW)


class PolicyContract:
    """
    For PolicyDecisionPoint, with no policies but the guardrails.

    Fixtures:
        policy (PolicyDecisionPoint): of any scope.
    """

    @pytest.mark.parametrize("action", list(Action))
    @pytest.mark.parametrize("with_agent", [True, False], ids=["agent", "organisation"])
    async def test_an_action_needs_its_own_permission(
        self, policy: PolicyDecisionPoint, action: Action, with_agent: bool
    ) -> None:
        org_id = new_org()
        agent = make_agent(org_id=org_id) if with_agent else None
        if agent is None and action not in {Action.CREATE, Action.READ}:
            return
        holders = {
            frozenset({action.permission}): True,
            ALL_PERMISSIONS: True,
            ALL_PERMISSIONS - {action.permission}: False,
            frozenset[str](): False,
            frozenset({action.permission.upper(), f"{action.permission} ", action.value, "*"}): False,
        }
        requests = [asked(principal_of(org_id, permissions=permissions), action, agent) for permissions in holders]
        decisions = await policy.decide(requests)
        assert [decision.allowed for decision in decisions] == list(holders.values())
        assert all(decision.errors == () for decision in decisions)

    @pytest.mark.parametrize("action", list(Action))
    async def test_organisations_must_match(self, policy: PolicyDecisionPoint, action: Action) -> None:
        org_id = new_org()
        others = [new_org(), org_id + "x", org_id[:-1], org_id.upper()]
        requests = [asked(principal_of(other), action, make_agent(org_id=org_id)) for other in others]
        assert [decision.allowed for decision in await policy.decide(requests)] == [False] * len(others)

    async def test_one_decision_for_each_request_in_their_order(self, policy: PolicyDecisionPoint) -> None:
        org_id = new_org()
        reader = principal_of(org_id, permissions=frozenset({"read:external_agent"}))
        mine, theirs = make_agent(org_id=org_id), make_agent()
        requests = [
            asked(reader, Action.READ, mine),
            asked(reader, Action.READ, theirs),
            asked(reader, Action.INVOKE, mine),
            asked(reader, Action.READ, None),
            asked(reader, Action.READ, mine),
        ] * 40
        decisions = await policy.decide(requests)
        assert [decision.allowed for decision in decisions] == [True, False, False, True, True] * 40

    async def test_nothing_asked_is_nothing_decided(self, policy: PolicyDecisionPoint) -> None:
        assert list(await policy.decide([])) == []

    async def test_no_value_of_an_agent_or_a_principal_disturbs_a_decision(self, policy: PolicyDecisionPoint) -> None:
        org_id = "A.b:c_d-0"
        odd = 'quote " backslash \\ brace } newline \n ünïcode \U0001f600 {{x}} ::'
        agent = make_agent(
            org_id=org_id,
            name=odd,
            description=odd,
            tags=(odd, "", odd),
            created_by=odd,
            status=AgentStatus.INACTIVE,
            platform_config={"n": Decimal("1e300"), odd: [None]},
        )
        principal = Principal(org_id, 'o"dd \\ ünïcode', {*PERMISSIONS, odd}, {"team": odd, odd: "", "__entity": "x"})
        requests = [asked(principal, action, agent) for action in Action]
        decisions = await policy.decide(requests)
        assert [(decision.allowed, decision.errors) for decision in decisions] == [(True, ())] * len(requests)
