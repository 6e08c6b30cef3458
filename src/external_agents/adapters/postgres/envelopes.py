"""
Envelopes in PostgreSQL, over all organisations.

Which keys are needed, whoever serves may ask. For all else row security must not hide any organisation.

Nothing here waits for a row that somebody else has locked, so nothing here takes part in a deadlock. Statements over
several organisations lock nothing, and those that lock are of one organisation, as distributed tables want it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from itertools import groupby
from uuid import UUID

from sqlalchemy import TextClause, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from external_agents.adapters.postgres.agents import agents_with_ids
from external_agents.adapters.postgres.engine import connected, reading, transaction
from external_agents.adapters.postgres.errors import translate_errors
from external_agents.adapters.postgres.row_security import is_on
from external_agents.domain.errors import ConfigurationError, SecretUnreadable
from external_agents.ports.secrets import EnvelopeStore, HashKey, KeyUse, Reseal, Resealed, SecretPlace

BATCH_MAX = 50
"""Secrets at once. One may be as large as a request's body."""

# An API key that is revoked or has expired needs no key any more.
_IN_FORCE = "api.revoked_at IS NULL AND (api.expires_at IS NULL OR api.expires_at > clock_timestamp())"

_SECRETS_BY_KEY = text("SELECT key_id, count(*) FROM external_agent_secrets GROUP BY key_id")
_API_KEYS_BY_KEY = text(
    f"""
    SELECT coalesce(sealed.key_id, api.hash_key_id), count(*)
    FROM api_keys AS api LEFT JOIN api_key_hash_keys AS sealed ON sealed.hash_key_id = api.hash_key_id
    WHERE {_IN_FORCE} GROUP BY 1
    """  # noqa: S608
)

_NEEDED_KEYS = text("SELECT external_agents_needed_keys()")

_NEXT_PLACES = text(
    """
    SELECT org_id, agent_id, field FROM external_agent_secrets
    WHERE key_id = :key_id AND (org_id, agent_id, field) > (:org_id, CAST(:agent_id AS uuid), :field)
    ORDER BY org_id, agent_id, field LIMIT :limit
    """
)
_LOCK = text(
    """
    SELECT secret.agent_id, secret.field
    FROM unnest(CAST(:agent_ids AS uuid[]), CAST(:fields AS text[])) AS place (agent_id, field)
    JOIN external_agent_secrets AS secret
        ON secret.org_id = :org_id AND secret.agent_id = place.agent_id AND secret.field = place.field
    WHERE secret.key_id = :key_id
    ORDER BY secret.agent_id, secret.field FOR UPDATE OF secret SKIP LOCKED
    """
)
_REPLACE = text(
    """
    UPDATE external_agent_secrets AS secret SET key_id = place.key_id, envelope = place.envelope
    FROM unnest(CAST(:agent_ids AS uuid[]), CAST(:fields AS text[]), CAST(:key_ids AS text[]),
        CAST(:envelopes AS bytea[])) AS place (agent_id, field, key_id, envelope)
    WHERE secret.org_id = :org_id AND secret.agent_id = place.agent_id AND secret.field = place.field
    """
)

_HASH_KEYS = text(
    f"""
    SELECT used.hash_key_id, sealed.key_id, sealed.envelope
    FROM (SELECT DISTINCT hash_key_id FROM api_keys AS api WHERE {_IN_FORCE}) AS used
    LEFT JOIN api_key_hash_keys AS sealed ON sealed.hash_key_id = used.hash_key_id
    ORDER BY used.hash_key_id
    """  # noqa: S608
)
_PUT_HASH_KEY = text(
    """
    INSERT INTO api_key_hash_keys (hash_key_id, key_id, envelope) VALUES (:hash_key_id, :key_id, :envelope)
    ON CONFLICT (hash_key_id) DO UPDATE SET key_id = excluded.key_id, envelope = excluded.envelope
    """
)

_BEFORE_ALL = SecretPlace(org_id="", agent_id=UUID(int=0), field="")


class PostgresEnvelopes(EnvelopeStore):
    """
    Args:
        key_id_of: Which key an envelope was sealed with.
    """

    def __init__(self, engine: AsyncEngine, *, key_id_of: Callable[[bytes], str]) -> None:
        self._engine = engine
        self._reading = reading(engine)
        self._key_id_of = key_id_of

    async def uses(self) -> Mapping[str, KeyUse]:
        async with self._over_all() as connection:
            secrets = await _numbers(connection, _SECRETS_BY_KEY)
            api_keys = await _numbers(connection, _API_KEYS_BY_KEY)
        return {
            key_id: KeyUse(secrets=secrets.get(key_id, 0), api_keys=api_keys.get(key_id, 0))
            for key_id in {**secrets, **api_keys}
        }

    async def key_ids(self) -> Collection[frozenset[str]]:
        async with connected(self._reading) as connection:
            return {frozenset(key_ids) for key_ids in await connection.scalars(_NEEDED_KEYS)}

    async def reseal(self, key_id: str, reseal: Reseal, *, after: SecretPlace | None) -> Resealed:
        behind = after or _BEFORE_ALL
        place = {"org_id": behind.org_id, "agent_id": behind.agent_id, "field": behind.field}
        async with self._over_all() as connection:
            rows = await connection.execute(_NEXT_PLACES, {"key_id": key_id, "limit": BATCH_MAX, **place})
            places = [SecretPlace(org_id=row[0], agent_id=row[1], field=row[2]) for row in rows]
        resealed = 0
        unreadable: dict[SecretPlace, str] = {}
        for org_id, of_org in groupby(places, lambda place: place.org_id):
            async with transaction(self._engine, org_id) as connection:
                resealed += await self._reseal_of(connection, org_id, list(of_org), key_id, reseal, unreadable)
        return Resealed(resealed=resealed, unreadable=unreadable, last=places[-1] if places else None)

    async def hash_keys(self) -> Sequence[HashKey]:
        async with self._over_all() as connection:
            rows = await connection.execute(_HASH_KEYS)
            return [HashKey(hash_key_id=row[0], sealed_with=row[1], envelope=row[2]) for row in rows]

    async def put_hash_key(self, key: HashKey) -> None:
        values = {"hash_key_id": key.hash_key_id, "key_id": key.sealed_with, "envelope": key.envelope}
        async with transaction(self._engine) as connection:
            await connection.execute(_PUT_HASH_KEY, values)

    @asynccontextmanager
    async def _over_all(self) -> AsyncIterator[AsyncConnection]:
        """For as long as it takes: nobody waits for it but the operator."""
        if is_on(self._engine):
            # Else it would find nothing, as if no key were used any more.
            raise ConfigurationError("Row security hides what the secret keys have sealed: only the owner sees it.")
        with translate_errors():
            async with self._reading.connect() as connection:
                yield connection

    async def _reseal_of(
        self,
        connection: AsyncConnection,
        org_id: str,
        places: list[SecretPlace],
        key_id: str,
        reseal: Reseal,
        unreadable: dict[SecretPlace, str],
    ) -> int:
        """Returns how many."""
        agent_ids, fields = [place.agent_id for place in places], [place.field for place in places]
        wanted = {"org_id": org_id, "key_id": key_id, "agent_ids": agent_ids, "fields": fields}
        rows = await connection.execute(_LOCK, wanted)
        held = [SecretPlace(org_id=org_id, agent_id=row[0], field=row[1]) for row in rows]
        # Who changes an agent makes all of its secrets anew, in one transaction, for which it needs the rows that are
        # held here. So what is read now, in a statement of its own, belongs to them.
        agents = {agent.id: agent for agent in await agents_with_ids(connection, org_id, agent_ids)}
        made: dict[SecretPlace, bytes] = {}
        for place in held:
            try:
                made[place] = reseal(agents[place.agent_id], place.field)
            except SecretUnreadable as error:
                unreadable[place] = str(error)
        if made:
            values = {
                "agent_ids": [place.agent_id for place in made],
                "fields": [place.field for place in made],
                "key_ids": [self._key_id_of(envelope) for envelope in made.values()],
                "envelopes": list(made.values()),
            }
            await connection.execute(_REPLACE, {"org_id": org_id, **values})
        return len(made)


async def _numbers(connection: AsyncConnection, statement: TextClause) -> dict[str, int]:
    return {row[0]: row[1] for row in await connection.execute(statement)}
