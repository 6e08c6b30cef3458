"""API keys in PostgreSQL."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import ARRAY, RowMapping, Uuid, bindparam, column, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncEngine

from external_agents.adapters.postgres.columns import config_of, config_text
from external_agents.adapters.postgres.engine import reading, transaction
from external_agents.adapters.postgres.errors import translate_errors
from external_agents.adapters.postgres.row_security import reading_of
from external_agents.adapters.postgres.tables import api_keys
from external_agents.domain.access import Principal
from external_agents.ports.identity import ApiKey, ApiKeyStore

# The organisation is known when its key is found, not before.
_found = func.external_agents_api_keys(bindparam("ids", type_=ARRAY(Uuid))).table_valued(
    *(column(known.name, known.type) for known in api_keys.c), name="found"
)
_FIND = select(_found)


class PostgresApiKeys(ApiKeyStore):
    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._reading = reading(engine)

    async def add(self, key: ApiKey) -> None:
        async with transaction(self._engine, key.principal.org_id) as connection:
            await connection.execute(insert(api_keys).values(_values(key)))

    async def find(self, *key_ids: UUID) -> Sequence[ApiKey]:
        with translate_errors():
            async with self._reading.connect() as connection:
                return [_key_of(row) for row in (await connection.execute(_FIND, {"ids": list(key_ids)})).mappings()]

    async def list(self, org_id: str) -> Sequence[ApiKey]:
        newest_first = (api_keys.c.created_at.desc(), api_keys.c.id.desc())
        statement = select(api_keys).where(api_keys.c.org_id == org_id).order_by(*newest_first)
        async with reading_of(self._reading, org_id) as connection:
            return [_key_of(row) for row in (await connection.execute(statement)).mappings()]

    async def revoke(self, key_id: UUID, at: datetime) -> bool:
        found = await self.find(key_id)
        if not found:
            return False
        org_id = found[0].principal.org_id
        statement = (
            update(api_keys)
            .where(api_keys.c.org_id == org_id, api_keys.c.id == key_id)
            .values(revoked_at=func.coalesce(api_keys.c.revoked_at, at))
            .returning(api_keys.c.id)
        )
        async with transaction(self._engine, org_id) as connection:
            return await connection.scalar(statement) is not None


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
