"""The record of invocations in PostgreSQL, for reading."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from uuid import UUID

from sqlalchemy import ColumnElement, Select, and_, bindparam, func, or_, select
from sqlalchemy.ext.asyncio import AsyncEngine

from external_agents.adapters.postgres.engine import reading, reading_of
from external_agents.adapters.postgres.rows import invocation_of
from external_agents.adapters.postgres.tables import invocations
from external_agents.domain.errors import InvocationNotFound
from external_agents.domain.ids import first_id_at
from external_agents.domain.invocation import ENDED, ExternalAgentInvocation
from external_agents.ports.repositories import InvocationQuery, InvocationReader


class PostgresInvocations(InvocationReader):
    """created_at is the id's own millisecond, so times are bounds of ids, and partitions are pruned by them."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._reading = reading(engine)

    async def read(self, org_id: str, agent_id: UUID, invocation_id: UUID) -> ExternalAgentInvocation:
        statement = select(invocations).where(*_is(org_id, invocation_id), invocations.c.external_agent_id == agent_id)
        found = await self._select(org_id, statement)
        if not found:
            raise InvocationNotFound
        return found[0]

    async def list(self, query: InvocationQuery, *, limit: int) -> Sequence[ExternalAgentInvocation]:
        return await self._newest(query.org_id, limit, *_conditions(query))

    async def count(self, query: InvocationQuery) -> int:
        statement = select(func.count()).select_from(invocations).where(*_conditions(query))
        async with reading_of(self._reading, query.org_id) as connection:
            return await connection.scalar(statement) or 0

    async def exists(self, org_id: str, invocation_id: UUID) -> bool:
        statement = select(invocations.c.id).where(*_is(org_id, invocation_id))
        async with reading_of(self._reading, org_id) as connection:
            return await connection.scalar(statement) is not None

    async def search(self, query: InvocationQuery, trace_id: str, *, limit: int) -> Sequence[ExternalAgentInvocation]:
        return await self._newest(query.org_id, limit, *_conditions(query), invocations.c.trace_id == trace_id)

    async def _newest(
        self, org_id: str, limit: int, *conditions: ColumnElement[bool]
    ) -> Sequence[ExternalAgentInvocation]:
        newest_first = select(invocations).where(*conditions).order_by(invocations.c.id.desc())
        return await self._select(org_id, newest_first.limit(limit))

    async def _select(self, org_id: str, statement: Select[tuple[object, ...]]) -> Sequence[ExternalAgentInvocation]:
        async with reading_of(self._reading, org_id) as connection:
            return [invocation_of(row) for row in (await connection.execute(statement)).mappings()]


def _conditions(query: InvocationQuery) -> Iterator[ColumnElement[bool]]:
    yield invocations.c.org_id == query.org_id
    if query.agent_ids is not None:
        # One agent, the usual case, is read along its index in the order that is asked for.
        match list(query.agent_ids):
            case [agent_id]:
                yield invocations.c.external_agent_id == agent_id
            case agent_ids:
                yield invocations.c.external_agent_id == func.any(agent_ids)
    if query.status is not None:
        # Written out, so that the planner sees which statuses have an index of their own.
        yield invocations.c.status == bindparam("status", query.status.value, literal_execute=True)
        yield invocations.c.ended.is_(query.status in ENDED)
    bounds = list(_bounds(query))
    yield from bounds
    if bounds and query.status is None:
        yield _in_partitions(and_(*bounds))


def _bounds(query: InvocationQuery) -> Iterator[ColumnElement[bool]]:
    if query.since is not None:
        yield invocations.c.id >= first_id_at(query.since)
    if query.until is not None:
        yield invocations.c.id < first_id_at(query.until)
    if query.before_id is not None:
        yield invocations.c.id < query.before_id


def _is(org_id: str, invocation_id: UUID) -> Iterator[ColumnElement[bool]]:
    yield invocations.c.org_id == org_id
    yield invocations.c.id == invocation_id
    yield _in_partitions(invocations.c.id == invocation_id)


def _in_partitions(bounds: ColumnElement[bool]) -> ColumnElement[bool]:
    """Says nothing new but to the planner: among those that have ended, the ids tell the partitions."""
    return or_(invocations.c.ended.is_(False), and_(invocations.c.ended.is_(True), bounds))
