"""The schemas of the OpenAPI document, made from those that the domain validates with."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from external_agents.adapters.rest.errors import KINDS
from external_agents.domain.access import ORG_ID_PATTERN
from external_agents.domain.agent import AgentStatus
from external_agents.domain.auth import EVERYTHING
from external_agents.domain.catalog import Catalog
from external_agents.domain.invocation import ErrorCode, InvocationStatus
from external_agents.domain.rate_limit import Window
from external_agents.domain.schema import JsonSchema

Document = dict[str, Any]

_UUID = {"type": "string", "format": "uuid"}
_MOMENT = {"type": "string", "format": "date-time"}
_URL = {"format": "uri", "pattern": "^[Hh][Tt][Tt][Pp][Ss]?://"}
"""What can be said here of a URL that a tenant gives; which hosts and ports it may name is for the operator to say."""
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]")


def ref(name: str) -> Document:
    return {"$ref": f"#/components/schemas/{_component(name)}"}


def schemas(catalog: Catalog) -> Document:
    """All of them, by name."""
    return {
        "AgentToCreate": _agent_to_create(catalog),
        "AgentPatch": _agent_patch(catalog),
        "Agent": _agent(catalog),
        "AgentPage": _page(
            "Agent",
            page={"type": "integer", "minimum": 1},
            limit={"type": "integer", "minimum": 1},
            total={"type": "integer", "minimum": 0, "description": "Agents on all pages."},
            pages={"type": "integer", "minimum": 0},
        ),
        "Invocation": INVOCATION,
        "InvocationPage": _page(
            "Invocation",
            next_cursor={"type": ["string", "null"], "description": "Pass it as `cursor`; null on the last page."},
        ),
        "Usage": USAGE,
        "Problem": PROBLEM,
        **dict(_configs(catalog)),
    }


def _configs(catalog: Catalog) -> Iterator[tuple[str, JsonSchema]]:
    """Each auth_config and platform_config: as it is sent, and what is shown of it where that is less."""
    kinds: list[tuple[str, JsonSchema, frozenset[str]]] = [
        *(
            (f"auth_config.{name}", _with_urls(scheme.schema, scheme.url_fields), scheme.secret_fields)
            for name, scheme in catalog.auth_schemes.items()
        ),
        *(
            (f"platform_config.{name}", _with_urls(kind.schema, kind.url_fields), kind.secret_fields)
            for name, kind in catalog.platforms.items()
        ),
    ]
    for name, schema, secret_fields in kinds:
        yield _component(name), schema
        if secret_fields:
            yield _component(f"{name}.shown"), _without(schema, secret_fields)


def _with_urls(schema: JsonSchema, url_fields: Iterable[str]) -> JsonSchema:
    properties = schema.get("properties", {})
    urls = {name: {**properties[name], **_URL} for name in url_fields if name in properties}
    return {**schema, "properties": {**properties, **urls}} if urls else schema


def _without(schema: JsonSchema, secret_fields: frozenset[str]) -> JsonSchema:
    if secret_fields == EVERYTHING:
        return {"type": "object", "maxProperties": 0, "description": "All of it is secret."}
    shown = {**schema, "properties": _less(schema.get("properties", {}), secret_fields)}
    shown["required"] = [name for name in schema.get("required", ()) if name not in secret_fields]
    shown["examples"] = [_less(example, secret_fields) for example in schema.get("examples", ())]
    return shown


def _less(members: Mapping[str, Any], names: frozenset[str]) -> Document:
    return {name: value for name, value in members.items() if name not in names}


def _agent_to_create(catalog: Catalog) -> Document:
    definition = _with_urls(catalog.create_schema.definition, ("webhook_url",))
    return {**definition, "allOf": _variants(catalog, shown=False)}


def _agent_patch(catalog: Catalog) -> Document:
    """What a null or a partial config comes to is judged in the merged whole, so only the names are told here."""
    definition = catalog.patch_schema.definition
    required = catalog.create_schema.definition["required"]
    properties: Document = {}
    for name in definition["properties"]:
        schema = {key: value for key, value in catalog.agent_properties[name].items() if key != "default"}
        as_it_is = name in required or "null" in schema["type"]
        properties[name] = schema if as_it_is else {"anyOf": [schema, {"type": "null"}]}
    return {
        **_with_urls({**definition, "properties": properties}, ("webhook_url",)),
        "description": "A JSON merge patch (RFC 7396): what is absent stays, secrets too; null stands for the default.",
    }


def _agent(catalog: Catalog) -> Document:
    fields: Document = {
        name: {key: value for key, value in schema.items() if key != "default"}
        for name, schema in catalog.agent_properties.items()
        if not schema.get("writeOnly")
    }
    fields["status"] = {"type": "string", "enum": [status.value for status in AgentStatus]}
    properties: Document = {
        "id": {**_UUID, "description": "UUIDv7."},
        "org_id": {"type": "string", "pattern": f"^{ORG_ID_PATTERN}$"},
        **fields,
        "created_by": {"type": "string", "description": "The subject who registered it."},
        "updated_by": {"type": "string", "description": "The subject who changed it last."},
        "created_at": _MOMENT,
        "updated_at": _MOMENT,
        "version": {"type": "integer", "minimum": 1, "description": "Counts the changes; the ETag."},
    }
    return {
        "type": "object",
        "description": "An agent. Secret fields are never shown.",
        "properties": properties,
        "required": list(properties),
        "allOf": _variants(catalog, shown=True),
    }


def _variants(catalog: Catalog, *, shown: bool) -> list[Document]:
    """One of the auth types with its config, and one of the platforms with its own: as they are sent, or shown."""

    def variant(kind: str, name: str, config: str, *, secret_fields: frozenset[str], required: bool) -> Document:
        component = f"{config}.{name}.shown" if shown and secret_fields else f"{config}.{name}"
        return {
            "title": f"{kind}: {name}",
            "properties": {kind: {"const": name}, config: ref(component)},
            "required": [kind, config] if required or shown else [kind],
        }

    auth_types = [
        variant("auth_type", name, "auth_config", secret_fields=scheme.secret_fields, required=name != "none")
        for name, scheme in catalog.auth_schemes.items()
    ]
    providers = [
        variant("provider", name, "platform_config", secret_fields=kind.secret_fields, required=kind.config_required)
        for name, kind in catalog.platforms.items()
    ]
    return [{"oneOf": auth_types}, {"oneOf": providers}]


def _page(item: str, **properties: JsonSchema) -> Document:
    return {
        "type": "object",
        "properties": {"items": {"type": "array", "items": ref(item)}, **properties},
        "required": ["items", *properties],
    }


def _component(name: str) -> str:
    return _UNSAFE.sub("_", name)


_ATTEMPT = {
    "type": "object",
    "properties": {
        "at": _MOMENT,
        "status": {"type": "integer", "description": "Of the agent's answer."},
        "error": {"type": "string", "enum": [code.value for code in ErrorCode], "description": "Instead of a status."},
        "duration_ms": {"type": "integer", "minimum": 0},
    },
    "required": ["at", "duration_ms"],
    "oneOf": [{"required": ["status"]}, {"required": ["error"]}],
}

_INVOCATION_PROPERTIES: Document = {
    "id": {**_UUID, "description": "UUIDv7; the agent gets it as Idempotency-Key."},
    "org_id": {"type": "string"},
    "external_agent_id": _UUID,
    "lineage_hop_id": {"type": ["string", "null"], "description": "The caller's X-Lineage-Hop-Id."},
    "initiated_by": {"type": "string", "description": "The subject who asked."},
    "status": {"type": "string", "enum": [status.value for status in InvocationStatus]},
    "request_payload": {"description": "What was sent, as it came: any JSON."},
    "response_payload": {"description": "What the agent answered; a body that was not JSON is a string."},
    "response_status": {"type": ["integer", "null"]},
    "attempts": {"type": "array", "items": _ATTEMPT},
    "execution_time_ms": {"type": ["integer", "null"], "minimum": 0},
    "error_code": {"enum": [*(code.value for code in ErrorCode), None]},
    "error_message": {"type": ["string", "null"]},
    "cost": {
        "type": ["object", "null"],
        "description": "What it was charged.",
        "properties": {
            "amount": {"type": "string", "description": "A decimal."},
            "currency": {"type": "string"},
        },
        "required": ["amount", "currency"],
    },
    "cost_overrun": {"type": "boolean", "description": "The agent's own figure was above the reservation."},
    "trace_id": {"type": "string", "pattern": "^[0-9a-f]{32}$", "description": "W3C Trace Context."},
    "created_at": _MOMENT,
    "completed_at": {"anyOf": [_MOMENT, {"type": "null"}]},
}

INVOCATION: Document = {
    "type": "object",
    "description": "The durable record of one call, whatever its attempts.",
    "properties": _INVOCATION_PROPERTIES,
    "required": list(_INVOCATION_PROPERTIES),
}

_WINDOW: Document = {
    "type": ["object", "null"],
    "description": "null: not limited.",
    "properties": {
        "limit": {"type": "integer", "minimum": 0},
        "used": {"type": "integer", "minimum": 0, "description": "Invocations that were admitted within the window."},
        "remaining": {"type": "integer", "minimum": 0},
        "resets_at": {**_MOMENT, "description": "When the next place comes free; with nothing used, now."},
    },
    "required": ["limit", "used", "remaining", "resets_at"],
}

_UNDER_CAP: Document = {"type": ["string", "null"], "description": "A decimal; null: there is no max_monthly_cost."}

USAGE: Document = {
    "type": "object",
    "description": "How an agent's rate limits and its budget stand.",
    "properties": {
        "rate_limit": {
            "type": "object",
            "properties": {window.value: _WINDOW for window in Window},
            "required": [window.value for window in Window],
        },
        "budget": {
            "type": ["object", "null"],
            "description": "null: the agent has no budget_config.",
            "properties": {
                "currency": {"type": "string"},
                "month": {"type": "string", "pattern": r"^\d{4}-\d{2}$", "description": "In UTC."},
                "cap": _UNDER_CAP,
                "spent": {"type": "string", "description": "Charged for invocations that have ended: a decimal."},
                "reserved": {"type": "string", "description": "Held for invocations that run: a decimal."},
                "remaining": _UNDER_CAP,
            },
            "required": ["currency", "month", "cap", "spent", "reserved", "remaining"],
        },
    },
    "required": ["rate_limit", "budget"],
}

PROBLEM: Document = {
    "type": "object",
    "description": "Problem details (RFC 9457).",
    "properties": {
        "type": {
            "type": "string",
            "format": "uri",
            "enum": list(dict.fromkeys(kind.type for kind in KINDS.values())),
            "description": "The kind of problem; stable, for programs.",
        },
        "title": {"type": "string", "description": "The same for every problem of the kind."},
        "status": {"type": "integer", "description": "The HTTP status."},
        "detail": {"type": "string", "description": "This occurrence, for people."},
        "errors": {
            "type": "array",
            "description": "Every fault of an invalid request.",
            "items": {
                "type": "object",
                "properties": {
                    "path": {"type": "string", "description": "`auth_config.client_id`, `tags[2]`; empty: the whole."},
                    "message": {"type": "string"},
                },
                "required": ["path", "message"],
            },
        },
        "invocation": {**ref("Invocation"), "description": "With 502 and 504: the invocation as it ended."},
        "invocation_id": {**_UUID, "description": "With 503: it was admitted; look it up instead of sending it again."},
        "checks": {"type": "object", "description": "With 503 of /readyz.", "additionalProperties": {"type": "string"}},
    },
    "required": ["type", "title", "status", "detail"],
}
