"""Secret keys k1, k2, …, and agents with a secret in every place that there is one."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from external_agents import Principal
from external_agents.bootstrap import Installation, open_installation
from external_agents.domain.access import PERMISSIONS
from external_agents.settings import Settings
from serve import rows

ALICE = Principal("acme", "alice", PERMISSIONS)

AUTH: Mapping[str, Mapping[str, Any]] = {
    "oauth2": {"client_id": "c", "client_secret": "oauth2-secret", "token_url": "https://issuer.example.com/token"},
    "api_key": {"key": "api-key-secret", "header_name": "X-Key"},
    "bearer": {"token": "bearer-secret"},
    "basic": {"username": "u", "password": "basic-secret"},
    "custom": {"headers": {"X-Secret": "custom-secret"}, "more": [1, {"deep": "secret"}]},
}
PLATFORMS: Mapping[str, Mapping[str, Any]] = {
    "teams": {"tenant_id": "t", "channel_id": "c", "webhook_url": "https://teams.example.com/secret"},
    "discord": {"webhook_url": "https://discord.example.com/secret", "username": "u"},
    "slack": {"webhook_url": "https://slack.example.com/secret", "channel": "c"},
    "telegram": {"bot_token": "12345:secret", "chat_id": "1"},
    "notion": {"token": "notion-secret", "database_id": "d"},
}
KINDS = len(AUTH) + len(PLATFORMS)


def secret_keys(*key_ids: str) -> str:
    """The setting; a key follows from its id."""
    return ",".join(f"{key_id}:{base64.b64encode(key_id.encode().ljust(32)).decode()}" for key_id in key_ids)


@asynccontextmanager
async def installation_with(url: str, *key_ids: str) -> AsyncIterator[Installation]:
    environment = {"SECRET_KEYS": secret_keys(*key_ids), "DATABASE_URL": url, "EGRESS_ALLOW": "loopback"}
    settings = Settings.from_env({f"EXTERNAL_AGENTS_{name}": text for name, text in environment.items()})
    async with open_installation(settings, url) as installation:
        yield installation


def documents(webhook_url: str = "https://agent.example.com/hook") -> list[dict[str, Any]]:
    """One for each place of a secret."""
    plain = {"name": "Echo", "provider": "custom", "webhook_url": webhook_url, "auth_type": "none"}
    return [
        *({**plain, "auth_type": name, "auth_config": dict(config)} for name, config in AUTH.items()),
        *({**plain, "provider": name, "platform_config": dict(config)} for name, config in PLATFORMS.items()),
    ]


async def make_one_of_each(installation: Installation, *, orgs: tuple[str, ...] = ("acme",)) -> None:
    for org_id in orgs:
        for document in documents():
            await installation.service.create_agent(Principal(org_id, "alice", PERMISSIONS), document)


def sealed_with(url: str) -> dict[str, int]:
    """How many secrets by the ids of their keys, as the envelopes themselves have them."""
    found: dict[str, int] = {}
    for row in rows(url, "SELECT key_id, envelope FROM external_agent_secrets"):
        key_id = row["envelope"][2 : 2 + row["envelope"][1]].decode()
        assert key_id == row["key_id"], "the column says what the envelope says"
        found[key_id] = found.get(key_id, 0) + 1
    return found
