"""Decisions that are remembered are those that would be made again."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from external_agents.adapters.abac import CedarPolicies, CedarPolicyDecisionPoint, decision_point
from external_agents.domain.access import AccessRequest, Action, Decision, Principal
from external_agents.domain.agent import AgentStatus, ExternalAgent
from external_agents.testing.builders import ALL_PERMISSIONS, make_agent

NOW = datetime(2026, 3, 10, 12, tzinfo=UTC)
ALICE = Principal("acme", "alice", ALL_PERMISSIONS)


@pytest.fixture
def evaluations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many requests went to Cedar, call by call."""
    calls: list[int] = []
    evaluate = decision_point.is_authorized_batch

    def counted(requests: Sequence[Any], *others: Any) -> Any:
        calls.append(len(requests))
        return evaluate(requests, *others)

    monkeypatch.setattr(decision_point, "is_authorized_batch", counted)
    return calls


def ask(agent: ExternalAgent | None, principal: Principal = ALICE, action: Action = Action.INVOKE) -> AccessRequest:
    return AccessRequest(principal, action, agent, NOW)


def point(policy_dir: Path, policies: str, **options: Any) -> CedarPolicyDecisionPoint:
    (policy_dir / "team.cedar").write_text(policies, encoding="utf-8")
    return CedarPolicyDecisionPoint(CedarPolicies.load(policy_dir), **options)


async def answer(point: CedarPolicyDecisionPoint, request: AccessRequest) -> Decision:
    [decision] = await point.decide([request])
    return decision


async def test_the_same_question_is_put_to_cedar_once(evaluations: list[int]) -> None:
    cedar = CedarPolicyDecisionPoint(CedarPolicies.load())
    agent = make_agent(org_id="acme", tags=("a",))
    first = await answer(cedar, ask(agent))
    later = AccessRequest(attrs.evolve(ALICE), Action.INVOKE, attrs.evolve(agent, version=9), NOW + timedelta(days=1))
    assert first == await answer(cedar, later) == Decision(allowed=True, policy_ids=("permission-holders",))
    assert evaluations == [1]


async def test_denials_are_remembered_too(evaluations: list[int]) -> None:
    cedar = CedarPolicyDecisionPoint(CedarPolicies.load())
    for _ in range(3):
        assert not (await answer(cedar, ask(make_agent(), ALICE))).allowed
    denied = ask(make_agent())
    assert [(await answer(cedar, denied)).allowed for _ in range(3)] == [False] * 3
    assert len(evaluations) == 4


@pytest.mark.parametrize(
    "policy",
    [
        'forbid (principal, action, resource) when { context.now < datetime("2026-03-10T13:00:00Z") };',
        'permit (principal, action, resource) unless { [[context.now]].contains([datetime("2026-03-10T12:00:00Z")]) };',
        """permit (principal, action, resource);
        forbid (principal, action, resource)
        when { if principal has org_id then {a: {b: context}}.a.b has now && !(context.now.toDate() == context.now)
            && context.now.toTime() < duration("13h") else false };""",
    ],
)
async def test_where_a_policy_reads_the_time_it_is_asked_each_time(policy: str, tmp_path: Path) -> None:
    cedar = point(tmp_path, policy)
    agent = make_agent(org_id="acme")
    allowed = [
        (await answer(cedar, attrs.evolve(ask(agent), now=NOW + timedelta(hours=hour)))).allowed for hour in (0, 2)
    ]
    assert allowed == [False, True]


@pytest.mark.parametrize(
    ("policy", "reads"),
    [
        ('@id("context") permit (principal, action, resource) when { principal.org_id == "context" };', False),
        ('forbid (principal, action, resource) when { "context.now" like "c*" && {context: 1}.context == 2 };', False),
        ("forbid (principal, action, resource) when { context has now };", True),
        ("forbid (principal, action, resource) unless { [context] == [context] };", True),
        ("// nothing\nforbid (principal, action, resource) when { false && context == context };", True),
        ('@Var("context") forbid (principal, action, resource);', True),
    ],
)
def test_whether_policies_read_the_context_is_never_missed(policy: str, reads: bool, tmp_path: Path) -> None:
    (tmp_path / "a.cedar").write_text("forbid (principal, action, resource) when { false };")
    (tmp_path / "b.cedar").write_text(policy)
    assert CedarPolicies.load(tmp_path).reads_context is reads
    assert not CedarPolicies.load().reads_context


EVERYTHING_READ = """
    forbid (principal, action, resource is ExternalAgents::Agent)
    when { principal.hasTag("team") && principal.getTag("team") == resource.name };
    forbid (principal, action == ExternalAgents::Action::"invoke", resource)
    when { resource.provider == "slack" && principal.permissions.contains("read:external_agent") };
    @id("inactive") forbid (principal, action, resource is ExternalAgents::Agent)
    when { resource.status == "inactive" || resource.tags.contains("x") };
    forbid (principal == ExternalAgents::Subject::"b", action, resource is ExternalAgents::Agent)
    when { resource.created_by == "b" };
    forbid (principal, action, resource == ExternalAgents::Agent::"00000000-0000-7000-8000-000000000001");
"""

ORGS, NAMES = st.sampled_from(["acme", "other"]), st.sampled_from(["a", "b"])
principals = st.builds(
    Principal,
    org_id=ORGS,
    subject=NAMES,
    permissions=st.sets(st.sampled_from([*sorted(ALL_PERMISSIONS)[:3], "invoke:external_agent"])),
    attributes=st.dictionaries(st.sampled_from(["team", "jti"]), NAMES),
)
agents = st.builds(
    make_agent,
    id=st.sampled_from([UUID("00000000-0000-7000-8000-00000000000" + digit) for digit in "12"]),
    org_id=ORGS,
    name=NAMES,
    provider=st.sampled_from(["slack", "custom"]),
    status=st.sampled_from([AgentStatus.ACTIVE, AgentStatus.INACTIVE]),
    tags=st.sampled_from([(), ("x",), ("y", "x"), ["x"]]),
    created_by=NAMES,
)
requests = st.builds(
    AccessRequest,
    principals,
    st.sampled_from(Action),
    st.none() | agents,
    st.sampled_from([NOW, NOW.replace(tzinfo=None)]),
)


@given(st.lists(requests, min_size=1, max_size=30))
async def test_a_memory_changes_no_decision(
    both: tuple[CedarPolicyDecisionPoint, CedarPolicyDecisionPoint], asked: list[AccessRequest]
) -> None:
    remembering, forgetful = both
    for request in asked * 2:
        assert await answer(remembering, request) == await answer(forgetful, request)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[CedarPolicyDecisionPoint, CedarPolicyDecisionPoint]:
    folder = tmp_path_factory.mktemp("policies")
    return point(folder, EVERYTHING_READ), point(folder, EVERYTHING_READ, remembered_max=0)


async def test_an_error_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    cedar = CedarPolicyDecisionPoint(CedarPolicies.load())
    agent = make_agent(org_id="acme")

    def panic(*args: object) -> None:
        raise RuntimeError("once")

    with monkeypatch.context() as broken:
        broken.setattr(decision_point, "is_authorized_batch", panic)
        assert (await answer(cedar, ask(agent))).errors
    assert (await answer(cedar, ask(agent))).allowed


async def test_so_many_are_remembered_and_no_more(evaluations: list[int]) -> None:
    cedar = CedarPolicyDecisionPoint(CedarPolicies.load(), remembered_max=2)
    agents = [make_agent(org_id="acme") for _ in range(3)]
    for number in (0, 1, 0, 2, 0):
        await answer(cedar, ask(agents[number]))
    assert len(evaluations) == 3
    await answer(cedar, ask(agents[1]))
    assert len(evaluations) == 4, "the one that was asked for longest ago had to go"


async def test_a_list_pushes_nothing_out(evaluations: list[int]) -> None:
    cedar = CedarPolicyDecisionPoint(CedarPolicies.load(), remembered_max=2)
    agent = make_agent(org_id="acme")
    await answer(cedar, ask(agent))
    await cedar.decide([ask(make_agent(org_id="acme")) for _ in range(10)])
    await answer(cedar, ask(agent))
    assert evaluations == [1, 10]


def test_principals_are_told_apart_by_all_that_they_are() -> None:
    """Tokens of one subject may differ in an attribute alone; they must not meet in one place of a table."""
    many = {Principal("acme", "alice", ALL_PERMISSIONS, {"jti": str(number)}) for number in range(100)}
    assert len({hash(principal) for principal in many}) == 100
    again = Principal("acme", "alice", sorted(ALL_PERMISSIONS), {"jti": "7"})
    assert again in many
    assert Principal("acme", "alice", ALL_PERMISSIONS) not in many
