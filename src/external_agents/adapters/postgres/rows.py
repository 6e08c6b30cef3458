"""The domain's values as rows, and back."""

from __future__ import annotations

from decimal import Decimal
from typing import Any, TypeAlias

from cattrs.preconf.orjson import make_converter
from sqlalchemy import RowMapping

from external_agents.adapters.postgres.columns import config_of, config_text, storable
from external_agents.domain.agent import AgentStatus, ExternalAgent
from external_agents.domain.budget import BudgetAccount, Money
from external_agents.domain.invocation import Attempt, ErrorCode, ExternalAgentInvocation, InvocationStatus
from external_agents.domain.json_values import JsonText
from external_agents.domain.rate_limit import BUCKETS, RateWindows, Window, WindowCount

Row: TypeAlias = RowMapping

END_COLUMNS = (
    *("status", "response_payload", "response_status", "attempts", "execution_time_ms", "error_code", "error_message"),
    *("cost_amount", "cost_currency", "cost_overrun", "completed_at"),
)
"""What the end of an invocation changes in its row."""

INVOCATION_COLUMNS = (
    *("org_id", "id", "external_agent_id", "lineage_hop_id", "initiated_by", "request_payload", "reservation_amount"),
    *("reservation_currency", "trace_id", "created_at", "ended", *END_COLUMNS),
)
_attempts = make_converter(omit_if_default=True)

WINDOWS_COLUMNS = tuple(f"{window.value}_{part}" for window in Window for part in ("head", "counts"))


def folded(text: str) -> str:
    """For comparing whatever the case; needles and haystacks both."""
    return text.casefold()


def agent_values(agent: ExternalAgent) -> dict[str, Any]:
    return {
        "org_id": agent.org_id,
        "id": agent.id,
        "name": agent.name,
        "description": agent.description,
        "provider": agent.provider,
        "webhook_url": agent.webhook_url,
        "auth_type": agent.auth_type,
        "auth_config": config_text(agent.auth_config),
        "platform_config": config_text(agent.platform_config),
        "rate_limit_config": config_text(agent.rate_limit_config),
        "budget_config": config_text(agent.budget_config),
        "tags": list(agent.tags),
        "timeout_s": agent.timeout_s,
        "max_attempts": agent.max_attempts,
        "previous_signing_secret_until": agent.previous_signing_secret_until,
        "status": agent.status.value,
        "created_by": agent.created_by,
        "updated_by": agent.updated_by,
        "created_at": agent.created_at,
        "updated_at": agent.updated_at,
        "version": agent.version,
        "name_folded": folded(agent.name),
        "description_folded": folded(agent.description),
    }


def agent_of(row: Row) -> ExternalAgent:
    return ExternalAgent(
        id=row["id"],
        org_id=row["org_id"],
        name=row["name"],
        description=row["description"],
        provider=row["provider"],
        webhook_url=row["webhook_url"],
        auth_type=row["auth_type"],
        auth_config=config_of(row["auth_config"]),
        platform_config=config_of(row["platform_config"]),
        rate_limit_config=config_of(row["rate_limit_config"]),
        budget_config=config_of(row["budget_config"]),
        tags=tuple(row["tags"]),
        timeout_s=row["timeout_s"],
        max_attempts=row["max_attempts"],
        previous_signing_secret_until=row["previous_signing_secret_until"],
        status=AgentStatus(row["status"]),
        created_by=row["created_by"],
        updated_by=row["updated_by"],
        created_at=row["created_at"],
        updated_at=row["updated_at"],
        version=row["version"],
        sealed=dict(zip(row["sealed_fields"] or (), row["sealed_envelopes"] or (), strict=True)),
    )


def invocation_values(invocation: ExternalAgentInvocation) -> dict[str, Any]:
    """By INVOCATION_COLUMNS: a whole row, but for the instance it runs under."""
    return {
        "org_id": invocation.org_id,
        "id": invocation.id,
        "external_agent_id": invocation.external_agent_id,
        "lineage_hop_id": storable(invocation.lineage_hop_id),
        "initiated_by": invocation.initiated_by,
        "request_payload": invocation.request.text,
        **_money_values("reservation", invocation.reservation),
        "trace_id": invocation.trace_id,
        "created_at": invocation.created_at,
        "ended": invocation.has_ended,
        **end_values(invocation),
    }


def end_values(invocation: ExternalAgentInvocation) -> dict[str, Any]:
    """By END_COLUMNS."""
    return {
        "status": invocation.status.value,
        "response_payload": invocation.response.text if invocation.response else None,
        "response_status": invocation.response_status,
        "attempts": attempts_text(invocation.attempts),
        "execution_time_ms": invocation.execution_time_ms,
        "error_code": invocation.error_code.value if invocation.error_code else None,
        "error_message": storable(invocation.error_message),
        **_money_values("cost", invocation.cost),
        "cost_overrun": invocation.cost_overrun,
        "completed_at": invocation.completed_at,
    }


def invocation_of(row: Row) -> ExternalAgentInvocation:
    return ExternalAgentInvocation(
        id=row["id"],
        org_id=row["org_id"],
        external_agent_id=row["external_agent_id"],
        lineage_hop_id=row["lineage_hop_id"],
        initiated_by=row["initiated_by"],
        status=InvocationStatus(row["status"]),
        request=JsonText(row["request_payload"]),
        response=JsonText(row["response_payload"]) if row["response_payload"] is not None else None,
        response_status=row["response_status"],
        attempts=_attempts.loads(row["attempts"], tuple[Attempt, ...]),
        execution_time_ms=row["execution_time_ms"],
        error_code=ErrorCode(row["error_code"]) if row["error_code"] is not None else None,
        error_message=row["error_message"],
        reservation=money_of(row["reservation_amount"], row["reservation_currency"]),
        cost=money_of(row["cost_amount"], row["cost_currency"]),
        cost_overrun=row["cost_overrun"],
        trace_id=row["trace_id"],
        created_at=row["created_at"],
        completed_at=row["completed_at"],
    )


def attempts_text(attempts: tuple[Attempt, ...]) -> str:
    return _attempts.dumps(attempts).decode()


def money_of(amount: Decimal | None, currency: str | None) -> Money | None:
    return None if amount is None or currency is None else Money(amount, currency)


def account_of(row: Row) -> BudgetAccount:
    """Of `spent` and `reserved`; empty where the row has none."""
    return BudgetAccount() if row["spent"] is None else BudgetAccount(spent=row["spent"], reserved=row["reserved"])


def windows_values(windows: RateWindows) -> dict[str, Any]:
    """By WINDOWS_COLUMNS. Behind the counts stands their sum."""
    values: dict[str, Any] = {}
    for window in Window:
        values[f"{window.value}_head"] = windows[window].head
        values[f"{window.value}_counts"] = [*windows[window].counts, windows[window].used]
    return values


def windows_of(row: Row) -> RateWindows:
    return RateWindows(
        *(WindowCount(row[f"{window.value}_head"], tuple(row[f"{window.value}_counts"][:BUCKETS])) for window in Window)
    )


def _money_values(prefix: str, money: Money | None) -> dict[str, Any]:
    return {
        f"{prefix}_amount": money.amount if money else None,
        f"{prefix}_currency": money.currency if money else None,
    }
