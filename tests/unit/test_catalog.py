"""Auth types and platforms that other packages add, end to end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from external_agents import (
    AuthScheme,
    Catalog,
    ConfigurationError,
    FixedHeaders,
    Platform,
    Principal,
    ValidationError,
)
from external_agents.adapters.memory import MemoryStore, memory_service
from external_agents.domain.auth import AUTH_SCHEMES, EVERYTHING
from external_agents.domain.catalog import BUILT_IN, join_secrets, split_secrets
from external_agents.domain.platform import PLATFORMS
from external_agents.testing.builders import ALL_PERMISSIONS
from external_agents.testing.fakes import ScriptedTransport

ALICE = Principal("acme", "alice", ALL_PERMISSIONS)


def _headers(config: Mapping[str, Any]) -> FixedHeaders:
    return FixedHeaders({"X-Signature": f"{config['key_id']}:{config['shared_key']}"})


SIGNED = AuthScheme(
    auth_type="signed",
    schema={
        "type": "object",
        "properties": {
            "key_id": {"type": "string", "minLength": 1},
            "shared_key": {"type": "string", "minLength": 8, "writeOnly": True},
            "login_url": {"type": "string"},
        },
        "required": ["key_id", "shared_key", "login_url"],
        "additionalProperties": False,
    },
    secret_fields=frozenset({"shared_key"}),
    url_fields=("login_url",),
    credentials=_headers,
)

MATRIX = Platform(
    provider="matrix",
    schema={
        "type": "object",
        "properties": {"room": {"type": "string", "pattern": "^!"}, "access_token": {"type": "string"}},
        "required": ["room", "access_token"],
        "additionalProperties": False,
    },
    secret_fields=frozenset({"access_token"}),
    secret_destination="matrix",
)

DOCUMENT: dict[str, Any] = {
    "name": "Added",
    "provider": "matrix",
    "webhook_url": "https://agent.example.com/",
    "auth_type": "signed",
    "auth_config": {"key_id": "k", "shared_key": "long enough", "login_url": "https://login.example.com/"},
    "platform_config": {"room": "!room", "access_token": "m-secret"},
}


async def test_an_added_auth_type_and_platform_work_as_the_built_in_ones_do() -> None:
    store, transport = MemoryStore(), ScriptedTransport()
    service = memory_service(transport, store=store, catalog=BUILT_IN.extended([SIGNED], [MATRIX]))
    agent = await service.create_agent(ALICE, DOCUMENT)
    assert agent.auth_config == {"key_id": "k", "login_url": "https://login.example.com/"}
    assert agent.platform_config == {"room": "!room"}
    assert "m-secret" not in repr(store.agents)
    assert "long enough" not in repr(store.agents)

    await service.invoke_agent(ALICE, agent.id, None)
    assert transport.requests[-1].credentials == FixedHeaders({"X-Signature": "k:long enough"})

    with pytest.raises(ValidationError) as raised:
        await service.update_agent(ALICE, agent.id, {"auth_config": {"login_url": "https://other.example.com/"}})
    assert [fault.path for fault in raised.value.errors] == ["auth_config.shared_key"]
    with pytest.raises(ValidationError) as raised:
        await service.create_agent(
            ALICE,
            {
                **DOCUMENT,
                "auth_config": {"key_id": "", "shared_key": "short", "login_url": "http://localhost/"},
                "platform_config": {"room": "room"},
            },
        )
    assert [fault.path for fault in raised.value.errors] == [
        "auth_config.key_id",
        "auth_config.login_url",
        "auth_config.shared_key",
        "platform_config.access_token",
        "platform_config.room",
    ]
    assert [agent.id for agent in (await service.list_agents(ALICE, provider="matrix")).items] == [agent.id]


async def test_without_registration_they_are_unknown() -> None:
    service = memory_service(ScriptedTransport())
    with pytest.raises(ValidationError) as raised:
        await service.create_agent(ALICE, DOCUMENT)
    assert {fault.path for fault in raised.value.errors} == {"auth_type", "provider"}
    assert "signed" not in BUILT_IN.auth_schemes


@pytest.mark.parametrize(
    "extend",
    [
        lambda: BUILT_IN.extended([SIGNED, SIGNED]),
        lambda: BUILT_IN.extended([AUTH_SCHEMES[0]]),
        lambda: BUILT_IN.extended(platforms=[PLATFORMS[0]]),
        lambda: Catalog((*AUTH_SCHEMES, AUTH_SCHEMES[1])),
    ],
)
def test_a_name_is_registered_once(extend: Any) -> None:
    with pytest.raises(ConfigurationError):
        extend()


def test_the_schemas_name_what_is_known() -> None:
    larger = BUILT_IN.extended([SIGNED], [MATRIX])
    assert larger.agent_properties["auth_type"]["enum"] == [
        "oauth2", "api_key", "bearer", "basic", "custom", "none", "signed",
    ]  # fmt: skip
    assert larger.agent_properties["provider"]["enum"][-1] == "matrix"


@pytest.mark.parametrize(
    ("secret_fields", "public", "secrets"),
    [
        (frozenset[str](), {"a": 1, "b": 2}, {}),
        (frozenset({"b"}), {"a": 1}, {"auth_config.b": 2}),
        (EVERYTHING, {}, {"auth_config": {"a": 1, "b": 2}}),
    ],
)
def test_secrets_are_taken_apart_and_put_back(secret_fields: frozenset[str], public: Any, secrets: Any) -> None:
    config = {"a": 1, "b": 2}
    assert split_secrets(config, secret_fields, "auth_config") == (public, secrets)
    assert join_secrets(public, secrets, "auth_config") == config
    assert split_secrets({}, secret_fields, "auth_config") == ({}, {})
