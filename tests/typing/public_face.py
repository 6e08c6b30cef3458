"""How the library looks from outside; read by mypy --strict alone, never run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any, assert_type
from uuid import UUID

from external_agents import (
    AccessRequest,
    AgentPage,
    AgentStatus,
    Attempt,
    AuthScheme,
    BudgetUsage,
    Catalog,
    Decision,
    ErrorCode,
    ExternalAgent,
    ExternalAgentInvocation,
    ExternalAgentService,
    Fault,
    FixedHeaders,
    IdempotencyKeyInFlight,
    InvocationPage,
    InvocationStatus,
    Invoked,
    JsonText,
    Money,
    Outcome,
    Platform,
    Principal,
    Quota,
    RateLimited,
    RateLimitUsage,
    Unavailable,
    Usage,
    ValidationError,
    Window,
    WindowUsage,
)
from external_agents.adapters.memory import FunctionTransport, MemoryLedger, MemoryStore, SystemClock, memory_service
from external_agents.ports.ledger import InvocationLedger
from external_agents.ports.observability import Record
from external_agents.ports.policy import PolicyDecisionPoint
from external_agents.ports.system import Clock
from external_agents.ports.transport import AgentRequest, AgentTransport


class HostTransport:
    """A host's adapter need not inherit from the port."""

    async def exchange(self, request: AgentRequest) -> Outcome:
        assert_type(request.body, JsonText)
        assert_type(request.headers, Mapping[str, str])
        return Outcome(status=200, answer=request.body)


class HostPolicy:
    judges_lists_by_agent = False

    async def decide(self, requests: Sequence[AccessRequest]) -> Sequence[Decision]:
        return [Decision(request.agent is None) for request in requests]


def observe(record: Record) -> None:
    print(type(record).__name__)


async def echo(request: AgentRequest) -> Outcome:
    return Outcome(error=ErrorCode.TIMEOUT, may_have_run=True)


def ports() -> None:
    transport: AgentTransport = HostTransport()
    policy: PolicyDecisionPoint = HostPolicy()
    clock: Clock = SystemClock()
    ledger: InvocationLedger = MemoryLedger(MemoryStore(), clock)
    memory_service(transport, ledger=ledger, policy=policy, clock=clock, observability=observe)


def extended() -> Catalog:
    def headers(config: Mapping[str, Any]) -> FixedHeaders:
        return FixedHeaders({"X-Key": config["key"]})

    scheme = AuthScheme(auth_type="mine", schema={"type": "object"}, credentials=headers)
    return Catalog().extended([scheme], [Platform(provider="mine", schema={"type": "object"})])


async def use(service: ExternalAgentService, agent_id: UUID) -> None:
    principal = Principal("acme", "billing", {"invoke:external_agent"})
    assert_type(principal.permissions, frozenset[str])
    Principal(org_id="acme", subject="billing", permissions=["read:external_agent"], attributes={"team": "ops"})
    Principal("acme", "billing", ())

    assert_type(service.validate_auth_config("bearer", {"token": "t"}), None)
    agent = await service.create_agent(principal, {"name": "Research"})
    assert_type(agent, ExternalAgent)
    assert_type(agent.status, AgentStatus)
    assert_type(agent.tags, tuple[str, ...])
    assert_type(await service.get_agent(principal, agent_id), ExternalAgent)
    assert_type(await service.update_agent(principal, agent_id, {}, if_version=[1]), ExternalAgent)
    assert_type(await service.list_agents(principal, page=2, limit="10", status=AgentStatus.ACTIVE), AgentPage)
    assert_type(await service.check_rate_limit(principal, agent_id), bool)
    assert_type(await service.check_budget(principal, agent_id), bool)

    invocation = await service.invoke_agent(principal, agent_id, {"input": "hello"})
    assert_type(invocation, ExternalAgentInvocation)
    assert_type(invocation.status, InvocationStatus)
    assert_type(invocation.attempts, tuple[Attempt, ...])
    assert_type(invocation.cost, Money | None)
    assert_type(invocation.completed_at, datetime | None)
    if invocation.cost:
        assert_type(invocation.cost.amount, Decimal)

    invoked = await service.invoke(principal, agent_id, JsonText("{}"), lineage_hop_id="hop")
    assert_type(invoked, Invoked)
    assert_type(invoked.quotas.quotas, tuple[Quota, ...])
    assert_type([quota.window for quota in invoked.quotas.quotas], list[Window])

    assert_type(invoked.replayed, bool)
    assert_type(await service.invoke_agent(principal, agent_id, None, idempotency_key="k"), ExternalAgentInvocation)

    usage = await service.get_usage(principal, agent_id)
    assert_type(usage, Usage)
    assert_type(usage.rate_limit, RateLimitUsage)
    assert_type(usage.rate_limit.minute, WindowUsage | None)
    assert_type(usage.budget, BudgetUsage | None)
    if usage.budget:
        assert_type(usage.budget.remaining, Decimal | None)

    assert_type(await service.list_invocations(principal, agent_id, since="2026-01-31T12:00:00Z"), InvocationPage)
    assert_type(await service.log_invocation(principal, agent_id, {}), ExternalAgentInvocation)
    assert_type(await service.drain(), int)


async def errors(service: ExternalAgentService, principal: Principal, agent_id: UUID) -> None:
    try:
        await service.invoke_agent(principal, agent_id, None)
    except ValidationError as invalid:
        assert_type(invalid.errors, tuple[Fault, ...])
    except (RateLimited, IdempotencyKeyInFlight) as limited:
        assert_type(limited.retry_after_s, int)
    except Unavailable as outage:
        assert_type(outage.invocation_id, UUID | None)


def embedding() -> ExternalAgentService:
    return memory_service(FunctionTransport(echo), catalog=extended())


memory_service()  # type: ignore[call-arg]
ExternalAgentService()  # type: ignore[call-arg]
Principal("acme", "billing", None)  # type: ignore[arg-type]
