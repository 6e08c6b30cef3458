"""Idempotency keys within an admission's transaction, behind the agent's gate, which is also the gate of its keys."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import bindparam, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from external_agents.adapters.postgres.rows import invocation_of
from external_agents.adapters.postgres.tables import idempotency_keys, invocations
from external_agents.domain.idempotency import KEPT_FOR, replayed
from external_agents.domain.invocation import ExternalAgentInvocation
from external_agents.ports.ledger import AdmissionRequest

# A key whose invocation is gone (its partition was dropped before its time) is as good as expired: there is nothing
# that could be answered again.
_FIRST = (
    select(invocations, idempotency_keys.c.request_hash)
    .join_from(
        idempotency_keys,
        invocations,
        (invocations.c.org_id == idempotency_keys.c.org_id) & (invocations.c.id == idempotency_keys.c.invocation_id),
    )
    .where(
        idempotency_keys.c.org_id == bindparam("its_org_id"),
        idempotency_keys.c.agent_id == bindparam("its_agent_id"),
        idempotency_keys.c.key == bindparam("its_key"),
        idempotency_keys.c.created_at > bindparam("expired_at"),
        invocations.c.org_id == bindparam("its_org_id"),
    )
)
_new = insert(idempotency_keys)
_KEEP = _new.on_conflict_do_update(
    index_elements=idempotency_keys.primary_key.columns,
    set_={name: _new.excluded[name] for name in ("request_hash", "invocation_id", "created_at")},
)


async def first_of_key(
    connection: AsyncConnection, request: AdmissionRequest, now: datetime
) -> ExternalAgentInvocation | None:
    """
    The invocation that answers this request again; None where it is the first with its key, or the key has expired.

    Raises:
        IdempotencyKeyReused, IdempotencyKeyInFlight: As `replayed` does.
    """
    if request.idempotency_key is None:
        return None
    values = {
        "its_org_id": request.org_id,
        "its_agent_id": request.agent_id,
        "its_key": request.idempotency_key,
        "expired_at": now - KEPT_FOR,
    }
    row = (await connection.execute(_FIRST, values)).mappings().one_or_none()
    return None if row is None else replayed(invocation_of(row), row["request_hash"], request.request_hash)


async def keep_key(connection: AsyncConnection, request: AdmissionRequest, now: datetime) -> None:
    """Remember the request's key, in the place of an expired one."""
    if request.idempotency_key is None:
        return
    values = {
        "org_id": request.org_id,
        "agent_id": request.agent_id,
        "key": request.idempotency_key,
        "request_hash": request.request_hash,
        "invocation_id": request.invocation_id,
        "created_at": now,
    }
    await connection.execute(_KEEP, values)
