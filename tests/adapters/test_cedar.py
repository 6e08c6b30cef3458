from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from external_agents.adapters.abac import CedarPolicies, CedarPolicyDecisionPoint
from external_agents.adapters.abac.decision_point import CHUNK
from external_agents.domain.access import PERMISSIONS, AccessRequest, Action, Decision, Principal
from external_agents.domain.agent import AgentStatus, ExternalAgent
from external_agents.domain.errors import ConfigurationError
from external_agents.testing.builders import make_agent

NOW = datetime(2026, 3, 10, 12, tzinfo=UTC)
ON_AGENTS = [Action.READ, Action.UPDATE, Action.DELETE, Action.INVOKE]
OVERFLOW = "9223372036854775807 + 1 > 0"

printable = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=20)
anything = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


def somebody(permissions: Any = PERMISSIONS, org_id: str = "acme", **attributes: str) -> Principal:
    return Principal(org_id, "alice", permissions, attributes)


def agent_of(org_id: str = "acme", **fields: Any) -> ExternalAgent:
    return make_agent(org_id=org_id, **fields)


def about(action: Action) -> ExternalAgent | None:
    return None if action is Action.CREATE else agent_of()


def ask(
    action: Action, agent: ExternalAgent | None = None, principal: Principal | None = None, now: datetime = NOW
) -> AccessRequest:
    return AccessRequest(principal or somebody(), action, agent, now)


def pdp(tmp_path: Path | None = None, policies: str = "") -> CedarPolicyDecisionPoint:
    if tmp_path is None:
        return CedarPolicyDecisionPoint(CedarPolicies.load())
    (tmp_path / "team.cedar").write_text(policies, encoding="utf-8")
    return CedarPolicyDecisionPoint(CedarPolicies.load(tmp_path))


async def answer(point: CedarPolicyDecisionPoint, request: AccessRequest) -> Decision:
    [decision] = await point.decide([request])
    return decision


@pytest.mark.parametrize("action", Action)
async def test_a_permission_allows_its_action(action: Action) -> None:
    decision = await answer(pdp(), ask(action, about(action), somebody([action.permission])))
    assert decision == Decision(allowed=True, policy_ids=("permission-holders",))


async def test_agents_are_listed_in_the_organisation() -> None:
    assert (await answer(pdp(), ask(Action.READ))).allowed


@pytest.mark.parametrize("action", Action)
@pytest.mark.parametrize("added", ["", "permit (principal, action, resource);"])
async def test_nothing_stands_in_for_the_permission(action: Action, added: str, tmp_path: Path) -> None:
    others = set(PERMISSIONS) - {action.permission}
    decision = await answer(pdp(tmp_path, added), ask(action, about(action), somebody(others)))
    assert decision == Decision(allowed=False, policy_ids=(f"guardrail-{action.value}",))


@pytest.mark.parametrize("action", ON_AGENTS)
@pytest.mark.parametrize("added", ["", "permit (principal, action, resource);"])
async def test_an_agent_of_another_organisation_is_out_of_reach(action: Action, added: str, tmp_path: Path) -> None:
    decision = await answer(pdp(tmp_path, added), ask(action, agent_of("other")))
    assert decision == Decision(allowed=False, policy_ids=("guardrail-organisation",))


async def test_a_folder_narrows_and_leaves_the_rest_as_it_was(tmp_path: Path) -> None:
    point = pdp(
        tmp_path,
        """@id("ops only")
        forbid (principal, action == ExternalAgents::Action::"invoke", resource)
        unless { principal.hasTag("team") && principal.getTag("team") == "ops" };""",
    )
    refused = Decision(allowed=False, policy_ids=("ops only",))
    assert await answer(point, ask(Action.INVOKE, agent_of())) == refused
    assert await answer(point, ask(Action.INVOKE, agent_of(), somebody(team="dev"))) == refused
    assert (await answer(point, ask(Action.INVOKE, agent_of(), somebody(team="ops")))).allowed
    assert (await answer(point, ask(Action.UPDATE, agent_of()))).allowed


@pytest.mark.parametrize(
    ("condition", "matching"),
    [
        ('resource.org_id == "acme"', {}),
        ('resource.name == "Billing"', {"name": "Billing"}),
        ('resource.provider == "teams"', {"provider": "teams"}),
        ('resource.status == "inactive"', {"status": AgentStatus.INACTIVE}),
        ('resource.tags.contains("production")', {"tags": ("production", "eu")}),
        ('resource.created_by == principal.getTag("name")', {"created_by": "bob"}),
    ],
)
async def test_policies_see_an_agents_attributes(condition: str, matching: dict[str, Any], tmp_path: Path) -> None:
    policy = f"""forbid (principal, action, resource is ExternalAgents::Agent)
        when {{ principal.hasTag("name") && {condition} }};"""
    point = pdp(tmp_path, policy)
    principal = somebody(name="bob")
    assert not (await answer(point, ask(Action.READ, agent_of(**matching), principal))).allowed
    if matching:
        assert (await answer(point, ask(Action.READ, agent_of(), principal))).allowed


async def test_entities_are_known_by_subject_agent_id_and_organisation(tmp_path: Path) -> None:
    agent = agent_of()
    for policy, request in [
        ('forbid (principal == ExternalAgents::Subject::"alice", action, resource);', ask(Action.READ, agent)),
        (f'forbid (principal, action, resource == ExternalAgents::Agent::"{agent.id}");', ask(Action.READ, agent)),
        ('forbid (principal, action, resource == ExternalAgents::Organization::"acme");', ask(Action.CREATE)),
    ]:
        assert not (await answer(pdp(tmp_path, policy), request)).allowed


async def test_policies_know_the_time(tmp_path: Path) -> None:
    point = pdp(
        tmp_path,
        'forbid (principal, action, resource) when { context.now < datetime("2026-03-10T12:00:00.001Z") };',
    )
    assert not (await answer(point, ask(Action.CREATE, now=NOW))).allowed
    assert (await answer(point, ask(Action.CREATE, now=NOW.replace(microsecond=1000)))).allowed


async def test_an_error_is_a_denial_even_where_cedar_allows(tmp_path: Path) -> None:
    decision = await answer(
        pdp(tmp_path, f"forbid (principal, action, resource) when {{ {OVERFLOW} }};"), ask(Action.CREATE)
    )
    assert not decision.allowed
    assert "overflow" in decision.errors[0]


@pytest.mark.parametrize(
    "request_",
    [
        pytest.param(ask(Action.READ, agent_of(name="\ud800")), id="a lone surrogate"),
        pytest.param(ask(Action.CREATE, now=NOW.replace(tzinfo=None)), id="a naive time"),
        pytest.param(ask(Action.INVOKE), id="an action without its agent"),
    ],
)
async def test_what_cannot_be_asked_is_denied_with_the_reason(request_: AccessRequest) -> None:
    decision = await answer(pdp(), request_)
    assert not decision.allowed
    assert decision.errors


async def test_what_goes_wrong_inside_is_a_denial(monkeypatch: pytest.MonkeyPatch) -> None:
    class Panic(BaseException):
        """As pyo3's PanicException."""

    def panic(*args: object) -> None:
        raise Panic("index out of bounds")

    monkeypatch.setattr("external_agents.adapters.abac.decision_point.is_authorized_batch", panic)
    decision = await answer(pdp(), ask(Action.CREATE))
    assert decision == Decision(allowed=False, errors=("Panic: index out of bounds",))


async def test_one_faulty_request_leaves_its_neighbours_alone() -> None:
    agents = [agent_of(), agent_of(name="\ud800"), agent_of()]
    decisions = await pdp().decide([ask(Action.READ, agent) for agent in agents])
    assert [decision.allowed for decision in decisions] == [True, False, True]


async def test_decisions_come_in_the_order_of_the_requests(tmp_path: Path) -> None:
    point = pdp(
        tmp_path,
        'forbid (principal, action, resource is ExternalAgents::Agent) when { resource.tags.contains("hidden") };',
    )
    agents = [agent_of(tags=("hidden",) if index % 3 == 0 else ()) for index in range(2 * CHUNK + 7)]
    decisions = await point.decide([ask(Action.READ, agent) for agent in agents])
    assert [decision.allowed for decision in decisions] == [not agent.tags for agent in agents]
    assert await point.decide([]) == []


async def test_one_batch_may_hold_two_versions_of_an_agent(tmp_path: Path) -> None:
    point = pdp(
        tmp_path, 'forbid (principal, action, resource is ExternalAgents::Agent) when { resource.name == "b" };'
    )
    agent = agent_of(name="a")
    decisions = await point.decide(
        [
            ask(Action.READ, agent),
            ask(Action.READ, attrs.evolve(agent, name="b")),
            ask(Action.UPDATE, agent),
            ask(Action.READ),
        ]
    )
    assert [decision.allowed for decision in decisions] == [True, False, True, True]
    assert not any(decision.errors for decision in decisions)


async def test_one_batch_may_hold_namesakes() -> None:
    namesakes = [
        somebody(),
        somebody(org_id="other"),
        somebody(permissions=[]),
        somebody(team="ops"),
        somebody(org_id="other"),
    ]
    decisions = await pdp().decide([ask(Action.READ, agent_of(), namesake) for namesake in namesakes])
    assert [decision.allowed for decision in decisions] == [True, False, False, True, False]


async def test_a_long_list_lets_the_event_loop_run() -> None:
    turns = 0

    async def neighbour() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(neighbour())
    await pdp().decide([ask(Action.READ, agent_of()) for _ in range(4 * CHUNK)])
    task.cancel()
    assert turns >= 3


@given(tag=anything, name=anything, subject=printable, created_by=anything, extra=st.dictionaries(anything, anything))
async def test_no_text_breaks_out_of_its_value(
    equal_names: CedarPolicyDecisionPoint, tag: str, name: str, subject: str, created_by: str, extra: dict[str, str]
) -> None:
    principal = Principal("acme", subject, PERMISSIONS, {**extra, "name": tag})
    for text in (name, tag):
        agent = agent_of(name=text, tags=(name, tag), created_by=created_by)
        decision = await answer(equal_names, ask(Action.READ, agent, principal))
        assert decision.allowed == (text == tag)
        assert not decision.errors


@pytest.fixture(scope="module")
def equal_names(tmp_path_factory: pytest.TempPathFactory) -> CedarPolicyDecisionPoint:
    return pdp(
        tmp_path_factory.mktemp("policies"),
        """forbid (principal, action, resource is ExternalAgents::Agent)
        unless { principal.hasTag("name") && principal.getTag("name") == resource.name };""",
    )


@pytest.mark.parametrize(
    ("policies", "place", "message"),
    [
        pytest.param("permit (principal action, resource);", "team.cedar:1: ", "unexpected token", id="syntax"),
        pytest.param(
            "permit (principal, action, resource);\n\n// so\nforbid (principal, action, resource)\nwhen {",
            "team.cedar:4: ",
            "unexpected end of input",
            id="cut off",
        ),
        pytest.param(
            'permit (principal, action, resource) when { "; // " != ";" };\n\n\n'
            "  /* no such comment */ forbid (principal, action, resource);",
            "team.cedar:4: ",
            "unexpected",
            id="after semicolons in strings",
        ),
        pytest.param(
            "// one; two\nforbid (principal, action, resource)\nwhen { principal.orgid == resource.org_id };",
            "team.cedar:2: ",
            "`orgid`",
            id="unknown attribute",
        ),
        pytest.param(
            "forbid (principal, action, resource)\n  when { principal.org_id == 1 };",
            "team.cedar:1: ",
            "types",
            id="types that never are equal",
        ),
        pytest.param(
            'forbid (principal, action == ExternalAgents::Action::"invite", resource);',
            "team.cedar:1: ",
            "unrecognized action",
            id="unknown action",
        ),
        pytest.param(
            'forbid (principal, action, resource) unless { principal.getTag("team") == "ops" };',
            "team.cedar:1: ",
            "safety",
            id="a tag that may be missing",
        ),
        pytest.param(
            "\n\nforbid (principal == ?principal, action, resource);", "team.cedar:3: ", "template", id="template"
        ),
    ],
)
def test_a_faulty_policy_is_named_with_file_and_line(policies: str, place: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.cedar").write_text("forbid (principal, action, resource) when { false };\n" * 5)
    (tmp_path / "team.cedar").write_text(policies)
    with pytest.raises(ConfigurationError, match=message) as refusal:
        CedarPolicies.load(tmp_path)
    assert str(refusal.value).startswith(place)
    assert "\n" not in str(refusal.value)
    assert "policy0" not in str(refusal.value)


def test_every_faulty_policy_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.cedar").write_text("permit;\npermit (principal, action, resource);\nforbid;")
    (tmp_path / "b.cedar").write_text("\nallow;")
    with pytest.raises(ConfigurationError) as refusal:
        CedarPolicies.load(tmp_path)
    for place in ("a.cedar:1: ", "a.cedar:3: ", "b.cedar:2: "):
        assert place in str(refusal.value)
    assert "a.cedar:2: " not in str(refusal.value)


def test_policies_that_cannot_be_read_are_a_fault(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="No such file"):
        CedarPolicies.load(tmp_path / "missing")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="Not a directory"):
        CedarPolicies.load(tmp_path / "file")
    (tmp_path / "a.cedar").mkdir()
    with pytest.raises(ConfigurationError, match=r"a\.cedar cannot be read"):
        CedarPolicies.load(tmp_path)
    (tmp_path / "a.cedar").rmdir()
    (tmp_path / "a.cedar").write_bytes(b"// \xff")
    with pytest.raises(ConfigurationError, match=r"a\.cedar is not UTF-8"):
        CedarPolicies.load(tmp_path)


def test_policies_are_loaded_in_order_and_named(tmp_path: Path) -> None:
    (tmp_path / "b.cedar").write_text('\ufeff@id("named") forbid (principal, action, resource);', encoding="utf-8")
    (tmp_path / "a.cedar").write_text(
        "\nforbid (principal, action, resource)\n;@id forbid (principal, action, resource);"
    )
    (tmp_path / ".draft.cedar").write_text("not yet")
    (tmp_path / "notes.txt").write_text("none")
    *loaded, default = CedarPolicies.load(tmp_path).loaded
    assert default.file == "default.cedar"
    assert [policy.id for policy in loaded[-3:]] == ["a.cedar:2", "a.cedar:3", "named"]
    assert loaded[-1].place == "b.cedar:1"
    assert {policy.file for policy in loaded[:-3]} == {"guardrails.cedar"}


async def test_a_decision_names_the_policies_that_made_it(tmp_path: Path) -> None:
    lines = [
        f'forbid (principal, action, resource is ExternalAgents::Agent) when {{ resource.name == "{line}" }};'
        for line in range(1, 31)
    ]
    point = pdp(tmp_path, "\n".join(lines))
    for line in range(1, 31):
        decision = await answer(point, ask(Action.READ, agent_of(name=str(line))))
        assert decision.policy_ids == (f"team.cedar:{line}",)


def test_an_empty_folder_adds_nothing_and_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    policies = CedarPolicies.load(tmp_path)
    assert policies.loaded == CedarPolicies.load().loaded
    assert "no *.cedar file" in caplog.text


async def test_a_folder_that_permits_says_who_is_permitted(tmp_path: Path) -> None:
    point = pdp(
        tmp_path,
        """@id("ops")
        permit (principal, action, resource)
        when { principal.hasTag("team") && principal.getTag("team") == "ops" };""",
    )
    assert await answer(point, ask(Action.INVOKE, agent_of())) == Decision(allowed=False)
    permitted = Decision(allowed=True, policy_ids=("ops",))
    assert await answer(point, ask(Action.INVOKE, agent_of(), somebody(team="ops"))) == permitted
    assert not (await answer(point, ask(Action.INVOKE, agent_of("other"), somebody(team="ops")))).allowed


def test_lists_are_judged_by_agent_where_a_folder_is_set(tmp_path: Path) -> None:
    assert not pdp().judges_lists_by_agent
    assert CedarPolicyDecisionPoint(CedarPolicies.load(tmp_path)).judges_lists_by_agent
