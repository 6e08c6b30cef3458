"""What agents, invocations, usage are in JSON. Numbers and payloads keep every digit: no float stands between."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, TypeAlias

import orjson

from external_agents.application.invocation import Invoked
from external_agents.application.parameters import AgentPage, InvocationPage
from external_agents.application.usage import BudgetUsage, Usage, WindowUsage
from external_agents.domain.agent import ExternalAgent
from external_agents.domain.budget import Money, plain
from external_agents.domain.invocation import Attempt, ExternalAgentInvocation
from external_agents.domain.json_values import JsonText, JsonValue, dumps
from external_agents.domain.rate_limit import RateQuotas

Json: TypeAlias = dict[str, Any]
"""For `encoded`: beside the usual values it holds UUIDs, times and fragments of ready JSON text."""


def encoded(document: object) -> bytes:
    return orjson.dumps(document, option=orjson.OPT_UTC_Z)


def agent_json(agent: ExternalAgent) -> Json:
    return {
        "id": str(agent.id),
        "org_id": agent.org_id,
        "name": agent.name,
        "description": agent.description,
        "provider": agent.provider,
        "webhook_url": agent.webhook_url,
        "auth_type": agent.auth_type,
        "auth_config": _config(agent.auth_config),
        "platform_config": _config(agent.platform_config),
        "rate_limit_config": _config(agent.rate_limit_config),
        "budget_config": _config(agent.budget_config),
        "tags": agent.tags,
        "timeout_s": int(agent.timeout_s) if agent.timeout_s == int(agent.timeout_s) else agent.timeout_s,
        "max_attempts": agent.max_attempts,
        "status": agent.status.value,
        "created_by": agent.created_by,
        "updated_by": agent.updated_by,
        "created_at": _moment(agent.created_at),
        "updated_at": _moment(agent.updated_at),
        "version": agent.version,
    }


def agent_page_json(page: AgentPage) -> Json:
    return {
        "items": [agent_json(agent) for agent in page.items],
        "page": page.page,
        "limit": page.limit,
        "total": page.total,
        "pages": page.pages,
    }


def invocation_json(invocation: ExternalAgentInvocation) -> Json:
    return {
        "id": invocation.id,
        "org_id": invocation.org_id,
        "external_agent_id": invocation.external_agent_id,
        "lineage_hop_id": invocation.lineage_hop_id,
        "initiated_by": invocation.initiated_by,
        "status": invocation.status,
        "request_payload": _text(invocation.request),
        "response_payload": None if invocation.response is None else _text(invocation.response),
        "response_status": invocation.response_status,
        "attempts": [_attempt(attempt) for attempt in invocation.attempts],
        "execution_time_ms": invocation.execution_time_ms,
        "error_code": invocation.error_code,
        "error_message": invocation.error_message,
        "cost": _money(invocation.cost) if invocation.cost else None,
        "cost_overrun": invocation.cost_overrun,
        "trace_id": invocation.trace_id,
        "created_at": _moment(invocation.created_at),
        "completed_at": _moment(invocation.completed_at) if invocation.completed_at else None,
    }


def invocation_page_json(page: InvocationPage) -> Json:
    return {"items": [invocation_json(invocation) for invocation in page.items], "next_cursor": page.next_cursor}


def quota_headers(quotas: RateQuotas) -> dict[str, str]:
    """
    RateLimit and RateLimit-Policy (draft-ietf-httpapi-ratelimit-headers), as far as limits are set.

    `q`: the limit; `w`: its window in seconds; `r`: what is left; `t`: seconds until more comes free.
    """
    if not quotas.quotas:
        return {}
    return {
        "RateLimit-Policy": ", ".join(
            f'"{quota.window}";q={quota.limit};w={quota.window.seconds}' for quota in quotas.quotas
        ),
        "RateLimit": ", ".join(
            f'"{quota.window}";r={quota.remaining};t={math.ceil(quota.resets_in_s)}' for quota in quotas.quotas
        ),
    }


def invoked_headers(invoked: Invoked) -> dict[str, str]:
    """The quotas, and whether it is an earlier invocation's answer again."""
    replayed = {"Idempotent-Replayed": "true"} if invoked.replayed else {}
    return {**quota_headers(invoked.quotas), **replayed}


def usage_json(usage: Usage) -> Json:
    windows = usage.rate_limit
    return {
        "rate_limit": {
            "minute": _window(windows.minute) if windows.minute else None,
            "hour": _window(windows.hour) if windows.hour else None,
            "day": _window(windows.day) if windows.day else None,
        },
        "budget": _budget(usage.budget) if usage.budget else None,
    }


def _window(window: WindowUsage) -> Json:
    return {
        "limit": window.limit,
        "used": window.used,
        "remaining": window.remaining,
        "resets_at": _moment(window.resets_at),
    }


def _budget(budget: BudgetUsage) -> Json:
    return {
        "currency": budget.currency,
        "month": f"{budget.month:%Y-%m}",
        "cap": None if budget.cap is None else plain(budget.cap),
        "spent": plain(budget.spent),
        "reserved": plain(budget.reserved),
        "remaining": None if budget.remaining is None else plain(budget.remaining),
    }


def _config(config: Mapping[str, JsonValue] | None) -> orjson.Fragment | None:
    return None if config is None else orjson.Fragment(dumps(config).encode())


def _text(payload: JsonText) -> orjson.Fragment:
    return orjson.Fragment(payload.text.encode())


def _attempt(attempt: Attempt) -> Json:
    came: Json = {"status": attempt.status} if attempt.error is None else {"error": attempt.error.value}
    return {"at": _moment(attempt.at), **came, "duration_ms": attempt.duration_ms}


def _money(money: Money) -> Json:
    return {"amount": money.plain_amount, "currency": money.currency}


def _moment(at: datetime) -> datetime | str:
    """RFC 3339 in UTC, always with microseconds: orjson writes them in a tenth of the time, but leaves zeros out."""
    in_utc = at.astimezone(UTC)
    return in_utc if in_utc.microsecond else in_utc.isoformat(timespec="microseconds").removesuffix("+00:00") + "Z"
