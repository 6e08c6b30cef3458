"""
Ledgers that each break one guard. A harness that does not catch every one of them proves nothing.

They stand around the real ledger and use nothing of it but its port and, by connections of their own, its tables. Two
leave the ledger as it is and weaken what it stands on.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from collections.abc import Mapping
from typing import Any
from uuid import UUID

import aiohttp
import attrs
import psycopg
from psycopg.rows import dict_row
from sqlalchemy.ext.asyncio import AsyncEngine

from external_agents.adapters.postgres.ledger import PostgresLedger
from external_agents.domain.budget import BudgetConfig, Money
from external_agents.domain.errors import ExternalAgentsError, Unavailable
from external_agents.domain.ids import created_at_of
from external_agents.domain.invocation import ExternalAgentInvocation
from external_agents.domain.rate_limit import RateQuotas
from external_agents.ports.ledger import Admission, AdmissionRequest

RECORDED_AFTER_S = 0.5
STORED_AFTER_S = 2.0
AGAIN_S = 0.2
DATABASE = "CHAOS_DATABASE"
"""The environment variable with the database's URL as psycopg takes it."""


async def _execute(statement: str, *values: object) -> list[dict[str, Any]]:
    try:
        async with await psycopg.AsyncConnection.connect(
            os.environ[DATABASE], autocommit=True, row_factory=dict_row
        ) as connection:
            done = await connection.execute(statement.encode(), values)
            return await done.fetchall() if done.description else []
    except psycopg.Error as error:
        raise Unavailable("The database") from error


class Resending(PostgresLedger):
    """Recovery calls the agent again, once: the oldest living instance does it."""

    def __init__(self, engine: AsyncEngine, instance_id: UUID, **options: Any) -> None:
        super().__init__(engine, instance_id, **options)
        self._own_id = instance_id
        self._resent: set[UUID] = set()

    async def recover(self) -> int:
        ended = await super().recover()
        for row in await _execute(
            """
            SELECT invocation.id, invocation.request_payload::text, agent.webhook_url
            FROM external_agent_invocations AS invocation
            JOIN external_agents AS agent ON agent.org_id = invocation.org_id AND agent.id = external_agent_id
            WHERE invocation.status = 'unknown' AND invocation.completed_at > now() - interval '5 s'
                AND %s = (SELECT id FROM instances WHERE lease_until > now() ORDER BY id LIMIT 1)
            """,
            self._own_id,
        ):
            if row["id"] not in self._resent:
                self._resent.add(row["id"])
                await self._send(row)
        return ended

    async def _send(self, row: dict[str, Any]) -> None:
        headers = {"Idempotency-Key": str(row["id"]), "Content-Type": "application/json"}
        body = json.dumps({**json.loads(row["request_payload"]), "do": "succeed", "delay_s": 0})
        async with aiohttp.ClientSession() as session, session.post(row["webhook_url"], data=body, headers=headers):
            pass


class SendingFirst(PostgresLedger):
    """Lets the agent be called while the record is still on its way."""

    def __init__(self, engine: AsyncEngine, instance_id: UUID, **options: Any) -> None:
        super().__init__(engine, instance_id, **options)
        self._behind: dict[UUID, asyncio.Task[None]] = {}

    async def admit(self, request: AdmissionRequest) -> Admission:
        self._behind[request.invocation_id] = asyncio.create_task(self._admit_later(request))
        budget = BudgetConfig.of(request.agent.budget_config)
        amount = budget.per_invocation
        invocation = ExternalAgentInvocation(
            id=request.invocation_id,
            org_id=request.org_id,
            external_agent_id=request.agent_id,
            initiated_by=request.initiated_by,
            request=request.request,
            reservation=None if amount is None else Money(amount, budget.currency),
            trace_id=request.trace_id,
            created_at=created_at_of(request.invocation_id),
        )
        return Admission(invocation=invocation, quotas=RateQuotas())

    async def _admit_later(self, request: AdmissionRequest) -> None:
        await asyncio.sleep(RECORDED_AFTER_S)
        await super().admit(request)

    async def settle(self, finished: ExternalAgentInvocation) -> ExternalAgentInvocation:
        try:
            await self._behind[finished.id]
        except ExternalAgentsError:
            return finished
        return await super().settle(finished)


class AnsweringFirst(PostgresLedger):
    """Tells the caller how it ended, and stores that a little later."""

    def __init__(self, engine: AsyncEngine, instance_id: UUID, **options: Any) -> None:
        super().__init__(engine, instance_id, **options)
        self._behind: set[asyncio.Task[None]] = set()

    async def settle(self, finished: ExternalAgentInvocation) -> ExternalAgentInvocation:
        task = asyncio.create_task(self._settle_later(finished))
        self._behind.add(task)
        task.add_done_callback(self._behind.discard)
        return finished

    async def _settle_later(self, finished: ExternalAgentInvocation) -> None:
        await asyncio.sleep(STORED_AFTER_S)
        while True:
            try:
                await super().settle(finished)
            except Unavailable:
                await asyncio.sleep(AGAIN_S)
            else:
                return


class ForgettingWindows(PostgresLedger):
    """Counts places in the process instead of in the store."""

    def __init__(self, engine: AsyncEngine, instance_id: UUID, **options: Any) -> None:
        super().__init__(engine, instance_id, **options)
        self._taken: Counter[UUID] = Counter()

    async def admit(self, request: AdmissionRequest) -> Admission:
        limits = request.agent.rate_limit_config or {}
        if self._taken[request.agent_id] < min(limits.values(), default=0):
            await _execute(
                """
                UPDATE external_agent_rate_windows SET minute_head = 0, hour_head = 0, day_head = 0
                WHERE org_id = %s AND agent_id = %s
                """,
                request.org_id,
                request.agent_id,
            )
        admission = await super().admit(request)
        self._taken[request.agent_id] += 1
        return admission


class ChargingTwice(PostgresLedger):
    """Settles some invocations a second time."""

    async def settle(self, finished: ExternalAgentInvocation) -> ExternalAgentInvocation:
        stored = await super().settle(finished)
        if stored.cost is not None and stored.id.int % 10 == 0:
            await _execute(
                """
                UPDATE external_agent_budgets SET spent = spent + %s
                WHERE org_id = %s AND agent_id = %s AND currency = %s
                """,
                stored.cost.amount,
                stored.org_id,
                stored.external_agent_id,
                stored.cost.currency,
            )
        return stored


class ForgivingUnknowns(PostgresLedger):
    """Charges nothing for what was interrupted; books and record agree on it."""

    async def recover(self) -> int:
        ended = await super().recover()
        await _execute(
            """
            WITH interrupted AS (
                SELECT org_id, id, external_agent_id, cost_amount, cost_currency FROM external_agent_invocations
                WHERE status = 'unknown' AND cost_amount > 0 FOR UPDATE
            ), forgiven AS (
                UPDATE external_agent_invocations AS invocation SET cost_amount = NULL, cost_currency = NULL
                FROM interrupted WHERE invocation.org_id = interrupted.org_id AND invocation.id = interrupted.id
            )
            UPDATE external_agent_budgets AS account SET spent = spent - total
            FROM (
                SELECT org_id, external_agent_id, cost_currency, sum(cost_amount) AS total
                FROM interrupted GROUP BY 1, 2, 3
            ) AS sums
            WHERE account.org_id = sums.org_id AND account.agent_id = sums.external_agent_id
                AND account.currency = sums.cost_currency
            """
        )
        return ended


class ForgettingKeys(PostgresLedger):
    """Takes every call under an idempotency key for the first one."""

    async def admit(self, request: AdmissionRequest) -> Admission:
        return await super().admit(attrs.evolve(request, idempotency_key=None))


CONTROLS: Mapping[str, type[PostgresLedger]] = {
    "resending": Resending,
    "sending-first": SendingFirst,
    "answering-first": AnsweringFirst,
    "forgetting-keys": ForgettingKeys,
    "forgetting-windows": ForgettingWindows,
    "charging-twice": ChargingTwice,
    "forgiving-unknowns": ForgivingUnknowns,
}

LAZY_COMMIT = "lazy-commit"
"""The real ledger, whose connections switch synchronous_commit off: a commit is told before it is on disk."""
FORGETFUL_REDIS = "forgetful-redis"
"""The real ledger, with a Redis that keeps nothing on disk."""

CAUGHT_BY: Mapping[str, str] = {
    "resending": "sent twice",
    "sending-first": "written ahead",
    "answering-first": "acknowledged",
    "forgetting-keys": "one a call",
    "forgetting-windows": "windows",
    FORGETFUL_REDIS: "windows",
    "charging-twice": "books",
    "forgiving-unknowns": "charges",
    LAZY_COMMIT: "acknowledged",
}
"""Which check must catch which control."""
