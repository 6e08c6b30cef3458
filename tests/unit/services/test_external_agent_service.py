"""ExternalAgentService on adapters in memory: configs, permissions, changes, limits."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from external_agents import (
    AgentNotFound,
    AgentStatus,
    BudgetExceeded,
    ExternalAgent,
    ExternalAgentService,
    Fault,
    InvocationNotFound,
    JsonText,
    PermissionDenied,
    Principal,
    RateLimited,
    StaleVersion,
    ValidationError,
)
from external_agents.adapters.memory import MemoryStore, memory_service
from external_agents.domain.auth import ClientCredentials, FixedHeaders
from external_agents.domain.http_fields import tenant_may_set
from external_agents.domain.ids import created_at_of
from external_agents.domain.json_values import decode
from external_agents.testing.builders import ALL_PERMISSIONS, costing, new_id
from external_agents.testing.fakes import FakeClock, Gate, RecordingObservability, ScriptedTransport, SequentialIds

OAUTH2 = {"client_id": "id", "client_secret": "s3cret", "token_url": "https://login.example.com/token"}
API_KEY = {"key": "k-123", "header_name": "X-API-Key"}
AUTH_CONFIGS: dict[str, dict[str, Any]] = {
    "oauth2": OAUTH2,
    "api_key": API_KEY,
    "bearer": {"token": "t-123"},
    "basic": {"username": "jürgen", "password": "pass:word é"},
    "custom": {"headers": {"X-Tenant": "acme"}, "anything": [1, {"else": None}]},
    "none": {},
}
PLATFORM_CONFIGS: dict[str, dict[str, Any]] = {
    "teams": {"tenant_id": "t", "channel_id": "c"},
    "discord": {"webhook_url": "https://discord.com/api/webhooks/1/x", "username": "Research"},
    "slack": {"webhook_url": "https://hooks.slack.com/services/T/B/x", "channel": "#research"},
    "telegram": {"bot_token": "123:abc", "chat_id": -1001234567890},
    "notion": {"token": "ntn_x", "database_id": "d"},
    "custom": {"anything": ["at", "all"]},
}
REQUIRED = {
    ("auth", "oauth2"): {"client_id", "client_secret", "token_url"},
    ("auth", "api_key"): {"key", "header_name"},
    ("auth", "bearer"): {"token"},
    ("auth", "basic"): {"username", "password"},
    ("platform", "teams"): {"tenant_id", "channel_id"},
    ("platform", "discord"): {"webhook_url", "username"},
    ("platform", "slack"): {"webhook_url", "channel"},
    ("platform", "telegram"): {"bot_token", "chat_id"},
    ("platform", "notion"): {"token", "database_id"},
}
SECRETS = ("s3cret", "k-123", "t-123", "pass:word", "discord.com/api", "hooks.slack.com", "123:abc", "ntn_x")


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def transport() -> ScriptedTransport:
    return ScriptedTransport()


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def observability() -> RecordingObservability:
    return RecordingObservability()


@pytest.fixture
def service(
    clock: FakeClock, transport: ScriptedTransport, store: MemoryStore, observability: RecordingObservability
) -> ExternalAgentService:
    return memory_service(transport, store=store, clock=clock, ids=SequentialIds(clock), observability=observability)


@pytest.fixture
def alice() -> Principal:
    return Principal("acme", "alice", ALL_PERMISSIONS)


def document(**changes: Any) -> dict[str, Any]:
    return {
        "name": "Research",
        "provider": "custom",
        "webhook_url": "https://agent.example.com/hook",
        "auth_type": "none",
        **changes,
    }


def with_key(**changes: Any) -> dict[str, Any]:
    return document(auth_type="api_key", auth_config=API_KEY, **changes)


def faults_of(raised: pytest.ExceptionInfo[ValidationError]) -> dict[str, str]:
    return {fault.path: fault.message for fault in raised.value.errors}


class TestValidateAuthConfig:
    def test_a_valid_oauth2_config(self, service: ExternalAgentService) -> None:
        service.validate_auth_config("oauth2", OAUTH2)
        service.validate_auth_config("oauth2", {**OAUTH2, "scope": "a b", "audience": "https://api.example.com"})

    def test_an_oauth2_config_without_client_id(self, service: ExternalAgentService) -> None:
        with pytest.raises(ValidationError) as raised:
            service.validate_auth_config("oauth2", {"client_secret": "s", "token_url": "https://login.example.com/"})
        assert raised.value.errors == (Fault("client_id", "is required"),)

    def test_a_valid_api_key_config(self, service: ExternalAgentService) -> None:
        service.validate_auth_config("api_key", API_KEY)

    def test_an_api_key_config_without_key(self, service: ExternalAgentService) -> None:
        with pytest.raises(ValidationError) as raised:
            service.validate_auth_config("api_key", {"header_name": "X-API-Key"})
        assert raised.value.errors == (Fault("key", "is required"),)

    def test_a_valid_custom_config(self, service: ExternalAgentService) -> None:
        service.validate_auth_config("custom", AUTH_CONFIGS["custom"])
        service.validate_auth_config("custom", {})

    @pytest.mark.parametrize("auth_type", list(AUTH_CONFIGS))
    def test_a_valid_config_of_every_type(self, service: ExternalAgentService, auth_type: str) -> None:
        service.validate_auth_config(auth_type, AUTH_CONFIGS[auth_type])

    def test_an_unknown_type(self, service: ExternalAgentService) -> None:
        for unknown in ("oauth3", "", None, 5, [], {}):
            with pytest.raises(ValidationError) as raised:
                service.validate_auth_config(unknown, {})  # type: ignore[arg-type]
            assert list(faults_of(raised)) == ["auth_type"]

    @pytest.mark.parametrize("config", [None, [], "x", 5, True])
    def test_a_config_that_is_no_object(self, service: ExternalAgentService, config: object) -> None:
        for auth_type in AUTH_CONFIGS:
            with pytest.raises(ValidationError) as raised:
                service.validate_auth_config(auth_type, config)
            assert raised.value.errors == (Fault("", "must be an object"),)

    def test_every_fault_is_named_at_once(self, service: ExternalAgentService) -> None:
        config = {"client_id": "", "token_url": "http://login.example.com/#top", "scope": 5, "more": 1}
        with pytest.raises(ValidationError) as raised:
            service.validate_auth_config("oauth2", config)
        assert faults_of(raised).keys() == {"client_id", "client_secret", "token_url", "scope", "more"}
        assert len(raised.value.errors) == 6

    @pytest.mark.parametrize(
        "name",
        "Host Connection Content-Length content-type Content-Anything Transfer-Encoding TE Trailer Upgrade Expect"
        " Accept-Encoding Cookie Forwarded X-Forwarded-For x-forwarded-anything Proxy-Authorization Idempotency-Key"
        " traceparent TRACEPARENT webhook-id Webhook-Signature".split(),
    )
    def test_a_tenant_may_not_set_our_headers(self, service: ExternalAgentService, name: str) -> None:
        with pytest.raises(ValidationError) as raised:
            service.validate_auth_config("api_key", {"key": "k", "header_name": name})
        assert list(faults_of(raised)) == ["header_name"]
        with pytest.raises(ValidationError) as raised:
            service.validate_auth_config("custom", {"headers": {name: "v", "X-Fine": "v"}})
        assert list(faults_of(raised)) == [f"headers.{name}"]

    @given(
        name=st.sampled_from(
            "host connection content- content-type transfer-encoding te trailer upgrade expect accept-encoding cookie"
            " forwarded x-forwarded- x-forwarded-host proxy- proxy-connection idempotency-key traceparent webhook-"
            " webhook-timestamp".split()
        ),
        capitals=st.integers(0),
    )
    def test_nor_in_any_case(self, name: str, capitals: int) -> None:
        spelt = "".join(char.upper() if capitals >> place & 1 else char for place, char in enumerate(name))
        assert not tenant_may_set(spelt)
        assert tenant_may_set(f"X-{spelt}")

    @pytest.mark.parametrize(
        "name", ["", "two words", "X:Y", "X\r\nY", "Ünï", "X\0", "Ho\u017ft", "\u212aey", "X\n", " X", "X\t"]
    )
    def test_header_names_are_tokens(self, service: ExternalAgentService, name: str) -> None:
        with pytest.raises(ValidationError):
            service.validate_auth_config("api_key", {"key": "k", "header_name": name})
        with pytest.raises(ValidationError):
            service.validate_auth_config("custom", {"headers": {name: "v"}})

    @pytest.mark.parametrize("value", ["", " x", "x ", "x\r\nInjected: 1", "ünï", "x\0", "x\x7f"])
    def test_header_values_pass_through_unchanged(self, service: ExternalAgentService, value: str) -> None:
        for auth_type, config in (
            ("api_key", {"key": value, "header_name": "X-Key"}),
            ("bearer", {"token": value}),
            ("custom", {"headers": {"X-Key": value}}),
        ):
            with pytest.raises(ValidationError):
                service.validate_auth_config(auth_type, config)

    def test_no_message_tells_a_secret(self, service: ExternalAgentService) -> None:
        for auth_type, config in (
            ("api_key", {"key": "s3cret\n", "header_name": "X"}),
            ("bearer", {"token": ["s3cret"]}),
            ("oauth2", {**OAUTH2, "client_secret": {"s3cret": 1}}),
            ("custom", {"headers": {"X": "s3cret\n"}}),
        ):
            with pytest.raises(ValidationError) as raised:
                service.validate_auth_config(auth_type, config)
            assert "s3cret" not in str(raised.value)


class TestValidatePlatformConfig:
    def test_a_valid_teams_config(self, service: ExternalAgentService) -> None:
        service.validate_platform_config("teams", PLATFORM_CONFIGS["teams"])
        service.validate_platform_config(
            "teams", {**PLATFORM_CONFIGS["teams"], "webhook_url": "https://prod-1.logic.azure.com/workflows/x"}
        )

    def test_a_teams_config_without_tenant_id(self, service: ExternalAgentService) -> None:
        with pytest.raises(ValidationError) as raised:
            service.validate_platform_config("teams", {"channel_id": "c"})
        assert raised.value.errors == (Fault("tenant_id", "is required"),)

    def test_a_valid_discord_config(self, service: ExternalAgentService) -> None:
        service.validate_platform_config("discord", PLATFORM_CONFIGS["discord"])

    def test_a_valid_slack_config(self, service: ExternalAgentService) -> None:
        service.validate_platform_config("slack", PLATFORM_CONFIGS["slack"])

    def test_a_valid_telegram_config(self, service: ExternalAgentService) -> None:
        service.validate_platform_config("telegram", PLATFORM_CONFIGS["telegram"])
        service.validate_platform_config("telegram", {"bot_token": "123:abc", "chat_id": "@channel"})

    def test_a_valid_notion_config(self, service: ExternalAgentService) -> None:
        service.validate_platform_config("notion", PLATFORM_CONFIGS["notion"])

    def test_a_valid_custom_config(self, service: ExternalAgentService) -> None:
        service.validate_platform_config("custom", PLATFORM_CONFIGS["custom"])
        service.validate_platform_config("custom", {})

    def test_an_unknown_provider(self, service: ExternalAgentService) -> None:
        with pytest.raises(ValidationError) as raised:
            service.validate_platform_config("irc", {})
        assert list(faults_of(raised)) == ["provider"]

    @pytest.mark.parametrize("chat_id", ["", True, None, [], {}])
    def test_a_chat_id_is_a_string_or_an_integer(self, service: ExternalAgentService, chat_id: object) -> None:
        with pytest.raises(ValidationError) as raised:
            service.validate_platform_config("telegram", {"bot_token": "x", "chat_id": chat_id})
        assert list(faults_of(raised)) == ["chat_id"]

    @pytest.mark.parametrize(
        ("provider", "field"),
        [("discord", "webhook_url"), ("discord", "avatar_url"), ("slack", "webhook_url"), ("teams", "webhook_url")],
    )
    def test_urls_are_judged(self, service: ExternalAgentService, provider: str, field: str) -> None:
        for url in ("http://example.com/", "https://127.0.0.1/", "https://user@example.com/", "https://a.local/", "x"):
            with pytest.raises(ValidationError) as raised:
                service.validate_platform_config(provider, {**PLATFORM_CONFIGS[provider], field: url})
            assert list(faults_of(raised)) == [field]


@pytest.mark.parametrize(("kind", "name"), list(REQUIRED))
def test_each_required_field_is_required_a_string_and_not_empty(
    service: ExternalAgentService, kind: str, name: str
) -> None:
    judge = service.validate_auth_config if kind == "auth" else service.validate_platform_config
    valid = (AUTH_CONFIGS if kind == "auth" else PLATFORM_CONFIGS)[name]
    for field in REQUIRED[kind, name]:
        without = {key: value for key, value in valid.items() if key != field}
        for config in (without, {**valid, field: ""}, {**valid, field: None}, {**valid, field: ["x"]}):
            with pytest.raises(ValidationError) as raised:
                judge(name, config)
            assert list(faults_of(raised)) == [field]
    with pytest.raises(ValidationError) as raised:
        judge(name, {**valid, "unknown": 1})
    assert raised.value.errors == (Fault("unknown", "is not a known field"),)


class TestCheckRateLimit:
    async def test_true_while_there_is_room_and_false_when_there_is_none(
        self, service: ExternalAgentService, alice: Principal, clock: FakeClock
    ) -> None:
        agent = await service.create_agent(alice, document(rate_limit_config={"requests_per_minute": 2}))
        for _ in range(5):
            assert await service.check_rate_limit(alice, agent.id) is True
        await service.invoke_agent(alice, agent.id, None)
        assert await service.check_rate_limit(alice, agent.id) is True
        await service.invoke_agent(alice, agent.id, None)
        assert await service.check_rate_limit(alice, agent.id) is False
        with pytest.raises(RateLimited):
            await service.invoke_agent(alice, agent.id, None)
        clock.advance(61.2)
        assert await service.check_rate_limit(alice, agent.id) is True

    async def test_true_without_limits(self, service: ExternalAgentService, alice: Principal) -> None:
        agent = await service.create_agent(alice, document())
        assert await service.check_rate_limit(alice, agent.id) is True

    async def test_an_exceeded_budget_is_not_its_business(
        self, service: ExternalAgentService, alice: Principal
    ) -> None:
        agent = await service.create_agent(alice, document(budget_config={"max_monthly_cost": 0}))
        assert await service.check_rate_limit(alice, agent.id) is True


class TestCheckBudget:
    async def test_true_while_there_is_room_and_false_when_there_is_none(
        self, service: ExternalAgentService, alice: Principal, transport: ScriptedTransport
    ) -> None:
        config = {"max_cost_per_invocation": "0.1", "max_monthly_cost": "0.2"}
        agent = await service.create_agent(alice, document(budget_config=config))
        for _ in range(5):
            assert await service.check_budget(alice, agent.id) is True
        transport.script.extend([costing("0.05"), costing("0.05")])
        await service.invoke_agent(alice, agent.id, None)
        await service.invoke_agent(alice, agent.id, None)
        assert await service.check_budget(alice, agent.id) is True
        await service.invoke_agent(alice, agent.id, None)
        assert await service.check_budget(alice, agent.id) is False
        with pytest.raises(BudgetExceeded):
            await service.invoke_agent(alice, agent.id, None)

    async def test_true_without_a_budget(self, service: ExternalAgentService, alice: Principal) -> None:
        agent = await service.create_agent(alice, document())
        assert await service.check_budget(alice, agent.id) is True

    async def test_a_full_window_is_not_its_business(self, service: ExternalAgentService, alice: Principal) -> None:
        agent = await service.create_agent(alice, document(rate_limit_config={"requests_per_day": 0}))
        assert await service.check_budget(alice, agent.id) is True


class TestCreate:
    @pytest.mark.parametrize("auth_type", list(AUTH_CONFIGS))
    @pytest.mark.parametrize("provider", list(PLATFORM_CONFIGS))
    async def test_every_provider_and_auth_type(
        self, service: ExternalAgentService, alice: Principal, auth_type: str, provider: str
    ) -> None:
        agent = await service.create_agent(
            alice,
            document(
                auth_type=auth_type,
                auth_config=AUTH_CONFIGS[auth_type],
                provider=provider,
                platform_config=PLATFORM_CONFIGS[provider],
            ),
        )
        assert await service.get_agent(alice, agent.id) == agent
        shown = f"{agent} {agent.auth_config} {agent.platform_config}"
        assert not [secret for secret in SECRETS if secret in shown]

    async def test_the_defaults(self, service: ExternalAgentService, alice: Principal, clock: FakeClock) -> None:
        agent = await service.create_agent(alice, document())
        assert agent == ExternalAgent(
            id=agent.id,
            org_id="acme",
            name="Research",
            description="",
            provider="custom",
            webhook_url="https://agent.example.com/hook",
            auth_type="none",
            auth_config={},
            platform_config={},
            rate_limit_config=None,
            budget_config=None,
            tags=(),
            timeout_s=30,
            max_attempts=3,
            status=AgentStatus.ACTIVE,
            created_by="alice",
            updated_by="alice",
            created_at=clock.now(),
            updated_at=clock.now(),
            version=1,
        )

    async def test_every_fault_is_named_at_once(self, service: ExternalAgentService, alice: Principal) -> None:
        with pytest.raises(ValidationError) as raised:
            await service.create_agent(
                alice,
                {
                    "name": "",
                    "description": "x" * 2001,
                    "provider": "teams",
                    "webhook_url": "https://10.0.0.1/",
                    "auth_type": "oauth2",
                    "auth_config": {"client_secret": "s", "token_url": "ftp://login.example.com"},
                    "platform_config": {"channel_id": 5},
                    "rate_limit_config": {"requests_per_minute": -1, "requests_per_hour": 1.5, "requests_per_week": 1},
                    "budget_config": {"max_monthly_cost": -1, "max_cost_per_invocation": "1e3", "currency": "usd"},
                    "tags": ["", 5, "x" * 51],
                    "timeout_s": 31,
                    "max_attempts": 0,
                    "status": "deleted",
                    "org_id": "other",
                    "id": "x",
                    "version": 1,
                },
            )
        assert faults_of(raised).keys() == {
            "name",
            "description",
            "webhook_url",
            "auth_config.client_id",
            "auth_config.token_url",
            "platform_config.tenant_id",
            "platform_config.channel_id",
            "rate_limit_config.requests_per_minute",
            "rate_limit_config.requests_per_hour",
            "rate_limit_config.requests_per_week",
            "budget_config.max_monthly_cost",
            "budget_config.max_cost_per_invocation",
            "budget_config.currency",
            "tags[0]",
            "tags[1]",
            "tags[2]",
            "timeout_s",
            "max_attempts",
            "status",
            "org_id",
            "id",
            "version",
        }

    async def test_faults_of_every_kind_stand_in_one_answer(
        self, service: ExternalAgentService, alice: Principal
    ) -> None:
        body = b'{"name": "a\\u0000", "name": "b\\u0000", "timeout_s": 99, "foo": 1}'
        with pytest.raises(ValidationError) as raised:
            await service.create_agent(alice, decode(body))
        assert {"name", "timeout_s", "foo", "provider", "auth_config"} <= {fault.path for fault in raised.value.errors}
        messages = {fault.message for fault in raised.value.errors if fault.path == "name"}
        assert messages == {"is given more than once", "contains NUL, which cannot be stored"}

    async def test_what_is_required(self, service: ExternalAgentService, alice: Principal) -> None:
        with pytest.raises(ValidationError) as raised:
            await service.create_agent(alice, {})
        required = ("name", "provider", "webhook_url", "auth_type", "auth_config", "platform_config")
        assert faults_of(raised) == dict.fromkeys(required, "is required")
        with pytest.raises(ValidationError) as raised:
            await service.create_agent(alice, document(auth_type="bearer", provider="slack"))
        assert faults_of(raised) == dict.fromkeys(("auth_config", "platform_config"), "is required")

    @pytest.mark.parametrize("wrong", [[], {}, 5, None, True])
    @pytest.mark.parametrize(
        "field", ["name", "provider", "webhook_url", "auth_type", "auth_config", "platform_config", "tags", "status"]
    )
    async def test_a_field_of_another_type_is_a_fault_of_that_field(
        self, service: ExternalAgentService, alice: Principal, field: str, wrong: object
    ) -> None:
        if (field, wrong) in [("auth_config", {}), ("platform_config", {}), ("tags", [])]:
            return
        with pytest.raises(ValidationError) as raised:
            await service.create_agent(alice, document(**{field: wrong}))
        assert {path.partition(".")[0] for path in faults_of(raised)} == {field}

    @pytest.mark.parametrize("whole", [None, [], "x", 5, [document()]])
    async def test_a_document_that_is_no_object(
        self, service: ExternalAgentService, alice: Principal, whole: object
    ) -> None:
        with pytest.raises(ValidationError) as raised:
            await service.create_agent(alice, whole)
        assert raised.value.errors == (Fault("", "must be an object"),)

    async def test_the_bounds_themselves_are_fine(self, service: ExternalAgentService, alice: Principal) -> None:
        url = "https://agent.example.com/"
        agent = await service.create_agent(
            alice,
            document(
                name="x" * 200,
                description="x" * 2000,
                webhook_url=url + "x" * (2000 - len(url)),
                tags=["x" * 50] * 50,
                timeout_s=1,
                max_attempts=1,
                rate_limit_config={"requests_per_minute": 0, "requests_per_day": 1_000_000_000},
                budget_config={"max_monthly_cost": "999999999999.999999999", "max_cost_per_invocation": "0.000000001"},
            ),
        )
        assert agent.version == 1
        for field, value in [
            ("name", "x" * 201),
            ("webhook_url", url + "x" * (2001 - len(url))),
            ("tags", ["x"] * 51),
            ("timeout_s", 0.99),
            ("rate_limit_config", {"requests_per_day": 1_000_000_001}),
            ("budget_config", {"max_monthly_cost": 10**12}),
            ("budget_config", {"max_cost_per_invocation": "0.0000000001"}),
        ]:
            with pytest.raises(ValidationError):
                await service.create_agent(alice, document(**{field: value}))


class TestUpdate:
    async def test_faults_of_a_patch_stand_in_one_answer(self, service: ExternalAgentService, alice: Principal) -> None:
        agent = await service.create_agent(alice, document())
        with pytest.raises(ValidationError) as raised:
            await service.update_agent(alice, agent.id, {"foo": 1, "name": "", "timeout_s": 99, "provider": "teams"})
        assert faults_of(raised) == {
            "foo": "is not a known field",
            "name": "must not be empty",
            "provider": "cannot be changed",
            "timeout_s": "must be at most 30",
        }

    async def test_a_patch_changes_what_it_names(
        self, service: ExternalAgentService, alice: Principal, clock: FakeClock
    ) -> None:
        agent = await service.create_agent(alice, with_key(tags=["a"], description="old", timeout_s=5))
        clock.advance(60)
        bob = Principal("acme", "bob", ALL_PERMISSIONS)
        changed = await service.update_agent(bob, agent.id, {"name": "New", "tags": ["b", "c"], "timeout_s": None})
        assert (changed.name, changed.tags, changed.description, changed.timeout_s) == ("New", ("b", "c"), "old", 30)
        assert (changed.version, changed.created_by, changed.updated_by) == (2, "alice", "bob")
        assert changed.updated_at == clock.now() != changed.created_at == agent.created_at
        assert await service.get_agent(alice, agent.id) == changed

    async def test_objects_are_merged_member_by_member(self, service: ExternalAgentService, alice: Principal) -> None:
        agent = await service.create_agent(
            alice,
            document(
                platform_config={"a": {"x": 1, "y": 2}, "b": [1]},
                rate_limit_config={"requests_per_minute": 1, "requests_per_day": 2},
            ),
        )
        changed = await service.update_agent(
            alice,
            agent.id,
            {
                "platform_config": {"a": {"x": None, "z": 3}, "b": [2, None]},
                "rate_limit_config": {"requests_per_day": None, "requests_per_hour": 3},
            },
        )
        assert changed.platform_config == {"a": {"y": 2, "z": 3}, "b": [2, None]}
        assert changed.rate_limit_config == {"requests_per_minute": 1, "requests_per_hour": 3}
        changed = await service.update_agent(alice, agent.id, {"rate_limit_config": None, "budget_config": None})
        assert changed.rate_limit_config is None

    async def test_omitted_secrets_are_kept(
        self, service: ExternalAgentService, alice: Principal, transport: ScriptedTransport
    ) -> None:
        agent = await service.create_agent(alice, with_key())
        await service.update_agent(alice, agent.id, {"auth_config": {"header_name": "X-Other"}, "name": "New"})
        await service.invoke_agent(alice, agent.id, None)
        assert transport.requests[-1].credentials == FixedHeaders({"X-Other": "k-123"})
        await service.update_agent(alice, agent.id, {"auth_config": {"key": "k-new"}})
        await service.invoke_agent(alice, agent.id, None)
        assert transport.requests[-1].credentials == FixedHeaders({"X-Other": "k-new"})

    @pytest.mark.parametrize(
        ("patch", "path"),
        [
            ({"name": None}, "name"),
            ({"auth_type": None}, "auth_type"),
            ({"auth_config": None}, "auth_config"),
            ({"auth_config": {"key": None}}, "auth_config.key"),
            ({"auth_config": {"header_name": None}}, "auth_config.header_name"),
            ({"platform_config": {"chat_id": None}}, "platform_config.chat_id"),
            ({"platform_config": {"bot_token": None}}, "platform_config.bot_token"),
            ({"platform_config": None}, "platform_config"),
            ({"provider": "custom"}, "provider"),
            ({"status": "deleted"}, "status"),
            ({"created_by": "x"}, "created_by"),
            ({"version": 2}, "version"),
            ({"": 1}, ""),
        ],
    )
    async def test_a_patch_that_cannot_be(
        self, service: ExternalAgentService, alice: Principal, patch: dict[str, Any], path: str
    ) -> None:
        agent = await service.create_agent(
            alice, with_key(provider="telegram", platform_config=PLATFORM_CONFIGS["telegram"])
        )
        with pytest.raises(ValidationError) as raised:
            await service.update_agent(alice, agent.id, patch)
        assert list(faults_of(raised)) == [path]
        assert await service.get_agent(alice, agent.id) == agent

    @pytest.mark.parametrize("patch", [None, [], "x", 5])
    async def test_a_patch_that_is_no_object(
        self, service: ExternalAgentService, alice: Principal, patch: object
    ) -> None:
        agent = await service.create_agent(alice, document())
        with pytest.raises(ValidationError):
            await service.update_agent(alice, agent.id, patch)

    async def test_a_new_auth_type_brings_its_whole_config(
        self, service: ExternalAgentService, alice: Principal, transport: ScriptedTransport
    ) -> None:
        agent = await service.create_agent(alice, with_key())
        with pytest.raises(ValidationError) as raised:
            await service.update_agent(alice, agent.id, {"auth_type": "bearer"})
        assert list(faults_of(raised)) == ["auth_config"]
        with pytest.raises(ValidationError) as raised:
            await service.update_agent(alice, agent.id, {"auth_type": "basic", "auth_config": {"username": "u"}})
        assert list(faults_of(raised)) == ["auth_config.password"]
        changed = await service.update_agent(
            alice, agent.id, {"auth_type": "bearer", "auth_config": {"token": "t-new"}}
        )
        assert changed.auth_config == {}
        assert list(changed.sealed) == ["auth_config.token"]
        await service.invoke_agent(alice, agent.id, None)
        assert transport.requests[-1].credentials == FixedHeaders({"Authorization": "Bearer t-new"})

    async def test_auth_type_none_erases_the_credentials(
        self, service: ExternalAgentService, alice: Principal, transport: ScriptedTransport
    ) -> None:
        agent = await service.create_agent(alice, with_key())
        changed = await service.update_agent(alice, agent.id, {"auth_type": "none"})
        assert (changed.auth_config, changed.sealed) == ({}, {})
        await service.invoke_agent(alice, agent.id, None)
        assert transport.requests[-1].credentials == FixedHeaders({})
        with pytest.raises(ValidationError):
            await service.update_agent(alice, agent.id, {"auth_type": "api_key"})

    async def test_a_stale_version_is_refused_before_the_patch_is_judged(
        self, service: ExternalAgentService, alice: Principal
    ) -> None:
        agent = await service.create_agent(alice, document())
        await service.update_agent(alice, agent.id, {"name": "second"}, if_version=[1])
        with pytest.raises(StaleVersion):
            await service.update_agent(alice, agent.id, {"nonsense": 1}, if_version=[1, 3])
        with pytest.raises(StaleVersion):
            await service.delete_agent(alice, agent.id, if_version=[])
        await service.delete_agent(alice, agent.id, if_version=[2])

    async def test_inactive_and_back(self, service: ExternalAgentService, alice: Principal) -> None:
        agent = await service.create_agent(alice, document())
        assert (await service.update_agent(alice, agent.id, {"status": "inactive"})).status is AgentStatus.INACTIVE
        assert (await service.update_agent(alice, agent.id, {"status": "active"})).status is AgentStatus.ACTIVE


class TestSecretsAreBoundToTheirOrigin:
    OTHER_ORIGINS = (
        "https://other.example.com/hook",
        "https://agent.example.com:8443/hook",
        "https://agent.example.com.evil.example/hook",
    )
    SAME_ORIGIN = (
        "https://agent.example.com/elsewhere?q=1",
        "https://agent.example.com:443/hook",
        "https://AGENT.example.com/hook",
    )
    SECRET_PATHS = {
        "oauth2": "auth_config.client_secret",
        "api_key": "auth_config.key",
        "bearer": "auth_config.token",
        "basic": "auth_config.password",
        "custom": "auth_config",
    }

    @pytest.mark.parametrize("auth_type", list(SECRET_PATHS))
    async def test_a_secret_does_not_follow_to_another_origin(
        self, service: ExternalAgentService, alice: Principal, auth_type: str
    ) -> None:
        config = AUTH_CONFIGS[auth_type]
        agent = await service.create_agent(alice, document(auth_type=auth_type, auth_config=config))
        for url in self.OTHER_ORIGINS:
            for patch in ({"webhook_url": url}, {"webhook_url": url, "auth_type": auth_type, "auth_config": {}}):
                with pytest.raises(ValidationError) as raised:
                    await service.update_agent(alice, agent.id, patch)
                assert list(faults_of(raised)) == [self.SECRET_PATHS[auth_type]]
        for url in self.SAME_ORIGIN:
            agent = await service.update_agent(alice, agent.id, {"webhook_url": url})
            assert agent.webhook_url == url
        await service.update_agent(
            alice, agent.id, {"webhook_url": "https://other.example.com/", "auth_config": config}
        )
        invocation = await service.invoke_agent(alice, agent.id, None)
        assert invocation.error_code is None

    async def test_a_client_secret_does_not_follow_to_another_token_endpoint(
        self, service: ExternalAgentService, alice: Principal, transport: ScriptedTransport
    ) -> None:
        agent = await service.create_agent(alice, document(auth_type="oauth2", auth_config=OAUTH2))
        patch: dict[str, Any] = {"auth_config": {"token_url": "https://evil.example.com/token"}}
        with pytest.raises(ValidationError) as raised:
            await service.update_agent(alice, agent.id, patch)
        assert list(faults_of(raised)) == ["auth_config.client_secret"]
        await service.update_agent(alice, agent.id, {"auth_config": {"token_url": "https://login.example.com/v2"}})
        patch["auth_config"]["client_secret"] = "again"
        await service.update_agent(alice, agent.id, patch)
        await service.invoke_agent(alice, agent.id, None)
        assert transport.requests[-1].credentials == ClientCredentials(
            token_url="https://evil.example.com/token", client_id="id", client_secret="again"
        )

    async def test_all_of_a_custom_config_comes_again(self, service: ExternalAgentService, alice: Principal) -> None:
        config = {"headers": {"X-A": "a", "X-B": "b"}, "more": {"deep": ["secret"]}}
        agent = await service.create_agent(alice, document(auth_type="custom", auth_config=config))
        url = "https://other.example.com/"
        for partial in (
            {"headers": {"X-A": "a"}},
            {"headers": {"X-A": "a", "X-B": "b"}},
            {"headers": {"X-A": "a"}, "more": {"deep": []}},
            {"headers": {"X-A": "a", "X-B": "b"}, "more": {}},
        ):
            with pytest.raises(ValidationError) as raised:
                await service.update_agent(alice, agent.id, {"webhook_url": url, "auth_config": partial})
            assert list(faults_of(raised)) == ["auth_config"]
        given = {"headers": {"X-A": "a", "X-B": None}, "more": None}
        await service.update_agent(alice, agent.id, {"webhook_url": url, "auth_config": given})

    async def test_a_platforms_own_secret_stays(self, service: ExternalAgentService, alice: Principal) -> None:
        agent = await service.create_agent(
            alice, document(provider="telegram", platform_config=PLATFORM_CONFIGS["telegram"])
        )
        await service.update_agent(alice, agent.id, {"webhook_url": "https://other.example.com/"})

    async def test_a_faulty_url_is_told_as_well(self, service: ExternalAgentService, alice: Principal) -> None:
        agent = await service.create_agent(alice, with_key())
        for url in ("nonsense", "http://x", 5, ["x"], None):
            with pytest.raises(ValidationError) as raised:
                await service.update_agent(alice, agent.id, {"webhook_url": url})
            assert faults_of(raised).keys() == {"webhook_url", "auth_config.key"}


class TestPermissions:
    async def test_every_method_asks_for_its_own(self, service: ExternalAgentService, alice: Principal) -> None:
        agent = await service.create_agent(alice, document())
        invocation = await service.invoke_agent(alice, agent.id, None)

        calls: dict[str, list[Any]] = {
            "create": [lambda who: service.create_agent(who, document())],
            "read": [
                lambda who: service.get_agent(who, agent.id),
                lambda who: service.list_agents(who),
                lambda who: service.list_invocations(who, agent.id),
                lambda who: service.list_invocations(who),
                lambda who: service.get_invocation(who, agent.id, invocation.id),
            ],
            "update": [lambda who: service.update_agent(who, agent.id, {"name": "x"})],
            "invoke": [
                lambda who: service.invoke_agent(who, agent.id, None),
                lambda who: service.check_rate_limit(who, agent.id),
                lambda who: service.check_budget(who, agent.id),
                lambda who: service.log_invocation(who, agent.id, {"status": "failed", "request_payload": 1}),
            ],
            "delete": [lambda who: service.delete_agent(who, agent.id)],
        }
        for action, methods in calls.items():
            permission = f"{action}:external_agent"
            for method in methods:
                with pytest.raises(PermissionDenied):
                    await method(Principal("acme", "mallory", ALL_PERMISSIONS - {permission}))
                await method(Principal("acme", "alice", {permission}))

    async def test_another_organisations_agent_does_not_exist(
        self, service: ExternalAgentService, alice: Principal
    ) -> None:
        agent = await service.create_agent(alice, document())
        invocation = await service.invoke_agent(alice, agent.id, None)
        for org_id, agent_id in (("other", agent.id), ("acme", new_id())):
            for permissions in (ALL_PERMISSIONS, frozenset[str]()):
                eve = Principal(org_id, "eve", permissions)
                for call in (
                    service.get_agent(eve, agent_id),
                    service.update_agent(eve, agent_id, {"nonsense": 1}, if_version=[7]),
                    service.delete_agent(eve, agent_id),
                    service.invoke_agent(eve, agent_id, None),
                    service.check_rate_limit(eve, agent_id),
                    service.check_budget(eve, agent_id),
                    service.log_invocation(eve, agent_id, None),
                    service.list_invocations(eve, agent_id, limit="x"),
                    service.get_invocation(eve, agent_id, invocation.id),
                ):
                    with pytest.raises(AgentNotFound) as raised:
                        await call
                    assert str(raised.value) == "No such agent."
        eve = Principal("other", "eve", ALL_PERMISSIONS)
        assert (await service.list_agents(eve)).total == 0
        assert not (await service.list_invocations(eve)).items

    async def test_every_decision_is_told(
        self, service: ExternalAgentService, alice: Principal, observability: RecordingObservability
    ) -> None:
        agent = await service.create_agent(alice, document())
        nobody = Principal("acme", "nobody", set())
        with pytest.raises(PermissionDenied):
            await service.get_agent(nobody, agent.id)
        told = [
            (record.principal, record.action, record.agent_id, record.allowed) for record in observability.decisions
        ]
        assert told == [(alice, "create", None, True), (nobody, "read", agent.id, False)]

    async def test_an_observer_that_fails_changes_nothing(self, alice: Principal) -> None:
        def broken(record: object) -> None:
            raise RuntimeError("observer")

        service = memory_service(ScriptedTransport(), observability=broken)
        agent = await service.create_agent(alice, document())
        assert (await service.invoke_agent(alice, agent.id, None)).error_code is None


class TestDelete:
    async def test_a_deleted_agent_is_gone_but_its_invocations_are_not(
        self, service: ExternalAgentService, alice: Principal, store: MemoryStore
    ) -> None:
        agent = await service.create_agent(alice, with_key())
        invocation = await service.invoke_agent(alice, agent.id, None)
        await service.delete_agent(alice, agent.id)
        for call in (
            service.get_agent(alice, agent.id),
            service.update_agent(alice, agent.id, {"status": "active"}),
            service.delete_agent(alice, agent.id),
            service.invoke_agent(alice, agent.id, None),
            service.check_rate_limit(alice, agent.id),
            service.check_budget(alice, agent.id),
            service.log_invocation(alice, agent.id, {"status": "failed", "request_payload": 1}),
        ):
            with pytest.raises(AgentNotFound):
                await call
        assert await service.get_invocation(alice, agent.id, invocation.id) == invocation
        assert list((await service.list_invocations(alice, agent.id)).items) == [invocation]
        assert (await service.list_agents(alice)).total == 0
        assert [kept.id for kept in (await service.list_agents(alice, status="deleted")).items] == [agent.id]
        assert store.agents["acme", agent.id].sealed == {}


class TestLists:
    async def test_pages(self, service: ExternalAgentService, alice: Principal) -> None:
        agents = [await service.create_agent(alice, document(name=f"agent {number}")) for number in range(25)]
        first, third = (
            await service.list_agents(alice, limit=10),
            await service.list_agents(alice, page="3", limit="10"),
        )
        assert [agent.id for agent in first.items] == [agent.id for agent in agents[:14:-1]]
        assert [agent.id for agent in third.items] == [agent.id for agent in agents[4::-1]]
        assert (first.page, first.limit, first.total, first.pages) == (1, 10, 25, 3)
        beyond = await service.list_agents(alice, page=4, limit=10)
        assert (list(beyond.items), beyond.total) == ([], 25)

    async def test_an_empty_list_has_no_pages(self, service: ExternalAgentService, alice: Principal) -> None:
        page = await service.list_agents(alice)
        assert (page.total, page.pages, page.limit) == (0, 0, 20)

    async def test_filters_and_search(self, service: ExternalAgentService, alice: Principal) -> None:
        plain = await service.create_agent(alice, document(name="100%_ready", tags=["eu"]))
        other = await service.create_agent(
            alice,
            document(
                name="Other",
                description="is READY too",
                provider="teams",
                platform_config=PLATFORM_CONFIGS["teams"],
                status="inactive",
            ),
        )
        for filters, wanted in [
            ({"q": "ready"}, {plain.id, other.id}),
            ({"q": "%"}, {plain.id}),
            ({"q": ""}, {plain.id, other.id}),
            ({"tag": "eu"}, {plain.id}),
            ({"provider": "teams", "q": "ready"}, {other.id}),
            ({"status": "inactive"}, {other.id}),
            ({"status": "active", "provider": "teams"}, set()),
        ]:
            page = await service.list_agents(alice, **filters)
            assert {agent.id for agent in page.items} == wanted
            assert page.total == len(wanted)

    async def test_every_faulty_parameter_is_named(self, service: ExternalAgentService, alice: Principal) -> None:
        with pytest.raises(ValidationError) as raised:
            await service.list_agents(
                alice, page=0, limit=101, status="gone", provider="irc", tag="\0", q="\ud800", sort="name"
            )
        assert faults_of(raised).keys() == {"page", "limit", "status", "provider", "tag", "q", "sort"}
        with pytest.raises(ValidationError) as raised:
            await service.list_invocations(
                alice, limit="x", status="gone", since="2026-01-31T12:00:00", until="yesterday", cursor="!", page=1
            )
        assert faults_of(raised).keys() == {"limit", "status", "since", "until", "cursor", "page"}

    @pytest.mark.parametrize("limit", ["0", "-1", "+1", "1.0", "1e1", " 1", "", "٣", "x", "99999999999999999999"])
    async def test_a_limit_is_a_plain_number(self, service: ExternalAgentService, alice: Principal, limit: str) -> None:
        with pytest.raises(ValidationError):
            await service.list_agents(alice, limit=limit)

    async def test_invocations_by_cursor(
        self, service: ExternalAgentService, alice: Principal, clock: FakeClock
    ) -> None:
        agents = [await service.create_agent(alice, document()) for _ in range(2)]
        calls = []
        for number in range(7):
            calls.append(await service.invoke_agent(alice, agents[number % 2].id, number))
            clock.advance(1)
        seen: list[UUID] = []
        cursor = None
        while True:
            page = await service.list_invocations(alice, limit=3, cursor=cursor)
            seen += [call.id for call in page.items]
            if (cursor := page.next_cursor) is None:
                break
        assert seen == [call.id for call in reversed(calls)]
        exact = await service.list_invocations(alice, agents[0].id, limit=4)
        assert (len(exact.items), exact.next_cursor) == (4, None)
        bounded = await service.list_invocations(
            alice, since=calls[2].created_at.isoformat(), until=calls[4].created_at, status="succeeded"
        )
        assert list(bounded.items) == [calls[3], calls[2]]


class TestLogInvocation:
    async def test_a_finished_call_is_kept(
        self, service: ExternalAgentService, alice: Principal, transport: ScriptedTransport, clock: FakeClock
    ) -> None:
        agent = await service.create_agent(
            alice, document(rate_limit_config={"requests_per_day": 1}, budget_config={"max_monthly_cost": "0.1"})
        )
        logged = await service.log_invocation(
            alice,
            agent.id,
            {
                "status": "failed",
                "request_payload": {"big": 12345678901234567890123, "text": "\0\ud800"},
                "response_payload": JsonText('{"kept":  "as it is"}'),
                "response_status": 500,
                "execution_time_ms": 12,
                "error_code": "http_status",
                "error_message": "The agent answered 500.",
                "lineage_hop_id": "hop",
                "trace_id": "0af7651916cd43dd8448eb211c80319c",
            },
        )
        assert await service.get_invocation(alice, agent.id, logged.id) == logged
        assert (logged.status, logged.cost, logged.initiated_by) == ("failed", None, "alice")
        assert logged.response == JsonText('{"kept":  "as it is"}')
        assert logged.created_at == created_at_of(logged.id)
        assert not transport.requests
        assert await service.check_rate_limit(alice, agent.id)
        assert await service.check_budget(alice, agent.id)

    async def test_every_fault_is_named(self, service: ExternalAgentService, alice: Principal) -> None:
        agent = await service.create_agent(alice, document())
        for record, paths in [
            (None, {""}),
            ({}, {"status", "request_payload"}),
            ({"status": "running", "request_payload": float("nan"), "cost": 1}, {"status", "request_payload", "cost"}),
            (
                {
                    "status": "failed",
                    "request_payload": {1: 2},
                    "response_payload": object(),
                    "error_message": "\0",
                    "lineage_hop_id": "\ud800",
                    "execution_time_ms": -1,
                    "response_status": 99,
                    "trace_id": "x",
                    "error_code": "unheard_of",
                },
                {
                    "request_payload",
                    "response_payload",
                    "error_message",
                    "lineage_hop_id",
                    "execution_time_ms",
                    "response_status",
                    "trace_id",
                    "error_code",
                },
            ),
        ]:
            with pytest.raises(ValidationError) as raised:
                await service.log_invocation(alice, agent.id, record)
            assert faults_of(raised).keys() == paths

    async def test_whole_numbers_are_integers(self, service: ExternalAgentService, alice: Principal) -> None:
        agent = await service.create_agent(alice, document())
        logged = await service.log_invocation(
            alice, agent.id, {"status": "succeeded", "request_payload": None, "execution_time_ms": 5.0}
        )
        assert isinstance(logged.execution_time_ms, int)


class TestGetInvocation:
    async def test_it_is_found_under_its_own_agent(self, service: ExternalAgentService, alice: Principal) -> None:
        agent, sibling = await service.create_agent(alice, document()), await service.create_agent(alice, document())
        invocation = await service.invoke_agent(alice, agent.id, None)
        with pytest.raises(InvocationNotFound):
            await service.get_invocation(alice, sibling.id, invocation.id)
        with pytest.raises(InvocationNotFound):
            await service.get_invocation(alice, agent.id, new_id())

    async def test_a_running_invocation_is_seen(
        self, service: ExternalAgentService, alice: Principal, transport: ScriptedTransport
    ) -> None:
        agent = await service.create_agent(alice, document())
        gate = Gate()
        transport.script.append(gate)
        call = asyncio.create_task(service.invoke_agent(alice, agent.id, None))
        await gate.entered.wait()
        [running] = (await service.list_invocations(alice, agent.id)).items
        assert (running.status, running.completed_at) == ("running", None)
        gate.opened.set()
        assert (await call).status == "succeeded"
