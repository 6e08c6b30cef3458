"""What the operations of the OpenAPI document are put together from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from external_agents.adapters.rest.openapi_schemas import ref
from external_agents.domain.access import Action
from external_agents.domain.schema import JsonSchema

Document = dict[str, Any]

JSON = "application/json"


def guarded(
    action: Action,
    operation_id: str,
    summary: str,
    description: str,
    *,
    responses: Document,
    errors: Iterable[str],
    **rest: Any,
) -> Document:
    every = sorted({"401", "403", "500", "503", *errors})
    return {
        "operationId": operation_id,
        "tags": ["invocations" if "nvo" in operation_id else "agents"],
        "summary": summary,
        "description": f"{description}\n\nNeeds the permission `{action.permission}`.".strip(),
        **rest,
        "responses": {**responses, **{status: {"$ref": f"#/components/responses/{status}"} for status in every}},
        "security": [{"bearer": []}],
    }


def open_to_all(operation_id: str, summary: str, schema: JsonSchema) -> Document:
    return {
        "operationId": operation_id,
        "tags": ["service"],
        "summary": summary,
        "responses": {"200": {"description": "Yes.", "content": {JSON: {"schema": schema}}}},
        "security": [],
    }


def page(operation_id: str, summary: str, *media_types: str) -> Document:
    return {
        "operationId": operation_id,
        "tags": ["service"],
        "summary": summary,
        "responses": {
            "200": {
                "description": "The page.",
                "content": {media_type: {"schema": {"type": "string"}} for media_type in media_types},
            }
        },
        "security": [],
    }


def object_of(**properties: JsonSchema) -> Document:
    return {"type": "object", "properties": properties, "required": list(properties)}


def answer(description: str, schema: JsonSchema, example: Any, **headers: str) -> Document:
    references = {name.replace("_", "-"): {"$ref": f"#/components/headers/{to}"} for name, to in headers.items()}
    return {
        "description": description,
        "headers": references,
        "content": {JSON: {"schema": schema, "example": example}},
    }


def body(schema: str, values: Mapping[str, Any], *media_types: str) -> Document:
    return {
        "required": True,
        "content": {media_type: {"schema": ref(schema), "examples": dict(values)} for media_type in media_types},
    }


def links(*operation_ids: str, **parameters: str) -> Document:
    """To what can be asked next, with parameters from this answer."""
    return {operation_id: {"operationId": operation_id, "parameters": parameters} for operation_id in operation_ids}


def query_parameters(filters: Mapping[str, JsonSchema]) -> list[Document]:
    return [
        {
            "name": name,
            "in": "query",
            "description": schema["description"],
            "schema": {key: value for key, value in schema.items() if key != "description"},
        }
        for name, schema in filters.items()
    ]


def id_parameter(name: str) -> Document:
    return {
        "name": name,
        "in": "path",
        "required": True,
        "schema": {"type": "string", "format": "uuid"},
        "description": "What is no UUID is answered like an unknown id: 404.",
    }


def if_match() -> Document:
    return header_parameter("If-Match", 'Change it only while its version is one of these: `"3"`; else 412.')


def header_parameter(name: str, description: str, **schema: Any) -> Document:
    return {"name": name, "in": "header", "description": description, "schema": {"type": "string", **schema}}
