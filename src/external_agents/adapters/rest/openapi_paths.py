"""The operations of the OpenAPI document."""

from __future__ import annotations

from collections.abc import Iterable

from external_agents.adapters.rest import openapi_examples as examples
from external_agents.adapters.rest.openapi_parts import (
    JSON,
    Document,
    answer,
    body,
    guarded,
    header_parameter,
    id_parameter,
    if_match,
    links,
    object_of,
    open_to_all,
    page,
    query_parameters,
)
from external_agents.adapters.rest.openapi_schemas import ref
from external_agents.adapters.rest.queries import INVOCATION_FILTERS, agent_filters
from external_agents.adapters.rest.resources import API_PREFIX
from external_agents.application.invocation_request import LINEAGE_HOP_ID_MAX
from external_agents.domain.access import Action
from external_agents.domain.catalog import Catalog
from external_agents.domain.idempotency import KEY_LENGTH_MAX

OF_INVOKED = {
    "RateLimit": "RateLimit",
    "RateLimit-Policy": "RateLimitPolicy",
    "Idempotent-Replayed": "IdempotentReplayed",
}
"""The header fields of every answer with an invocation that was admitted."""


_OF_AGENT = ("getAgent", "updateAgent", "deleteAgent", "invokeAgent", "getUsage", "listInvocations")


def paths(catalog: Catalog) -> Document:
    agent, invocations = f"{API_PREFIX}/{{agent_id}}", f"{API_PREFIX}/{{agent_id}}/invocations"
    return {
        API_PREFIX: {"post": _create(catalog), "get": _list_agents(catalog)},
        f"{API_PREFIX}/invocations": {"get": _list_invocations("listOrganisationInvocations", "every agent", ())},
        agent: {
            "get": _get(catalog),
            "patch": _patch(catalog),
            "delete": _delete(),
            "parameters": [id_parameter("agent_id")],
        },
        f"{agent}/invoke": {"post": _invoke(), "parameters": [id_parameter("agent_id")]},
        f"{agent}/usage": {"get": _usage(), "parameters": [id_parameter("agent_id")]},
        invocations: {
            "get": _list_invocations("listInvocations", "an agent, a deleted one too", ("404",)),
            "parameters": [id_parameter("agent_id")],
        },
        f"{invocations}/{{invocation_id}}": {
            "get": _get_invocation(),
            "parameters": [id_parameter("agent_id"), id_parameter("invocation_id")],
        },
        "/healthz": {"get": open_to_all("health", "Whether the process lives", object_of(status={"const": "ok"}))},
        "/readyz": {"get": _ready()},
        "/metrics": {"get": page("metrics", "What was counted and measured, for Prometheus to fetch", "text/plain")},
        "/openapi.json": {"get": open_to_all("openapi", "This document", {"type": "object"})},
        "/docs": {"get": page("docs", "This document, to read and to try out", "text/html")},
        "/docs/{name}": {
            "get": _asset(),
            "parameters": [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}],
        },
    }


def _create(catalog: Catalog) -> Document:
    return guarded(
        Action.CREATE,
        "createAgent",
        "Register an agent",
        "`auth_type` decides what `auth_config` holds, `provider` what `platform_config` holds. Secret fields are "
        "sealed and never shown again.",
        requestBody=body("AgentToCreate", examples.agents_to_create(catalog), JSON),
        responses={
            "201": {
                **answer("The agent.", ref("Agent"), examples.agent(catalog), ETag="ETag", Location="Location"),
                "links": links(*_OF_AGENT, agent_id="$response.body#/id"),
            },
        },
        errors=("400", "408", "413", "415"),
    )


def _list_agents(catalog: Catalog) -> Document:
    shown = {"items": [examples.agent(catalog)], "page": 1, "limit": 20, "total": 1, "pages": 1}
    return guarded(
        Action.READ,
        "listAgents",
        "List the agents",
        "Newest first. A page beyond the last one is empty.",
        parameters=query_parameters(agent_filters(catalog)),
        responses={"200": answer("A page.", ref("AgentPage"), shown)},
        errors=("400",),
    )


def _get(catalog: Catalog) -> Document:
    return guarded(
        Action.READ,
        "getAgent",
        "Show an agent",
        "",
        parameters=[
            header_parameter("If-None-Match", 'Versions that the caller has: `"3"`. Then 304 where it is one of them.')
        ],
        responses={
            "200": answer("The agent.", ref("Agent"), examples.agent(catalog), ETag="ETag"),
            "304": {"description": "It is as the caller has it."},
        },
        errors=("404",),
    )


def _patch(catalog: Catalog) -> Document:
    return guarded(
        Action.UPDATE,
        "updateAgent",
        "Change an agent",
        "Secrets that are left out stay. A new `auth_type` comes with its whole `auth_config`. Where the origin of "
        "`webhook_url` or `token_url` changes, the auth secrets must come again. After a new `signing_secret`, "
        "requests carry the old one's signature too, for 24 h; null drops both at once.",
        parameters=[if_match()],
        requestBody=body("AgentPatch", examples.PATCHES, "application/merge-patch+json", JSON),
        responses={"200": answer("The agent.", ref("Agent"), examples.agent(catalog), ETag="ETag")},
        errors=("400", "404", "408", "412", "413", "415"),
    )


def _delete() -> Document:
    return guarded(
        Action.DELETE,
        "deleteAgent",
        "Delete an agent",
        "Its record and its invocations stay, its secrets go.",
        parameters=[if_match()],
        responses={"204": {"description": "It is deleted."}},
        errors=("404", "412"),
    )


def _invoke() -> Document:
    return guarded(
        Action.INVOKE,
        "invokeAgent",
        "Invoke an agent",
        "The body is forwarded byte for byte to the agent's `webhook_url`, with its credentials, tried up to "
        "`max_attempts` times. A caller who goes away changes nothing: the invocation runs to its end and is recorded.",
        parameters=[
            header_parameter(
                "X-Lineage-Hop-Id", "Stored with the invocation.", minLength=1, maxLength=LINEAGE_HOP_ID_MAX
            ),
            header_parameter(
                "Idempotency-Key",
                "For 24 h, an invocation of this agent with this key and equal JSON is not made again: the first one's "
                "answer comes again, success or failure, with `Idempotent-Replayed: true`. With another payload: 422. "
                "While the first still runs: 409. A refusal before admission keeps no key.",
                minLength=1,
                maxLength=KEY_LENGTH_MAX,
            ),
            header_parameter(
                "traceparent", "W3C Trace Context: the trace that this belongs to. An invalid one is ignored."
            ),
        ],
        requestBody={
            "required": True,
            "description": "Any JSON.",
            "content": {JSON: {"schema": {}, "examples": {"a question": {"value": {"input": "hello"}}}}},
        },
        responses={
            "200": {
                **answer("The invocation.", ref("Invocation"), examples.INVOCATION, **OF_INVOKED),
                "links": links(
                    "getInvocation",
                    agent_id="$response.body#/external_agent_id",
                    invocation_id="$response.body#/id",
                ),
            },
        },
        errors=("400", "402", "404", "408", "409", "413", "415", "422", "429", "502", "504"),
    )


def _usage() -> Document:
    return guarded(
        Action.READ,
        "getUsage",
        "Show how an agent's limits stand",
        "It takes no place and reserves nothing. A place comes free at most 2 % of its window late.",
        responses={"200": answer("The usage.", ref("Usage"), examples.USAGE)},
        errors=("404",),
    )


def _list_invocations(operation_id: str, whose: str, errors: Iterable[str]) -> Document:
    return guarded(
        Action.READ,
        operation_id,
        f"List the invocations of {whose}",
        "Newest first.",
        parameters=query_parameters(INVOCATION_FILTERS),
        responses={
            "200": answer(
                "A page.",
                ref("InvocationPage"),
                {"items": [examples.INVOCATION], "next_cursor": "AZqwxgHUeyCPalw-nXobQg"},
            )
        },
        errors=("400", *errors),
    )


def _get_invocation() -> Document:
    return guarded(
        Action.READ,
        "getInvocation",
        "Show an invocation",
        "Of a deleted agent too.",
        responses={"200": answer("The invocation.", ref("Invocation"), examples.INVOCATION)},
        errors=("404",),
    )


def _asset() -> Document:
    operation = page("docsAsset", "The files of /docs", "text/javascript", "text/css")
    operation["responses"]["304"] = {"description": "It is as the caller has it."}
    operation["responses"]["404"] = {"$ref": "#/components/responses/404"}
    return operation


def _ready() -> Document:
    schema = object_of(status={"const": "ready"}, checks={"type": "object", "additionalProperties": {"const": "ok"}})
    operation = open_to_all("readiness", "Whether the service can serve", schema)
    operation["responses"]["503"] = {"$ref": "#/components/responses/NotReady"}
    return operation
