"""The proof of the books: right ones pass, whatever happens meanwhile; each way to falsify them is named."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg import sql
from sqlalchemy.ext.asyncio import AsyncEngine

from external_agents.adapters.postgres.agents import PostgresAgents
from external_agents.adapters.postgres.audit import NAMED_MAX, BudgetAudit, FalseAccount, audit_budgets
from external_agents.adapters.postgres.engine import create_engine
from external_agents.adapters.postgres.ledger import PostgresLedger
from external_agents.domain.agent import ExternalAgent
from external_agents.domain.budget import BudgetAccount, budget_month
from external_agents.domain.errors import Unavailable
from external_agents.domain.refusals import AdmissionRefused
from external_agents.testing.builders import (
    conclude,
    costing,
    id_at,
    make_agent,
    make_finished_call,
    make_request,
    next_version,
    refused,
    timed_out,
)
from postgres_server import OpenEngine, dsn

BUDGET = {"max_cost_per_invocation": "0.10", "max_monthly_cost": 100, "currency": "EUR"}
LAST_MONTH = datetime(2026, 2, 28, 23, 59, 59, 999000, tzinfo=UTC)


@pytest.fixture
async def agent(postgres_agents: PostgresAgents, postgres_ledger: PostgresLedger) -> ExternalAgent:
    """
    One with a life behind it: charged, released, overrun and unknown invocations, two that run, a logged one, a changed
    currency, an invocation of an earlier month, and one that was refused.
    """
    agent = make_agent(budget_config=BUDGET)
    await postgres_agents.create(agent)
    await postgres_ledger.heartbeat()
    for outcome in (costing("0.07"), costing("0.25"), costing(None), refused(), timed_out(), costing("0")):
        admission = await postgres_ledger.admit(make_request(agent))
        await postgres_ledger.settle(conclude(admission.invocation, outcome, currency="EUR"))
    early = await postgres_ledger.admit(make_request(agent, invocation_id=id_at(LAST_MONTH)))
    await postgres_ledger.settle(conclude(early.invocation, costing("0.01"), currency="EUR"))
    await postgres_ledger.admit(make_request(agent))
    await postgres_ledger.record(make_finished_call(agent))
    dollars = next_version(agent, budget_config={"max_cost_per_invocation": "0.20", "max_monthly_cost": "0.3"})
    await postgres_agents.update(dollars)
    await postgres_ledger.admit(make_request(dollars))
    with pytest.raises(AdmissionRefused):
        await postgres_ledger.admit(make_request(dollars))
    free = make_agent(org_id=agent.org_id)
    await postgres_agents.create(free)
    admission = await postgres_ledger.admit(make_request(free))
    await postgres_ledger.settle(conclude(admission.invocation, costing("3"), currency="USD"))
    return dollars


async def tamper(url: str, statement: str, **values: Any) -> None:
    async with await psycopg.AsyncConnection.connect(dsn(url)) as connection:
        changed = await connection.execute(sql.SQL(statement), values)
        assert changed.rowcount == 1, "the test changes one row"


def account(spent: str, reserved: str) -> BudgetAccount:
    return BudgetAccount(spent=Decimal(spent), reserved=Decimal(reserved))


def month_now() -> date:
    return budget_month(datetime.now(UTC))


async def test_right_books_pass(postgres_engine: AsyncEngine, agent: ExternalAgent) -> None:
    audit = await audit_budgets(postgres_engine)
    assert audit == BudgetAudit(accounts=4, bookings=8, number_off=0, named=())


async def test_no_books_pass(postgres_engine: AsyncEngine) -> None:
    assert await audit_budgets(postgres_engine) == BudgetAudit(accounts=0, bookings=0, number_off=0, named=())


EUROS = "WHERE currency = 'EUR' AND month > '2026-02-01'"
RIGHT_EUROS, RIGHT_DOLLARS = account("0.52", "0.1"), account("0", "0.2")


@pytest.mark.parametrize(
    ("statement", "named"),
    [
        (f"UPDATE external_agent_budgets SET spent = spent + 0.000000001 {EUROS}", [("EUR", "0.520000001", "0.1")]),
        (f"UPDATE external_agent_budgets SET reserved = 0 {EUROS}", [("EUR", "0.52", "0")]),
        (f"UPDATE external_agent_budgets SET spent = spent + 0.1, reserved = 0 {EUROS}", [("EUR", "0.62", "0")]),
        (f"DELETE FROM external_agent_budgets {EUROS}", [("EUR", None, None)]),
        (
            f"UPDATE external_agent_budgets SET currency = 'CHF' {EUROS}",
            [("CHF", "0.52", "0.1"), ("EUR", None, None)],
        ),
    ],
)
async def test_a_false_account_is_named(
    postgres_url: str,
    postgres_engine: AsyncEngine,
    agent: ExternalAgent,
    statement: str,
    named: list[tuple[str, str | None, str | None]],
) -> None:
    await tamper(postgres_url, statement)
    audit = await audit_budgets(postgres_engine)
    assert audit.named == tuple(
        FalseAccount(
            org_id=agent.org_id,
            agent_id=agent.id,
            currency=currency,
            month=month_now(),
            account=None if spent is None or reserved is None else account(spent, reserved),
            booked=RIGHT_EUROS if currency == "EUR" else account("0", "0"),
        )
        for currency, spent, reserved in named
    )
    assert audit.number_off == len(named)


async def test_an_account_of_the_wrong_month_is_named(
    postgres_url: str, postgres_engine: AsyncEngine, agent: ExternalAgent
) -> None:
    await tamper(postgres_url, f"UPDATE external_agent_budgets SET month = '2026-01-01' {EUROS}")
    audit = await audit_budgets(postgres_engine)
    assert [(false.month, false.account, false.booked) for false in audit.named] == [
        (date(2026, 1, 1), RIGHT_EUROS, account("0", "0")),
        (month_now(), None, RIGHT_EUROS),
    ]


@pytest.mark.parametrize(
    ("statement", "euros", "dollars"),
    [
        ("DELETE FROM external_agent_invocations WHERE cost_amount = 0.07", ("0.45", "0.1"), None),
        (
            "DELETE FROM external_agent_invocations WHERE status = 'running' AND reservation_currency = 'USD'",
            None,
            ("0", "0"),
        ),
        ("UPDATE external_agent_invocations SET cost_amount = NULL WHERE cost_amount = 0.25", ("0.27", "0.1"), None),
        ("UPDATE external_agent_invocations SET cost_amount = 0.26 WHERE cost_amount = 0.25", ("0.53", "0.1"), None),
        (
            "UPDATE external_agent_invocations SET status = 'failed'"
            " WHERE status = 'running' AND reservation_currency = 'EUR'",
            ("0.52", "0"),
            None,
        ),
        (
            "UPDATE external_agent_invocations SET status = 'running' WHERE cost_amount = 0.25",
            ("0.52", "0.2"),
            None,
        ),
        (
            "UPDATE external_agent_invocations SET cost_currency = 'USD' WHERE cost_amount = 0.25",
            ("0.27", "0.1"),
            ("0.25", "0.2"),
        ),
    ],
)
async def test_false_invocations_are_named_by_their_accounts(
    postgres_url: str,
    postgres_engine: AsyncEngine,
    agent: ExternalAgent,
    statement: str,
    euros: tuple[str, str] | None,
    dollars: tuple[str, str] | None,
) -> None:
    await tamper(postgres_url, statement)
    audit = await audit_budgets(postgres_engine)
    booked = {false.currency: (false.account, false.booked) for false in audit.named}
    expected = {}
    if euros:
        expected["EUR"] = RIGHT_EUROS, account(*euros)
    if dollars:
        expected["USD"] = RIGHT_DOLLARS, account(*dollars)
    assert booked == expected


async def test_an_amount_without_a_currency_is_named(
    postgres_url: str, postgres_engine: AsyncEngine, agent: ExternalAgent
) -> None:
    await tamper(postgres_url, "UPDATE external_agent_invocations SET cost_currency = NULL WHERE cost_amount = 0.25")
    audit = await audit_budgets(postgres_engine)
    assert {false.currency: false.account for false in audit.named} == {"EUR": RIGHT_EUROS, None: None}


async def test_the_month_is_of_utc_whatever_the_server_thinks(
    postgres_url: str, open_engine: OpenEngine, agent: ExternalAgent
) -> None:
    engine = open_engine(f"{postgres_url}&options=-c%20TimeZone%3DPacific/Auckland")
    assert (await audit_budgets(engine)).number_off == 0


async def test_of_many_false_accounts_the_first_are_named(
    postgres_url: str, postgres_agents: PostgresAgents, postgres_engine: AsyncEngine
) -> None:
    agents = [make_agent(org_id=f"org-{number:02}") for number in range(NAMED_MAX + 5)]
    await postgres_agents.bulk(agents)
    for agent in agents:
        await tamper(
            postgres_url,
            "INSERT INTO external_agent_budgets VALUES (%(org_id)s, %(agent_id)s, 'USD', '2026-03-01', 1, 0)",
            org_id=agent.org_id,
            agent_id=agent.id,
        )
    audit = await audit_budgets(postgres_engine)
    assert (audit.number_off, audit.accounts) == (NAMED_MAX + 5, NAMED_MAX + 5)
    assert [false.org_id for false in audit.named] == [agent.org_id for agent in agents[:NAMED_MAX]]


async def test_it_is_right_while_others_invoke(
    postgres_url: str, postgres_agents: PostgresAgents, open_engine: OpenEngine
) -> None:
    agents = [make_agent(budget_config=BUDGET) for _ in range(3)]
    await postgres_agents.bulk(agents)
    ledger = PostgresLedger(open_engine(postgres_url), uuid4())
    await ledger.heartbeat()
    done = asyncio.Event()

    async def invoking(agent: ExternalAgent) -> None:
        while not done.is_set():
            with suppress(AdmissionRefused):
                admission = await ledger.admit(make_request(agent))
                await ledger.settle(conclude(admission.invocation, costing("0.02"), currency="EUR"))

    callers = [asyncio.create_task(invoking(agent)) for agent in agents for _ in range(3)]
    engine = open_engine(postgres_url)
    seen: list[BudgetAudit] = []
    async with asyncio.timeout(60):
        while len(seen) < 10 or seen[-1].bookings < seen[0].bookings + 50:
            seen.append(await audit_budgets(engine))
    done.set()
    await asyncio.gather(*callers)
    assert [audit.number_off for audit in seen] == [0] * len(seen)
    assert (await audit_budgets(engine)).number_off == 0


async def test_it_leaves_the_connection_as_it_was(postgres_url: str, agent: ExternalAgent) -> None:
    engine = create_engine(postgres_url, pool_size=1)
    settings = ("enable_seqscan", "statement_timeout", "transaction_isolation", "transaction_read_only")

    async def current() -> Mapping[str, str]:
        async with engine.connect() as connection:
            return {name: (await connection.exec_driver_sql(f"SHOW {name}")).scalar_one() for name in settings}

    before = await current()
    await audit_budgets(engine)
    assert await current() == before
    await engine.dispose()


async def test_a_database_that_is_away(open_engine: OpenEngine) -> None:
    with pytest.raises(Unavailable):
        await audit_budgets(open_engine("postgresql+psycopg://nobody@/none?host=/nonexistent"))
