"""Every valid document is accepted, and an agent is what its document said."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import attrs
from hypothesis import given
from hypothesis import strategies as st

from external_agents.adapters.memory import MemorySecretBox
from external_agents.application.registration import Registrar
from external_agents.domain.agent import DEFAULTS, ExternalAgent
from external_agents.domain.catalog import BUILT_IN
from external_agents.domain.egress import EgressPolicy
from external_agents.domain.errors import Fault, ValidationError
from external_agents.domain.json_values import decode, dumps, plain_value
from external_agents.testing.builders import new_id
from external_agents.testing.strategies import (
    AUTH_CONFIGS,
    PLATFORM_CONFIGS,
    agent_documents,
    budget_configs,
    field_values,
    rate_limit_configs,
    texts,
)

AT = datetime(2026, 3, 10, 12, tzinfo=UTC)
FIELDS = st.sampled_from(sorted(BUILT_IN.agent_properties))
BARE = {
    "name": "x",
    "provider": "custom",
    "webhook_url": "https://agent.example.com/",
    "auth_type": "none",
}


def new_registrar() -> Registrar:
    return Registrar(BUILT_IN, EgressPolicy(), MemorySecretBox())


def registered(registrar: Registrar, document: Any) -> ExternalAgent:
    return registrar.register(document, agent_id=new_id(), org_id="acme", by="alice", at=AT)


def errors_of(judge: Callable[..., Any], *arguments: Any, **more: Any) -> tuple[Fault, ...]:
    """The faults that it tells; none when it is content."""
    try:
        judge(*arguments, **more)
    except ValidationError as invalid:
        return invalid.errors
    return ()


def as_described(registrar: Registrar, agent: ExternalAgent) -> dict[str, Any]:
    """The document that PATCH merges into: secrets opened."""
    return registrar._document(agent)


@given(agent_documents())
def test_an_agent_is_what_its_document_said(document: dict[str, Any]) -> None:
    registrar = new_registrar()
    agent = registered(registrar, decode(dumps(document).encode()))
    wanted = plain_value({**DEFAULTS, **document})
    wanted["timeout_s"] = float(wanted["timeout_s"])
    assert as_described(registrar, agent) == wanted

    unchanged = registrar.amend(agent, {}, by="bob", at=AT)
    assert as_described(registrar, unchanged) == wanted
    assert unchanged.version == 2

    scheme, platform = BUILT_IN.auth_schemes[agent.auth_type], BUILT_IN.platforms[agent.provider]
    assert not agent.auth_config.keys() & scheme.secret_fields
    assert not agent.platform_config.keys() & platform.secret_fields
    assert agent.auth_type != "custom" or agent.auth_config == {}
    assert not {"signing_secret", "signing_secret.previous"} & attrs.asdict(agent).keys()
    signing = registrar.opened(agent).signing
    assert (signing.current if signing else None) == document.get("signing_secret")


@given(agent_documents(), st.dictionaries(texts(1, 12), field_values(), min_size=1, max_size=3))
def test_unknown_fields_are_named(document: dict[str, Any], more: dict[str, Any]) -> None:
    unknown = {name: value for name, value in more.items() if name not in BUILT_IN.agent_properties}
    errors = errors_of(registered, new_registrar(), {**document, **unknown})
    assert {error.message for error in errors} <= {"is not a known field"}
    assert len(errors) == len(unknown)


@given(
    st.dictionaries(FIELDS, field_values())
    | st.tuples(agent_documents(), FIELDS, field_values()).map(lambda parts: {**parts[0], parts[1]: parts[2]})
    | field_values()
)
def test_no_document_breaks_the_judge(document: Any) -> None:
    registrar = new_registrar()
    if not errors_of(registered, registrar, document):
        registrar.opened(registered(registrar, document))


@given(agent_documents(), st.dictionaries(FIELDS, field_values()) | field_values())
def test_no_patch_breaks_the_judge(document: dict[str, Any], patch: Any) -> None:
    registrar = new_registrar()
    agent = registered(registrar, document)
    if not errors_of(registrar.amend, agent, patch, by="bob", at=AT):
        amended = registrar.amend(agent, patch, by="bob", at=AT)
        assert not BUILT_IN.agent_faults(as_described(registrar, amended), EgressPolicy())


@given(st.sampled_from(sorted(AUTH_CONFIGS)), st.sampled_from(sorted(PLATFORM_CONFIGS)), st.data())
def test_every_config_is_judged_alike_alone_and_in_an_agent(auth_type: str, provider: str, data: st.DataObject) -> None:
    registrar = new_registrar()
    auth_config = data.draw(AUTH_CONFIGS[auth_type] | field_values())
    platform_config = data.draw(PLATFORM_CONFIGS[provider] | field_values())
    errors = errors_of(registrar.check_auth_config, auth_type, auth_config)
    alone = {f"auth_config.{error.path}" for error in errors}
    errors = errors_of(registrar.check_platform_config, provider, platform_config)
    alone |= {f"platform_config.{error.path}" for error in errors}
    whole = {
        **BARE,
        "auth_type": auth_type,
        "auth_config": auth_config,
        "provider": provider,
        "platform_config": platform_config,
    }
    together = {error.path for error in errors_of(registered, registrar, whole)}
    assert {path.rstrip(".") for path in together} == {path.rstrip(".") for path in alone}


@given(rate_limit_configs(), budget_configs())
def test_limits_are_read_as_they_were_given(rate_limit: dict[str, Any], budget: dict[str, Any]) -> None:
    agent = registered(new_registrar(), {**BARE, "rate_limit_config": rate_limit, "budget_config": budget})
    assert {f"requests_per_{window.value}": limit for window, limit in agent.limits.items()} == rate_limit
    assert agent.budget_config == budget
    assert agent.budget.currency == budget.get("currency", "USD")
    for field, amount in (
        ("max_cost_per_invocation", agent.budget.per_invocation),
        ("max_monthly_cost", agent.budget.monthly_cap),
    ):
        assert amount == (Decimal(budget[field]) if field in budget else None)
