"""API keys in PostgreSQL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    FromClause,
    RowMapping,
    Select,
    Uuid,
    bindparam,
    column,
    func,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.ext.asyncio import AsyncEngine

from external_agents.adapters.postgres.columns import config_of, config_text
from external_agents.adapters.postgres.engine import ANSWER_S, connected, reading, reading_of, transaction
from external_agents.adapters.postgres.tables import api_key_hash_keys, api_keys
from external_agents.domain.access import Principal
from external_agents.ports.identity import ApiKey, ApiKeyStore


def _whole(keys: FromClause) -> Select[Any]:
    sealed = api_key_hash_keys.c
    return select(*keys.c, sealed.envelope.label("sealed_hash_key")).select_from(
        keys.outerjoin(api_key_hash_keys, keys.c.hash_key_id == sealed.hash_key_id)
    )


# The organisation is known when its key is found, not before.
_FIND = _whole(
    func.external_agents_api_keys(bindparam("ids", type_=ARRAY(Uuid))).table_valued(
        *(column(known.name, known.type) for known in api_keys.c), name="found"
    )
)
_NOTE_USES = text("SELECT external_agents_note_uses(CAST(:ids AS uuid[]), CAST(:moments AS timestamptz[]))")


class PostgresApiKeys(ApiKeyStore):
    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._reading = reading(engine)

    async def add(self, key: ApiKey) -> None:
        async with transaction(self._engine, key.principal.org_id, within_s=ANSWER_S) as connection:
            await connection.execute(insert(api_keys).values(_values(key)))

    async def find(self, *key_ids: UUID) -> Sequence[ApiKey]:
        async with connected(self._reading) as connection:
            return [_key_of(row) for row in (await connection.execute(_FIND, {"ids": list(key_ids)})).mappings()]

    async def list(self, org_id: str) -> Sequence[ApiKey]:
        newest_first = (api_keys.c.created_at.desc(), api_keys.c.id.desc())
        statement = _whole(api_keys).where(api_keys.c.org_id == org_id).order_by(*newest_first)
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
        async with transaction(self._engine, org_id, within_s=ANSWER_S) as connection:
            return await connection.scalar(statement) is not None

    async def note_uses(self, uses: Mapping[UUID, datetime]) -> None:
        async with connected(self._reading) as connection:
            await connection.execute(_NOTE_USES, {"ids": list(uses), "moments": list(uses.values())})


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
        "last_used_at": key.last_used_at,
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
        sealed_hash_key=row["sealed_hash_key"],
        last_used_at=row["last_used_at"],
    )
