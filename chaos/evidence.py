"""The accounts of what happened: the callers', the agent's, the tables'."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import attrs
import psycopg
from psycopg.rows import dict_row

from chaos.load import Answer, Edit
from chaos.machines import Worker
from chaos.plan import AgentPlan

_ROWS = """
    SELECT id, org_id, external_agent_id, status, request_payload::text, response_payload::text, response_status,
        attempts::text, error_code, reservation_amount, reservation_currency, cost_amount, cost_currency, created_at,
        completed_at, instance_id
    FROM external_agent_invocations
"""
_ACCOUNTS = "SELECT org_id, agent_id, currency, month, spent, reserved FROM external_agent_budgets"
_RUNNING = "SELECT DISTINCT instance_id FROM external_agent_invocations WHERE status = 'running'"
_UNFINISHED = "SELECT count(*) FROM external_agent_invocations WHERE status IN ('running', 'pending')"


@attrs.frozen(kw_only=True)
class Row:
    """An invocation as it is stored."""

    id: UUID
    org_id: str
    agent_id: UUID
    status: str
    request: Mapping[str, Any]
    response: Any
    response_status: int | None
    attempts: Sequence[Mapping[str, Any]]
    error_code: str | None
    reservation: Decimal | None
    cost: Decimal | None
    currency: str | None
    created_at: datetime
    completed_at: datetime | None
    instance_id: UUID | None

    @property
    def call(self) -> str:
        return str(self.request["call"])


@attrs.frozen(kw_only=True)
class Account:
    org_id: str
    agent_id: UUID
    currency: str
    month: date
    spent: Decimal
    reserved: Decimal


@attrs.frozen(kw_only=True)
class Arrival:
    """A request as the agent got it. `row`: the record's status at that moment; None: it could not be asked."""

    at: float
    id: UUID
    call: str
    row: str | None


@attrs.frozen(kw_only=True)
class Evidence:
    agents: Mapping[UUID, AgentPlan]
    answers: Sequence[Answer]
    edits: Sequence[Edit]
    arrivals: Sequence[Arrival]
    rows: Mapping[UUID, Row]
    accounts: Sequence[Account]
    workers: Mapping[int, Worker]
    process_of: Mapping[UUID, int]
    """By instance."""

    @property
    def arrivals_by_id(self) -> Mapping[UUID, Sequence[Arrival]]:
        return grouped(self.arrivals, "id")

    def worker_of(self, row: Row) -> Worker | None:
        """Whose invocation it was."""
        return None if row.instance_id is None else self.workers.get(self.process_of.get(row.instance_id, 0))


def grouped(items: Sequence[Any], by: str) -> dict[Any, list[Any]]:
    groups: dict[Any, list[Any]] = {}
    for item in items:
        groups.setdefault(getattr(item, by), []).append(item)
    return groups


def arrivals_of(journal: Path) -> list[Arrival]:
    lines = journal.read_text().splitlines() if journal.exists() else []
    read = [json.loads(line) for line in lines]
    return [Arrival(at=line["at"], id=UUID(line["id"]), call=line["payload"]["call"], row=line["row"]) for line in read]


def instances_of(folder: Path) -> dict[UUID, int]:
    return {UUID(path.name): int(path.read_text()) for path in folder.iterdir()}


async def tables_of(dsn: str) -> tuple[dict[UUID, Row], list[Account]]:
    async with await psycopg.AsyncConnection.connect(dsn, row_factory=dict_row) as connection:
        rows = [_row(found) for found in await (await connection.execute(_ROWS)).fetchall()]
        accounts = [Account(**found) for found in await (await connection.execute(_ACCOUNTS)).fetchall()]
    return {row.id: row for row in rows}, accounts


async def running_instances(dsn: str) -> set[UUID]:
    """Those that have invocations running; none when the database cannot be asked."""
    try:
        async with await psycopg.AsyncConnection.connect(dsn) as connection:
            return {found for (found,) in await (await connection.execute(_RUNNING)).fetchall()}
    except psycopg.Error:
        return set()


async def unfinished(dsn: str) -> int:
    async with await psycopg.AsyncConnection.connect(dsn) as connection:
        [count] = await (await connection.execute(_UNFINISHED)).fetchone() or [0]
    return int(count)


def _row(found: dict[str, Any]) -> Row:
    response = found["response_payload"]
    return Row(
        id=found["id"],
        org_id=found["org_id"],
        agent_id=found["external_agent_id"],
        status=found["status"],
        request=json.loads(found["request_payload"]),
        response=None if response is None else json.loads(response),
        response_status=found["response_status"],
        attempts=json.loads(found["attempts"]),
        error_code=found["error_code"],
        reservation=found["reservation_amount"],
        cost=found["cost_amount"],
        currency=found["cost_currency"],
        created_at=found["created_at"],
        completed_at=found["completed_at"],
        instance_id=found["instance_id"],
    )
