"""API keys in PostgreSQL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import ARRAY, RowMapping, Select, Uuid, any_, func, insert, literal, select, text, update
from sqlalchemy.ext.asyncio import AsyncEngine

from external_agents.adapters.postgres.columns import config_of, config_text
from external_agents.adapters.postgres.engine import ANSWER_S, connected, reading, transaction
from external_agents.adapters.postgres.tables import api_key_hash_keys, api_keys
from external_agents.domain.access import Principal
from external_agents.ports.identity import ApiKey, ApiKeyStore

_WHOLE_KEYS = select(api_keys, api_key_hash_keys.c.envelope.label("sealed_hash_key")).outerjoin(
    api_key_hash_keys, api_keys.c.hash_key_id == api_key_hash_keys.c.hash_key_id
)

# Locked in the order of their ids: other processes note uses of the same keys. What has changed by then is judged anew.
_NOTE_USES = text(
    """
    UPDATE api_keys SET last_used_at = used.at
    FROM (
        SELECT key.id, use.at
        FROM unnest(CAST(:ids AS uuid[]), CAST(:moments AS timestamptz[])) AS use (id, at)
        JOIN api_keys AS key ON key.id = use.id
        WHERE key.last_used_at IS NULL OR key.last_used_at < date_trunc('hour', use.at, 'UTC')
        ORDER BY key.id FOR NO KEY UPDATE OF key
    ) AS used
    WHERE api_keys.id = used.id
    """
)


class PostgresApiKeys(ApiKeyStore):
    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._reading = reading(engine)

    async def add(self, key: ApiKey) -> None:
        async with transaction(self._engine, within_s=ANSWER_S) as connection:
            await connection.execute(insert(api_keys).values(_values(key)))

    async def find(self, *key_ids: UUID) -> Sequence[ApiKey]:
        return await self._select(_WHOLE_KEYS.where(api_keys.c.id == any_(literal(list(key_ids), ARRAY(Uuid)))))

    async def list(self, org_id: str) -> Sequence[ApiKey]:
        newest_first = (api_keys.c.created_at.desc(), api_keys.c.id.desc())
        return await self._select(_WHOLE_KEYS.where(api_keys.c.org_id == org_id).order_by(*newest_first))

    async def revoke(self, key_id: UUID, at: datetime) -> bool:
        statement = (
            update(api_keys)
            .where(api_keys.c.id == key_id)
            .values(revoked_at=func.coalesce(api_keys.c.revoked_at, at))
            .returning(api_keys.c.id)
        )
        async with transaction(self._engine, within_s=ANSWER_S) as connection:
            return await connection.scalar(statement) is not None

    async def note_uses(self, uses: Mapping[UUID, datetime]) -> None:
        async with connected(self._reading) as connection:
            await connection.execute(_NOTE_USES, {"ids": list(uses), "moments": list(uses.values())})

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
