"""`external-agents check` proves the budgets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest

from external_agents.adapters.postgres.agents import PostgresAgents
from external_agents.adapters.postgres.audit import NAMED_MAX
from external_agents.adapters.postgres.ledger import PostgresLedger
from external_agents.testing.builders import conclude, costing, make_agent, make_request
from postgres_server import OpenEngine, dsn
from serve import home_folder, run

SECRET_KEYS = f"k1:{'A' * 43}="


@pytest.fixture
def home() -> Iterator[Path]:
    with home_folder() as folder:
        yield folder


def budgets_of(url: str, home: Path) -> tuple[int, list[str]]:
    """The exit status, and what is said of budgets."""
    done = run("check", home=home, env={"DATABASE_URL": dsn(url), "SECRET_KEYS": SECRET_KEYS})
    assert done.stderr == ""
    return done.returncode, [line for line in done.stdout.splitlines() if line.split()[1] == "budgets"]


async def test_check_proves_the_budgets_or_names_what_is_off(
    postgres_url: str, open_engine: OpenEngine, home: Path
) -> None:
    engine = open_engine(postgres_url)
    agents = PostgresAgents(engine, key_id_of=lambda envelope: "k1")
    agent = make_agent(org_id="acme", budget_config={"max_cost_per_invocation": "0.5"})
    await agents.create(agent)
    ledger = PostgresLedger(engine, uuid4())
    await ledger.heartbeat()
    for _ in range(2):
        admission = await ledger.admit(make_request(agent))
        await ledger.settle(conclude(admission.invocation, costing("0.25")))
    await ledger.admit(make_request(agent))
    assert budgets_of(postgres_url, home) == (0, ["ok     budgets     1 accounts equal the sums of 3 invocations"])

    with psycopg.connect(dsn(postgres_url)) as connection:
        connection.execute("UPDATE external_agent_budgets SET spent = 1000000")
    status, [line] = budgets_of(postgres_url, home)
    month = f"{admission.invocation.created_at:%Y-%m}"
    assert (status, line) == (
        1,
        f"WRONG  budgets     acme, agent {agent.id}, USD, {month}: the account says spent 1000000, reserved 0.5; "
        "its invocations say spent 0.50, reserved 0.5",
    )
    with psycopg.connect(dsn(postgres_url)) as connection:
        connection.execute("DELETE FROM external_agent_budgets")
    status, [line] = budgets_of(postgres_url, home)
    assert (status, "there is no account; its invocations say spent 0.50, reserved 0.5" in line) == (1, True)

    others = [make_agent(org_id="acme") for _ in range(NAMED_MAX + 3)]
    await agents.bulk(others)
    with psycopg.connect(dsn(postgres_url)) as connection:
        for other in others:
            connection.execute(
                "INSERT INTO external_agent_budgets VALUES ('acme', %s, 'USD', '2026-03-01', 1, 0)", [other.id]
            )
    status, lines = budgets_of(postgres_url, home)
    assert (status, len(lines)) == (1, NAMED_MAX + 1)
    assert lines[-1] == "WRONG  budgets     and 4 accounts more"
