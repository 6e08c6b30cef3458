"""Whoever reads the whole database learns no secret."""

from __future__ import annotations

import secrets

import psycopg
from sqlalchemy.ext.asyncio import AsyncEngine

from external_agents.adapters.postgres.agents import PostgresAgents
from external_agents.adapters.secrets.aes_gcm import AesGcmSecretBox, envelope_key_id
from external_agents.adapters.secrets.key_ring import KeyRing
from external_agents.ports.secrets import SecretContext
from external_agents.testing.builders import make_agent, next_version
from postgres_server import dsn, psql_dump


async def test_a_dump_shows_no_secret(postgres_url: str, postgres_engine: AsyncEngine) -> None:
    box = AesGcmSecretBox(KeyRing({"blue": secrets.token_bytes(32)}))
    agents = PostgresAgents(postgres_engine, key_id_of=envelope_key_id)
    first, second = "plain-token-1", "plain-token-2"

    def sealed(agent_id: object, secret: str) -> dict[str, bytes]:
        context = SecretContext(org_id="acme", agent_id=str(agent_id), field="auth_config.token", destination="")
        return {"auth_config.token": box.seal(secret.encode(), context)}

    agent = make_agent(org_id="acme", name="visible name")
    agent = next_version(agent, sealed=sealed(agent.id, first))
    await agents.create(agent)
    await agents.update(next_version(agent, sealed=sealed(agent.id, second)))
    dump = psql_dump(postgres_url)
    assert b"visible name" in dump
    for secret in (first, second):
        assert secret.encode() not in dump
        assert secret.encode().hex().encode() not in dump
    with psycopg.connect(dsn(postgres_url)) as connection:
        rows = connection.execute("SELECT org_id, agent_id, field, key_id FROM external_agent_secrets").fetchall()
    assert rows == [("acme", agent.id, "auth_config.token", "blue")]
