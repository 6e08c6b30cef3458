"""API keys in PostgreSQL."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import ARRAY, RowMapping, Select, Uuid, any_, func, insert, literal, select, update
from sqlalchemy.ext.asyncio import AsyncEngine

from external_agents.adapters.postgres.columns import config_of, config_text
from external_agents.adapters.postgres.engine import ANSWER_S, connected, reading, transaction
from external_agents.adapters.postgres.tables import api_keys
from external_agents.domain.access import Principal
from external_agents.ports.identity import ApiKey, ApiKeyStore


class PostgresApiKeys(ApiKeyStore):
    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._reading = reading(engine)

    async def add(self, key: ApiKey) -> None:
        async with transaction(self._engine, within_s=ANSWER_S) as connection:
            await connection.execute(insert(api_keys).values(_values(key)))

    async def find(self, *key_ids: UUID) -> Sequence[ApiKey]:
        return await self._select(select(api_keys).where(api_keys.c.id == any_(literal(list(key_ids), ARRAY(Uuid)))))

    async def list(self, org_id: str) -> Sequence[ApiKey]:
        newest_first = (api_keys.c.created_at.desc(), api_keys.c.id.desc())
        return await self._select(select(api_keys).where(api_keys.c.org_id == org_id).order_by(*newest_first))

    async def revoke(self, key_id: UUID, at: datetime) -> bool:
        statement = (
            update(api_keys)
            .where(api_keys.c.id == key_id)
            .values(revoked_at=func.coalesce(api_keys.c.revoked_at, at))
            .returning(api_keys.c.id)
        )
        async with transaction(self._engine, within_s=ANSWER_S) as connection:
            return await connection.scalar(statement) is not None

    async def _select(self, statement: Select[Any]) -> Sequence[ApiKey]:
        async with connected(self._reading) as connection:
            return [_key_of(row) for row in (await connection.execute(statement)).mappings()]


def _values(key: ApiKey) -> dict[str, Any]:
    return {
        "id": key.id,
        "org_id": key.principal.org_id,
        "subject": key.principal.subject,
        "permissions": sorted(key.principal.permissions),
        "attributes": config_text(key.principal.attributes),
        "hash_key_id": key.hash_key_id,
        "secret_hash": key.secret_hash,
        "created_at": key.created_at,
        "expires_at": key.expires_at,
        "revoked_at": key.revoked_at,
    }


def _key_of(row: RowMapping) -> ApiKey:
    return ApiKey(
        id=row["id"],
        principal=Principal(row["org_id"], row["subject"], row["permissions"], config_of(row["attributes"])),
        hash_key_id=row["hash_key_id"],
        secret_hash=row["secret_hash"],
        created_at=row["created_at"],
        expires_at=row["expires_at"],
        revoked_at=row["revoked_at"],
    )
