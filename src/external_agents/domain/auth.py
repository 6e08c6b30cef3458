"""
How an agent is authenticated to: the auth types, the schema of each auth_config, which of its fields are secret.

A new auth type is an `AuthScheme` given to the catalog: a schema, the secret fields, and a handler that turns an opened
auth_config into `Credentials`. The handler is pure; whoever sends the request acts on what it returns.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from typing import TypeAlias

import attrs

from external_agents.domain.http_fields import is_field_value, tenant_may_set
from external_agents.domain.json_values import JsonValue
from external_agents.domain.schema import JsonSchema, register_format

EVERYTHING = frozenset({"*"})
"""As `secret_fields`: the whole config is one secret."""


@attrs.frozen
class FixedHeaders:
    """Header fields that go with every request."""

    headers: Mapping[str, str] = attrs.field(repr=lambda headers: f"<{len(headers)} headers>")


@attrs.frozen(kw_only=True)
class ClientCredentials:
    """An OAuth 2.0 client credentials grant (RFC 6749, section 4.4), whose token goes with every request."""

    token_url: str
    client_id: str
    client_secret: str = attrs.field(repr=False)
    scope: str | None = None
    audience: str | None = None


Credentials: TypeAlias = FixedHeaders | ClientCredentials


@attrs.frozen(kw_only=True)
class AuthScheme:
    """
    One auth type.

    Attributes:
        auth_type: Its name in the API.
        schema: JSON Schema (draft-07) of auth_config, secret fields included.
        secret_fields: Sealed at rest and never shown; `EVERYTHING` for the whole config.
        url_fields: Fields that hold a URL to which the secrets are sent: checked like webhook_url, and bound like it.
        credentials: The handler: from a validated, opened auth_config to what the agent receives.
    """

    auth_type: str
    schema: JsonSchema
    secret_fields: frozenset[str] = frozenset()
    url_fields: tuple[str, ...] = ()
    credentials: Callable[[Mapping[str, JsonValue]], Credentials]


register_format("header-name", tenant_may_set, "must be a header name (RFC 9110) that is not reserved")
register_format("header-value", is_field_value, "must be visible ASCII, without spaces at its ends")
register_format("user-id", lambda text: ":" not in text and text.isprintable(), "must be printable, without a colon")
register_format("printable", str.isprintable, "must not contain control characters")

_SECRET_TEXT = {"type": "string", "minLength": 1, "maxLength": 8192, "writeOnly": True}
_HEADER_SECRET = {**_SECRET_TEXT, "format": "header-value"}
_TEXT = {"type": "string", "minLength": 1, "maxLength": 2000}


def _object(properties: Mapping[str, JsonValue], *, optional: tuple[str, ...] = (), example: JsonValue) -> JsonSchema:
    return {
        "type": "object",
        "properties": properties,
        "required": [name for name in properties if name not in optional],
        "additionalProperties": False,
        "examples": [example],
    }


def _client_credentials(config: Mapping[str, JsonValue]) -> Credentials:
    return ClientCredentials(**config)


def _api_key(config: Mapping[str, JsonValue]) -> Credentials:
    return FixedHeaders({config["header_name"]: config["key"]})


def _bearer(config: Mapping[str, JsonValue]) -> Credentials:
    return FixedHeaders({"Authorization": f"Bearer {config['token']}"})


def _basic(config: Mapping[str, JsonValue]) -> Credentials:
    """RFC 7617, with UTF-8."""
    pair = f"{config['username']}:{config['password']}".encode()
    return FixedHeaders({"Authorization": f"Basic {base64.b64encode(pair).decode('ascii')}"})


def _custom(config: Mapping[str, JsonValue]) -> Credentials:
    return FixedHeaders(config.get("headers", {}))


def _nothing(config: Mapping[str, JsonValue]) -> Credentials:
    return FixedHeaders({})


OAUTH2 = AuthScheme(
    auth_type="oauth2",
    schema=_object(
        {
            "client_id": _TEXT,
            "client_secret": _SECRET_TEXT,
            "token_url": {**_TEXT, "description": "Where the client credentials grant is asked for; https."},
            "scope": _TEXT,
            "audience": _TEXT,
        },
        optional=("scope", "audience"),
        example={
            "client_id": "acme",
            "client_secret": "example-secret",
            "token_url": "https://login.example.com/oauth2/token",
        },
    ),
    secret_fields=frozenset({"client_secret"}),
    url_fields=("token_url",),
    credentials=_client_credentials,
)

API_KEY = AuthScheme(
    auth_type="api_key",
    schema=_object(
        {"key": _HEADER_SECRET, "header_name": {"type": "string", "format": "header-name"}},
        example={"key": "example-key", "header_name": "X-API-Key"},
    ),
    secret_fields=frozenset({"key"}),
    credentials=_api_key,
)

BEARER = AuthScheme(
    auth_type="bearer",
    schema=_object({"token": _HEADER_SECRET}, example={"token": "example-token"}),
    secret_fields=frozenset({"token"}),
    credentials=_bearer,
)

BASIC = AuthScheme(
    auth_type="basic",
    schema=_object(
        {"username": {**_TEXT, "format": "user-id"}, "password": {**_SECRET_TEXT, "format": "printable"}},
        example={"username": "acme", "password": "example-password"},
    ),
    secret_fields=frozenset({"password"}),
    credentials=_basic,
)

CUSTOM = AuthScheme(
    auth_type="custom",
    schema={
        "type": "object",
        "description": "Any object; all of it is secret. `headers` in it are sent to the agent.",
        "properties": {
            "headers": {
                "type": "object",
                "propertyNames": {"format": "header-name"},
                "additionalProperties": {"type": "string", "format": "header-value"},
            }
        },
        "writeOnly": True,
        "examples": [{"headers": {"X-Tenant": "acme", "X-Token": "example-token"}}],
    },
    secret_fields=EVERYTHING,
    credentials=_custom,
)

NONE = AuthScheme(
    auth_type="none",
    schema={"type": "object", "properties": {}, "additionalProperties": False, "examples": [{}]},
    credentials=_nothing,
)

AUTH_SCHEMES = (OAUTH2, API_KEY, BEARER, BASIC, CUSTOM, NONE)
