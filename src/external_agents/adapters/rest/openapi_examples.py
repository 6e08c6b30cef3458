"""Examples for the OpenAPI document, made from those of the schemas."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from external_agents.adapters.rest.errors import Kind
from external_agents.domain.catalog import Catalog
from external_agents.domain.schema import JsonSchema

Document = dict[str, Any]

_ID = "019ab0c5-7a52-7f3e-9c1d-2b8f4a6e0d13"
_INVOCATION_ID = "019ab0c6-01d4-7b20-8f6a-5c3e9d7a1b42"
_AT = "2026-01-31T12:00:00.000000Z"

INVOCATION: Document = {
    "id": _INVOCATION_ID,
    "org_id": "acme",
    "external_agent_id": _ID,
    "lineage_hop_id": None,
    "initiated_by": "billing",
    "status": "succeeded",
    "request_payload": {"input": "hello"},
    "response_payload": {"output": "world", "metadata": {"cost": "0.05"}},
    "response_status": 200,
    "attempts": [{"at": _AT, "status": 200, "duration_ms": 412}],
    "execution_time_ms": 412,
    "error_code": None,
    "error_message": None,
    "cost": {"amount": "0.05", "currency": "USD"},
    "cost_overrun": False,
    "trace_id": "4bf92f3577b34da6a3ce929d0e0e4736",
    "created_at": _AT,
    "completed_at": "2026-01-31T12:00:00.412000Z",
}

USAGE: Document = {
    "rate_limit": {
        "minute": {"limit": 60, "used": 2, "remaining": 58, "resets_at": "2026-01-31T12:00:48.000000Z"},
        "hour": None,
        "day": {"limit": 5000, "used": 417, "remaining": 4583, "resets_at": "2026-01-31T12:28:48.000000Z"},
    },
    "budget": {
        "currency": "EUR",
        "month": "2026-01",
        "cap": "100",
        "spent": "41.65",
        "reserved": "0.2",
        "remaining": "58.15",
    },
}

_FAILED: Document = {
    **INVOCATION,
    "status": "failed",
    "response_payload": None,
    "response_status": None,
    "attempts": [{"at": _AT, "error": "timeout", "duration_ms": 30000}],
    "execution_time_ms": 30000,
    "error_code": "timeout",
    "error_message": "The agent did not answer in time.",
    "cost": None,
}

_MEMBERS: Mapping[str, Document] = {
    "invalid": {
        "errors": [
            {"path": "auth_config.client_id", "message": "is required"},
            {"path": "webhook_url", "message": "must name a host"},
        ]
    },
    "agent-failed": {"invocation": {**_FAILED, "error_code": "connection_failed"}},
    "agent-timed-out": {"invocation": _FAILED},
    "unavailable": {"invocation_id": _INVOCATION_ID},
    "not-ready": {"checks": {"database": "cannot be reached", "schema": "ok", "keys": "ok"}},
}

PATCHES: Document = {
    "switch off": {"value": {"status": "inactive"}},
    "limits": {"value": {"rate_limit_config": {"requests_per_minute": 10}, "budget_config": None}},
    "new signing secret": {"value": {"signing_secret": "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"}},
}


def agents_to_create(catalog: Catalog) -> Document:
    """One for each auth type and one for each platform."""
    examples: Document = {}
    for auth_type, scheme in catalog.auth_schemes.items():
        config = _example(scheme.schema)
        examples[f"auth_type {auth_type}"] = {
            "value": {**_base("custom"), "auth_type": auth_type, **({"auth_config": config} if config else {})}
        }
    bearer = catalog.auth_schemes.get("bearer") or next(iter(catalog.auth_schemes.values()))
    for provider, platform in catalog.platforms.items():
        examples[f"provider {provider}"] = {
            "value": {
                **_base(provider),
                "auth_type": bearer.auth_type,
                "auth_config": _example(bearer.schema),
                "platform_config": _example(platform.schema),
            }
        }
    return examples


def agent(catalog: Catalog) -> Document:
    """What creating the first of them answers."""
    document: Document = next(iter(agents_to_create(catalog).values()))["value"]
    scheme = catalog.auth_schemes[document["auth_type"]]
    return {
        "id": _ID,
        "org_id": "acme",
        **document,
        "description": "",
        "auth_config": {
            name: value for name, value in document.get("auth_config", {}).items() if name not in scheme.secret_fields
        },
        "platform_config": {},
        "rate_limit_config": {"requests_per_minute": 60},
        "budget_config": None,
        "tags": [],
        "timeout_s": 30,
        "max_attempts": 3,
        "status": "active",
        "created_by": "billing",
        "updated_by": "billing",
        "created_at": _AT,
        "updated_at": _AT,
        "version": 1,
    }


def problem(kind: Kind) -> Document:
    """A problem of this kind."""
    example = {"type": kind.type, "title": kind.title, "status": kind.status, "detail": kind.detail or f"{kind.title}."}
    return {**example, **_MEMBERS.get(kind.name, {})}


def _base(provider: str) -> Document:
    return {"name": "Research", "provider": provider, "webhook_url": "https://agent.example.com/invoke"}


def _example(schema: JsonSchema) -> Mapping[str, Any]:
    example: Mapping[str, Any] = next(iter(schema.get("examples", ())), {})
    return example
