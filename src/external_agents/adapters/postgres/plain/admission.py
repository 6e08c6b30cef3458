"""Admitting an invocation: what the statements read, the domain decides."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any
from uuid import UUID

import attrs
from sqlalchemy import bindparam, insert, text, update
from sqlalchemy.ext.asyncio import AsyncConnection

from external_agents.adapters.postgres.columns import config_of
from external_agents.adapters.postgres.instances import LeaseLost
from external_agents.adapters.postgres.plain.idempotency import first_of_key, keep_key
from external_agents.adapters.postgres.rows import (
    INVOCATION_COLUMNS,
    WINDOWS_COLUMNS,
    Row,
    account_of,
    invocation_values,
    windows_of,
    windows_values,
)
from external_agents.adapters.postgres.tables import budgets, invocations, rate_windows
from external_agents.domain.agent import AgentStatus
from external_agents.domain.budget import DEFAULT_CURRENCY, BudgetAccount, BudgetConfig, Money, budget_month
from external_agents.domain.errors import AgentInactive, AgentNotFound, StaleVersion
from external_agents.domain.ids import created_at_of
from external_agents.domain.invocation import ExternalAgentInvocation
from external_agents.domain.rate_limit import RateQuotas, RateWindows, Window, limits_of
from external_agents.domain.refusals import BudgetExceeded, RateLimited
from external_agents.ports.ledger import Admission, AdmissionRequest
from external_agents.ports.rate_limiter import Place

# The windows' lock is the agent's gate: admissions and changes of the agent pass one by one, first come, first served.
# The lock on the instance keeps recovery from taking this process for dead until this transaction has ended.
_GATE = text(
    """
    WITH lease AS (
        SELECT FROM instances WHERE id = :instance_id AND lease_until > clock_timestamp() FOR KEY SHARE
    )
    SELECT windows.*, EXISTS (SELECT FROM lease) AS has_lease
    FROM external_agent_rate_windows AS windows
    WHERE windows.org_id = :org_id AND windows.agent_id = :agent_id
    FOR UPDATE OF windows
    """
)

# A statement of its own behind the gate, so that it sees what was committed while the gate was shut. The account is
# locked, or made, by an update that changes nothing. The clock is read when all locks are held; now() would be the
# transaction's start, before the waiting.
_AGENT = text(
    """
    WITH account AS (
        INSERT INTO external_agent_budgets AS held (org_id, agent_id, currency, month, spent, reserved)
        SELECT org_id, id, coalesce(budget_config ->> 'currency', :default_currency), :month, 0, 0
        FROM external_agents
        WHERE org_id = :org_id AND id = :agent_id AND version = :version AND status = 'active'
            AND budget_config IS NOT NULL
        ON CONFLICT (org_id, agent_id, currency, month) DO UPDATE SET spent = held.spent
        RETURNING spent, reserved
    )
    SELECT agent.version, agent.status, agent.rate_limit_config::text, agent.budget_config::text,
        account.spent, account.reserved, clock_timestamp() AS now
    FROM external_agents AS agent LEFT JOIN account ON true
    WHERE agent.org_id = :org_id AND agent.id = :agent_id
    """
)

# Parameters named like columns are SQLAlchemy's own, hence the prefixes.
_place = (
    update(rate_windows)
    .where(rate_windows.c.org_id == bindparam("new_org_id"), rate_windows.c.agent_id == bindparam("new_agent_id"))
    .values({name: bindparam(f"new_{name}") for name in WINDOWS_COLUMNS})
)
_reservation = (
    update(budgets)
    .where(
        budgets.c.org_id == bindparam("new_org_id"),
        budgets.c.agent_id == bindparam("new_agent_id"),
        budgets.c.currency == bindparam("new_reservation_currency"),
        budgets.c.month == bindparam("new_month"),
    )
    .values(reserved=budgets.c.reserved + bindparam("new_reservation_amount"))
)
_RECORD = insert(invocations).values({name: bindparam(f"new_{name}") for name in (*INVOCATION_COLUMNS, "instance_id")})


@attrs.frozen
class _Limits:
    """An agent's limits, and how they stand at one moment."""

    limits: Mapping[Window, int]
    budget: BudgetConfig
    windows: RateWindows
    account: BudgetAccount
    now: datetime

    @classmethod
    def of(cls, agent: Row, windows: Row) -> _Limits:
        now = agent["now"]
        return cls(
            limits_of(config_of(agent["rate_limit_config"])),
            BudgetConfig.of(config_of(agent["budget_config"])),
            windows_of(windows).advanced(now.timestamp()),
            account_of(agent),
            now,
        )

    @property
    def now_s(self) -> float:
        return self.now.timestamp()

    def quotas(self, windows: RateWindows) -> RateQuotas:
        return windows.quotas(self.limits, self.now_s)

    def require_place(self, verdict: Place | RateLimited | None) -> None:
        """
        Raises:
            RateLimited: A window is full; or the verdict itself.
            BudgetExceeded: The budget does not cover one more.
        """
        if isinstance(verdict, RateLimited):
            raise verdict
        if verdict is None and (refusal := self.windows.refusal(self.limits, self.now_s)):
            window, retry_after_s = refusal
            raise RateLimited(window.value, retry_after_s, self.quotas(self.windows))
        if not self.account.admits(self.budget):
            raise BudgetExceeded(self.quotas(self.windows) if verdict is None else verdict.quotas)


async def admit(connection: AsyncConnection, request: AdmissionRequest, instance_id: UUID) -> Admission:
    """Within a transaction; what is raised must roll it back, so that a refusal leaves no trace."""
    created_at = created_at_of(request.invocation_id)
    limits = await _limits_behind_gate(connection, request, instance_id)
    if first := await first_of_key(connection, request, limits.now):
        quotas = limits.quotas(limits.windows) if request.verdict is None else request.verdict.quotas
        return Admission(invocation=first, quotas=quotas, replayed=True)
    limits.require_place(request.verdict)
    windows = limits.windows.taken()
    per_invocation = limits.budget.per_invocation
    invocation = ExternalAgentInvocation(
        id=request.invocation_id,
        org_id=request.org_id,
        external_agent_id=request.agent_id,
        lineage_hop_id=request.lineage_hop_id,
        initiated_by=request.initiated_by,
        request=request.request,
        reservation=None if per_invocation is None else Money(per_invocation, limits.budget.currency),
        trace_id=request.trace_id,
        created_at=created_at,
    )
    await _write(connection, invocation, windows if request.verdict is None else None, instance_id)
    await keep_key(connection, request, limits.now)
    quotas = limits.quotas(windows) if request.verdict is None else request.verdict.quotas
    return Admission(invocation=invocation, quotas=quotas)


async def _limits_behind_gate(connection: AsyncConnection, request: AdmissionRequest, instance_id: UUID) -> _Limits:
    key: dict[str, Any] = {"org_id": request.org_id, "agent_id": request.agent_id}
    windows = (await connection.execute(_GATE, {**key, "instance_id": instance_id})).mappings().one_or_none()
    if windows is None:
        raise AgentNotFound
    if not windows["has_lease"]:
        raise LeaseLost
    values = {
        **key,
        "version": request.agent.version,
        "month": budget_month(created_at_of(request.invocation_id)),
        "default_currency": DEFAULT_CURRENCY,
    }
    agent = (await connection.execute(_AGENT, values)).mappings().one_or_none()
    if agent is None or agent["status"] == AgentStatus.DELETED:
        raise AgentNotFound
    if agent["version"] != request.agent.version:
        raise StaleVersion
    if agent["status"] != AgentStatus.ACTIVE:
        raise AgentInactive
    return _Limits.of(agent, windows)


async def _write(
    connection: AsyncConnection, invocation: ExternalAgentInvocation, windows: RateWindows | None, instance_id: UUID
) -> None:
    """
    One statement for the place, the reservation and the record; all but the record are locked already.

    Args:
        windows: With the place taken; None: it was taken elsewhere.
    """
    values = {
        **invocation_values(invocation),
        **({} if windows is None else windows_values(windows)),
        "agent_id": invocation.external_agent_id,
        "instance_id": instance_id,
        "month": budget_month(invocation.created_at),
    }
    statement = _RECORD
    if windows is not None:
        statement = statement.add_cte(_place.cte("place"))
    if invocation.reservation is not None:
        statement = statement.add_cte(_reservation.cte("reservation"))
    await connection.execute(statement, {f"new_{name}": value for name, value in values.items()})
