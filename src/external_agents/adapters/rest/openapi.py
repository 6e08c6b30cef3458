"""The OpenAPI document (3.1), made once from the domain's schemas and the table of errors."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import falcon

from external_agents.adapters.rest import openapi_examples as examples
from external_agents.adapters.rest.errors import KINDS, PROBLEM_MEDIA_TYPE, Kind, NotReady
from external_agents.adapters.rest.openapi_paths import OF_INVOKED, paths
from external_agents.adapters.rest.openapi_schemas import ref, schemas
from external_agents.domain.access import PERMISSIONS
from external_agents.domain.catalog import Catalog

Document = dict[str, Any]

_DESCRIPTION = """\
Agents that live elsewhere, invoked under control: who may, how often, at what cost, with a durable record of every
call.

Every call but those of *service* carries `Authorization: Bearer <API key or JWT>`, which says which organisation it
acts for; another organisation's agents do not exist for it. Checks come in this order: 401; 413, 415 and malformed JSON
(400); 404; 403; 412; validation (400); 409; the idempotency key (422, 409); 429; 402.

Every error is a problem (RFC 9457, `application/problem+json`); an invalid request is told all its faults at once, in
`errors`. Times are RFC 3339 in UTC. Numbers keep their digits: read them with a decimal type where that matters.
Every answer carries `X-Request-Id`: the caller's own where it sent one (up to 128 visible ASCII characters).
"""


def openapi_document(catalog: Catalog, *, has_metrics: bool = True) -> Document:
    """`has_metrics`: whether the service that it describes shows them."""
    described = paths(catalog)
    if not has_metrics:
        del described["/metrics"]
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "external-agents",
            "version": version("external-agents"),
            "description": _DESCRIPTION,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "./", "description": "Where this document is."}],
        "tags": [
            {"name": "agents", "description": "Registering agents."},
            {"name": "invocations", "description": "Calling agents, and the record of it."},
            {"name": "service", "description": "Open to anybody."},
        ],
        "paths": described,
        "components": {
            "securitySchemes": {
                "bearer": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "An API key, or a JSON Web Token of the operator's issuer, where there is one. "
                    "It holds some of the permissions "
                    + ", ".join(f"`{permission}`" for permission in PERMISSIONS)
                    + ".",
                }
            },
            "schemas": schemas(catalog),
            "headers": _HEADERS,
            "responses": {**_error_responses(), "NotReady": _response([KINDS[NotReady]])},
        },
    }


def _header(description: str, example: str | int) -> Document:
    return {
        "description": description,
        "schema": {"type": "integer" if isinstance(example, int) else "string"},
        "example": example,
    }


_HEADERS = {
    "Allow": _header("The methods that there are.", "GET, HEAD, POST"),
    "ETag": _header("The agent's version.", '"1"'),
    "IdempotentReplayed": _header("The answer is an earlier invocation's, which came with the same key.", "true"),
    "Location": _header("Where the agent is.", "/api/external-agents/019ab0c5-7a52-7f3e-9c1d-2b8f4a6e0d13"),
    "RateLimit": _header(
        "What is left of each limit that is set (`r`), and in how many seconds more comes free (`t`).",
        '"minute";r=9;t=60, "day";r=4999;t=86400',
    ),
    "RateLimitPolicy": _header(
        "The limits that are set (`q`) and their windows in seconds (`w`); draft-ietf-httpapi-ratelimit-headers.",
        '"minute";q=10;w=60, "day";q=5000;w=86400',
    ),
    "RetryAfter": _header("Seconds.", 5),
    "WWWAuthenticate": _header("RFC 6750.", 'Bearer realm="external-agents", error="invalid_token"'),
}

_HEADERS_OF = {
    401: {"WWW-Authenticate": "WWWAuthenticate"},
    402: {"RateLimit": "RateLimit", "RateLimit-Policy": "RateLimitPolicy"},
    405: {"Allow": "Allow"},
    409: {"Retry-After": "RetryAfter"},
    429: {"Retry-After": "RetryAfter", "RateLimit": "RateLimit", "RateLimit-Policy": "RateLimitPolicy"},
    502: OF_INVOKED,
    503: {"Retry-After": "RetryAfter"},
    504: OF_INVOKED,
}


def _error_responses() -> Document:
    """One for each status, with the kinds of problem that it may be."""
    by_status: dict[int, list[Kind]] = {}
    for error, kind in KINDS.items():
        if error not in {NotReady, falcon.HTTPRouteNotFound} and kind not in by_status.setdefault(kind.status, []):
            by_status[kind.status].append(kind)
    return {str(status): _response(kinds) for status, kinds in sorted(by_status.items()) if kinds}


def _response(kinds: list[Kind]) -> Document:
    status = kinds[0].status
    return {
        "description": "; or: ".join(dict.fromkeys(kind.title for kind in kinds)) + ".",
        "headers": {
            name: {"$ref": f"#/components/headers/{header}"} for name, header in _HEADERS_OF.get(status, {}).items()
        },
        "content": {
            PROBLEM_MEDIA_TYPE: {
                "schema": ref("Problem"),
                "examples": {kind.name: {"value": examples.problem(kind)} for kind in kinds},
            }
        },
    }
