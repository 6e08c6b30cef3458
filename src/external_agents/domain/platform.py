"""
Where agents live: the platforms, the schema of each platform_config, which of its fields are secret.

A new platform is a `Platform` given to the catalog.
"""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from external_agents.domain.json_values import JsonValue
from external_agents.domain.schema import JsonSchema


@attrs.frozen(kw_only=True)
class Platform:
    """
    One platform.

    Attributes:
        provider: Its name in the API.
        schema: JSON Schema (draft-07) of platform_config, secret fields included.
        secret_fields: Sealed at rest and never shown.
        secret_destination: What the secrets are bound to; empty where the secret is itself the URL that it is sent to.
        url_fields: Fields that hold a URL of the tenant's, checked like webhook_url.
        config_required: Whether an agent of this platform must bring a platform_config.
    """

    provider: str
    schema: JsonSchema
    secret_fields: frozenset[str] = frozenset()
    secret_destination: str = ""
    url_fields: tuple[str, ...] = ()
    config_required: bool = True


_TEXT = {"type": "string", "minLength": 1, "maxLength": 2000}
_SECRET = {**_TEXT, "writeOnly": True}


def _platform(
    provider: str,
    properties: Mapping[str, JsonValue],
    *,
    secret: str,
    secret_destination: str = "",
    optional: tuple[str, ...] = (),
    url_fields: tuple[str, ...] = (),
    example: JsonValue,
) -> Platform:
    schema = {
        "type": "object",
        "properties": properties,
        "required": [name for name in properties if name not in optional],
        "additionalProperties": False,
        "examples": [example],
    }
    return Platform(
        provider=provider,
        schema=schema,
        secret_fields=frozenset({secret}),
        secret_destination=secret_destination,
        url_fields=url_fields,
    )


TEAMS = _platform(
    "teams",
    {"tenant_id": _TEXT, "channel_id": _TEXT, "webhook_url": _SECRET},
    secret="webhook_url",
    optional=("webhook_url",),
    url_fields=("webhook_url",),
    example={"tenant_id": "72f988bf-86f1-41af-91ab-2d7cd011db47", "channel_id": "19:4a95f7d8db4c@thread.tacv2"},
)

DISCORD = _platform(
    "discord",
    {"webhook_url": _SECRET, "username": _TEXT, "avatar_url": _TEXT},
    secret="webhook_url",
    optional=("avatar_url",),
    url_fields=("webhook_url", "avatar_url"),
    example={"webhook_url": "https://discord.com/api/webhooks/1/…", "username": "Research"},
)

SLACK = _platform(
    "slack",
    {"webhook_url": _SECRET, "channel": _TEXT},
    secret="webhook_url",
    url_fields=("webhook_url",),
    example={"webhook_url": "https://hooks.slack.com/services/T0/B0/…", "channel": "#research"},
)

TELEGRAM = _platform(
    "telegram",
    {
        "bot_token": _SECRET,
        "chat_id": {
            "anyOf": [
                {"type": "string", "minLength": 1, "maxLength": 2000, "description": "a string that is not empty"},
                {"type": "integer", "description": "an integer"},
            ]
        },
    },
    secret="bot_token",
    secret_destination="telegram",
    example={"bot_token": "123456:…", "chat_id": -1001234567890},
)

NOTION = _platform(
    "notion",
    {"token": _SECRET, "database_id": _TEXT},
    secret="token",
    secret_destination="notion",
    example={"token": "ntn_…", "database_id": "d9824bdc84454327be8b5b47500af6ce"},
)

CUSTOM = Platform(
    provider="custom",
    schema={"type": "object", "description": "Any object, shown as it is.", "examples": [{"team": "research"}]},
    config_required=False,
)

PLATFORMS = (TEAMS, DISCORD, SLACK, TELEGRAM, NOTION, CUSTOM)
