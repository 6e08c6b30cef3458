"""Ending invocations: by their outcome, or by recovery's verdict when their process is gone."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

import attrs
from sqlalchemy import ColumnElement, bindparam, delete, func, insert, select, true, update
from sqlalchemy.ext.asyncio import AsyncConnection

from external_agents.adapters.postgres.budgets import book, lock_accounts
from external_agents.adapters.postgres.columns import storable
from external_agents.adapters.postgres.instances import forget
from external_agents.adapters.postgres.row_security import confine_to_running
from external_agents.adapters.postgres.rows import (
    END_COLUMNS,
    attempts_text,
    end_values,
    invocation_of,
    invocation_values,
    money_of,
)
from external_agents.adapters.postgres.tables import agents, instances, invocations
from external_agents.domain.errors import AgentNotFound, InvocationNotFound
from external_agents.domain.ids import created_at_of
from external_agents.domain.invocation import ErrorCode, ExternalAgentInvocation, InvocationStatus

RECOVERED_AT_ONCE = 100

# What has ended is filed anew: see `tables`. Whoever removes the running row is the one who ends it.
_gone = (
    delete(invocations)
    .where(
        invocations.c.org_id == bindparam("ended_org_id"),
        invocations.c.id == bindparam("ended_id"),
        invocations.c.ended.is_(False),
        invocations.c.status == InvocationStatus.RUNNING.value,
    )
    .returning(invocations)
    .cte("gone")
)
_ends = {name: bindparam(f"ended_{name}", type_=invocations.c[name].type) for name in END_COLUMNS}
_END = (
    insert(invocations)
    .from_select(
        [column.name for column in invocations.c],
        select(*(_ends.get(column.name, true() if column.name == "ended" else column) for column in _gone.c)),
    )
    .returning(invocations.c.reservation_amount, invocations.c.reservation_currency)
)


async def settle(connection: AsyncConnection, finished: ExternalAgentInvocation) -> ExternalAgentInvocation:
    """Within a transaction; the invocation is locked first, then accounts."""
    reserved = (await connection.execute(_END, _end_parameters(finished))).one_or_none()
    if reserved is None:
        return await _add_evidence(connection, finished)
    reservation = money_of(*reserved)
    await book(connection, [(finished, reservation)])
    return attrs.evolve(finished, reservation=reservation, error_message=storable(finished.error_message))


async def record(connection: AsyncConnection, finished: ExternalAgentInvocation) -> None:
    """
    Within a transaction.

    Raises:
        AgentNotFound: There is no such agent.
    """
    agent = (agents.c.org_id == finished.org_id, agents.c.id == finished.external_agent_id)
    if await connection.scalar(select(agents.c.id).where(*agent)) is None:
        raise AgentNotFound
    created = attrs.evolve(finished, created_at=created_at_of(finished.id))
    await connection.execute(insert(invocations).values(invocation_values(created)))


async def _add_evidence(connection: AsyncConnection, finished: ExternalAgentInvocation) -> ExternalAgentInvocation:
    """What had ended stays as it is; but what recovery could not know of the attempts is worth keeping."""
    this = _is(finished.org_id, finished.id)
    row = (await connection.execute(select(invocations).where(*this).with_for_update())).mappings().one_or_none()
    if row is None:
        raise InvocationNotFound
    stored = invocation_of(row)
    if stored.error_code is not ErrorCode.INTERRUPTED or stored.attempts:
        return stored
    stored = attrs.evolve(stored, attempts=finished.attempts)
    await connection.execute(update(invocations).where(*this).values(attempts=attempts_text(stored.attempts)))
    return stored


async def recover_instance(connection: AsyncConnection, dead: UUID, now: datetime) -> int:
    """Within a transaction; call it until it ends fewer than RECOVERED_AT_ONCE. A heartbeat between saves the rest."""
    judged = select(instances.c.running_from).where(instances.c.id == dead, instances.c.lease_until < now)
    running_from = await connection.scalar(judged.with_for_update(skip_locked=True))
    if running_from is None:
        return 0
    await confine_to_running(connection, dead, RECOVERED_AT_ONCE)
    ended = await interrupt(connection, now, invocations.c.instance_id == dead, invocations.c.id >= running_from)
    await forget(connection, dead)
    return ended


async def interrupt(connection: AsyncConnection, now: datetime, *which: ColumnElement[bool]) -> int:
    """
    End running invocations as unknown, charged. Those that are being settled this very moment are left alone.

    Accounts are locked before invocations, as group commit does; a settlement that was there first has its way.
    """
    running = (*which, invocations.c.ended.is_(False), invocations.c.status == InvocationStatus.RUNNING.value)
    first = select(invocations).where(*running).order_by(invocations.c.id).limit(RECOVERED_AT_ONCE)
    left = [invocation_of(row) for row in (await connection.execute(first)).mappings()]
    await lock_accounts(connection, left)
    # Some may have been settled while their accounts were waited for.
    still = select(invocations).where(*running, invocations.c.id == func.any([invocation.id for invocation in left]))
    locked = await connection.execute(still.order_by(invocations.c.id).with_for_update(skip_locked=True))
    found = [invocation_of(row) for row in locked.mappings()]
    ended = [invocation.interrupted(now) for invocation in found]
    for invocation in ended:
        await connection.execute(_END, _end_parameters(invocation))
    await book(connection, [(invocation, invocation.reservation) for invocation in ended])
    return len(ended)


def _end_parameters(invocation: ExternalAgentInvocation) -> dict[str, Any]:
    values = {"org_id": invocation.org_id, "id": invocation.id, **end_values(invocation)}
    return {f"ended_{name}": value for name, value in values.items()}


def _is(org_id: str, invocation_id: UUID) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    return invocations.c.org_id == org_id, invocations.c.id == invocation_id
