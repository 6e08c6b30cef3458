"""Agents in PostgreSQL."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias
from uuid import UUID

import attrs
from sqlalchemy import ARRAY, ColumnElement, Select, Uuid, any_, delete, func, insert, literal, select, true, update
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from external_agents.adapters.postgres.engine import ANSWER_S, reading, reading_of, transaction
from external_agents.adapters.postgres.rows import agent_of, agent_values, folded, windows_values
from external_agents.adapters.postgres.tables import agents, rate_windows, secrets
from external_agents.domain.agent import AgentStatus, ExternalAgent
from external_agents.domain.errors import AgentNotFound, StaleVersion
from external_agents.domain.rate_limit import RateWindows
from external_agents.ports.repositories import AgentQuery, AgentReader, AgentWriter

_Condition: TypeAlias = ColumnElement[bool]

_sealed = (
    select(
        func.array_agg(secrets.c.field).label("sealed_fields"),
        func.array_agg(secrets.c.envelope).label("sealed_envelopes"),
    )
    .where(secrets.c.org_id == agents.c.org_id, secrets.c.agent_id == agents.c.id)
    .lateral("sealed")
)
# One statement, so that an agent is never seen with the secrets of another version.
_WHOLE_AGENTS = select(agents, _sealed).join(_sealed, true())


class PostgresAgents(AgentReader, AgentWriter):
    """
    Agents, each with its sealed secrets.

    Args:
        key_id_of: Which key an envelope was sealed with, for the column that key rotation goes by.
    """

    def __init__(self, engine: AsyncEngine, *, key_id_of: Callable[[bytes], str]) -> None:
        self._engine = engine
        self._reading = reading(engine)
        self._key_id_of = key_id_of

    async def read(self, org_id: str, agent_id: UUID) -> ExternalAgent:
        found = await self._select(org_id, _WHOLE_AGENTS.where(*_is(org_id, agent_id)))
        if not found:
            raise AgentNotFound
        return found[0]

    async def list(self, query: AgentQuery, *, offset: int, limit: int) -> Sequence[ExternalAgent]:
        return await self._page(query.org_id, _conditions(query), offset, limit)

    async def count(self, query: AgentQuery, *, text: str | None = None) -> int:
        statement = select(func.count()).select_from(agents).where(*_conditions(query, text))
        async with reading_of(self._reading, query.org_id) as connection:
            return await connection.scalar(statement) or 0

    async def exists(self, org_id: str, agent_id: UUID) -> bool:
        async with reading_of(self._reading, org_id) as connection:
            return await _exists(connection, org_id, agent_id)

    async def search(self, query: AgentQuery, text: str, *, offset: int, limit: int) -> Sequence[ExternalAgent]:
        return await self._page(query.org_id, _conditions(query, text), offset, limit)

    async def create(self, agent: ExternalAgent) -> None:
        await self.bulk([agent])

    async def update(self, agent: ExternalAgent) -> None:
        await self._store_next(agent)

    async def delete(self, agent: ExternalAgent) -> None:
        await self._store_next(attrs.evolve(agent, sealed={}))

    async def bulk(self, agents_: Sequence[ExternalAgent]) -> None:
        if not agents_:
            return
        untouched = windows_values(RateWindows())
        windows = [{"org_id": agent.org_id, "agent_id": agent.id, **untouched} for agent in agents_]
        org_ids = {agent.org_id for agent in agents_}
        within_s = ANSWER_S if len(agents_) == 1 else None
        async with transaction(self._engine, *org_ids, within_s=within_s) as connection:
            await connection.execute(insert(agents), [agent_values(agent) for agent in agents_])
            await connection.execute(insert(rate_windows), windows)
            for agent in agents_:
                await self._seal(connection, agent)

    async def _store_next(self, agent: ExternalAgent) -> None:
        gate = select(rate_windows.c.agent_id).where(
            rate_windows.c.org_id == agent.org_id, rate_windows.c.agent_id == agent.id
        )
        change = update(agents).where(*_is(agent.org_id, agent.id), agents.c.version == agent.version - 1)
        of_agent = (secrets.c.org_id == agent.org_id, secrets.c.agent_id == agent.id)
        async with transaction(self._engine, agent.org_id, within_s=ANSWER_S) as connection:
            # Admissions go through the same lock, one by one and first come, first served: what they read of the
            # agent holds until they commit, and a busy agent cannot keep its owner from changing it.
            await connection.execute(gate.with_for_update())
            if (await connection.execute(change.values(agent_values(agent)))).rowcount == 0:
                raise StaleVersion if await _exists(connection, agent.org_id, agent.id) else AgentNotFound
            await connection.execute(delete(secrets).where(*of_agent))
            await self._seal(connection, agent)

    async def _seal(self, connection: AsyncConnection, agent: ExternalAgent) -> None:
        rows = [
            {
                "org_id": agent.org_id,
                "agent_id": agent.id,
                "field": field,
                "key_id": self._key_id_of(envelope),
                "envelope": envelope,
            }
            for field, envelope in agent.sealed.items()
        ]
        if rows:
            await connection.execute(insert(secrets), rows)

    async def _page(
        self, org_id: str, conditions: Iterator[_Condition], offset: int, limit: int
    ) -> Sequence[ExternalAgent]:
        newest_first = _WHOLE_AGENTS.where(*conditions).order_by(agents.c.id.desc())
        return await self._select(org_id, newest_first.offset(offset).limit(limit))

    async def _select(self, org_id: str, statement: Select[tuple[object, ...]]) -> Sequence[ExternalAgent]:
        async with reading_of(self._reading, org_id) as connection:
            return [agent_of(row) for row in (await connection.execute(statement)).mappings()]


async def agents_with_ids(
    connection: AsyncConnection, org_id: str, agent_ids: Sequence[UUID]
) -> Sequence[ExternalAgent]:
    """Those of these agents that there are, in any order, within the transaction of the connection."""
    wanted = agents.c.id == any_(literal(list(agent_ids), ARRAY(Uuid)))
    rows = await connection.execute(_WHOLE_AGENTS.where(agents.c.org_id == org_id, wanted))
    return [agent_of(row) for row in rows.mappings()]


def _is(org_id: str, agent_id: UUID) -> tuple[_Condition, _Condition]:
    return agents.c.org_id == org_id, agents.c.id == agent_id


def _conditions(query: AgentQuery, text: str | None = None) -> Iterator[_Condition]:
    yield agents.c.org_id == query.org_id
    if query.status is None:
        yield agents.c.status != AgentStatus.DELETED.value
    else:
        yield agents.c.status == query.status.value
    if query.provider is not None:
        yield agents.c.provider == query.provider
    if query.tag is not None:
        yield agents.c.tags.contains([query.tag])
    if text:
        # strpos and not LIKE: nothing in the text has a meaning.
        needle = folded(text)
        yield (func.strpos(agents.c.name_folded, needle) > 0) | (func.strpos(agents.c.description_folded, needle) > 0)


async def _exists(connection: AsyncConnection, org_id: str, agent_id: UUID) -> bool:
    found = await connection.scalar(select(agents.c.id).where(*_is(org_id, agent_id)))
    return found is not None
