"""No statement reads a tenant's table as a whole, whether it is large, or was empty when the plan was made."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import attrs
import psycopg
import pytest

from external_agents.adapters.postgres.agents import PostgresAgents
from external_agents.adapters.postgres.engine import create_engine
from external_agents.adapters.postgres.idempotency import clear_expired
from external_agents.adapters.postgres.invocations import PostgresInvocations
from external_agents.adapters.postgres.ledger import PostgresLedger
from external_agents.domain.invocation import InvocationStatus
from external_agents.ports.ledger import LEASE_S
from external_agents.ports.repositories import AgentQuery, InvocationQuery
from external_agents.testing.builders import conclude, make_agent, make_finished_call, make_request, next_version
from postgres_server import ShiftedClock, dsn

ROWS = 30_000
PLANS_ARE_KEPT_AFTER = 12
"""psycopg prepares a statement at its sixth execution, PostgreSQL keeps a plan for all parameters five later."""

# 50 organisations with an agent each, an invocation every millisecond, under 5 instances of which none is left, and a
# key every 3 s.
FILL = """
    INSERT INTO external_agents
    SELECT 'org-' || n, lpad(to_hex(n), 32, '0')::uuid, 'n', '', 'custom', 'https://a.example/', 'none', '{}', '{}',
        NULL, NULL, '{}', 30, 3, 'active', 's', 's', now(), now(), 1, 'n', ''
    FROM generate_series(0, 49) AS n;
    INSERT INTO external_agent_invocations (org_id, id, external_agent_id, initiated_by, status, request_payload,
        attempts, cost_overrun, trace_id, created_at, instance_id, ended)
    SELECT 'org-' || n % 50, (lpad(to_hex(first + n), 12, '0') || '70008000' || lpad(to_hex(n), 12, '0'))::uuid,
        lpad(to_hex(n % 50), 32, '0')::uuid, 's', 'succeeded', '{}', '[]', false, md5(n::text), now(),
        lpad(to_hex(n % 5), 32, '0')::uuid, true
    FROM generate_series(0, rows - 1) AS n;
    INSERT INTO external_agent_idempotency_keys
    SELECT 'org-' || n % 50, lpad(to_hex(n % 50), 32, '0')::uuid, 'key-' || n, '', gen_random_uuid(),
        now() - n * interval '3 s'
    FROM generate_series(0, rows - 1) AS n;
"""


def fill(connection: psycopg.Connection) -> None:
    first = int(datetime.now(UTC).timestamp() * 1000) - ROWS
    for statement in FILL.replace("first + n", f"{first} + n").replace("rows - 1", str(ROWS - 1)).split(";"):
        connection.execute(statement)
    # An instance whose mark spans all of them.
    connection.execute("INSERT INTO instances VALUES (%s, now(), now(), now(), %s)", [UUID(int=3), UUID(int=0)])


async def work(clock: ShiftedClock) -> None:
    """Everything that the adapters do, often enough for plans to be kept."""
    engine = create_engine(clock.url, pool_size=1)
    agents, reader = PostgresAgents(engine, key_id_of=lambda envelope: "k1"), PostgresInvocations(engine)
    ledger = PostgresLedger(engine, uuid4())
    agent = make_agent(budget_config={"max_cost_per_invocation": 1}, tags=("a",), sealed={"auth_config.key": b"sealed"})
    await agents.create(agent)
    agent_query = AgentQuery(org_id=agent.org_id, tag="a")
    query = InvocationQuery(org_id=agent.org_id)
    for _ in range(PLANS_ARE_KEPT_AFTER):
        invocation = (await ledger.admit(make_request(agent))).invocation
        await ledger.settle(conclude(invocation))
        await ledger.settle(conclude(invocation))
        for _ in range(2):
            admission = await ledger.admit(make_request(agent, idempotency_key="key"))
            if not admission.replayed:
                await ledger.settle(conclude(admission.invocation))
        await clear_expired(engine)
        await ledger.record(make_finished_call(agent))
        await ledger.forecast(agent.org_id, agent.id)
        await reader.read(agent.org_id, agent.id, invocation.id)
        await reader.exists(agent.org_id, invocation.id)
        await reader.list(query, limit=20)
        since = datetime.now(UTC) - timedelta(minutes=1)
        for other in (
            attrs.evolve(query, agent_ids=frozenset({agent.id})),
            attrs.evolve(query, agent_ids=frozenset({agent.id, invocation.id})),
            attrs.evolve(query, status=InvocationStatus.FAILED, since=since, before_id=invocation.id),
        ):
            await reader.list(other, limit=20)
            await reader.count(other)
        await reader.search(query, invocation.trace_id, limit=20)
        await agents.list(agent_query, offset=0, limit=20)
        await agents.count(agent_query, text="x")
        agent = next_version(agent)
        await agents.update(agent)
        await clock.pass_time(LEASE_S / 3)
        await ledger.heartbeat()
        await ledger.recover()
    await ledger.retire()
    await engine.dispose()


@pytest.mark.parametrize("filled", [True, False], ids=["large", "empty"])
async def test_no_table_is_read_as_a_whole(postgres_url: str, shifted_clock: ShiftedClock, filled: bool) -> None:
    with psycopg.connect(dsn(postgres_url), autocommit=True) as connection:
        if filled:
            fill(connection)
        connection.execute("ANALYZE")
        connection.execute("SELECT pg_stat_reset()")
        await work(shifted_clock)
        scans = connection.execute(
            "SELECT relname, seq_scan FROM pg_stat_user_tables WHERE relname LIKE 'external_agent%' AND seq_scan > 0"
        ).fetchall()
        used = connection.execute(
            "SELECT sum(idx_scan) FROM pg_stat_user_tables WHERE relname LIKE 'external_agent_invocations%'"
        ).fetchone()
    assert scans == []
    assert used is not None
    assert used[0] > PLANS_ARE_KEPT_AFTER
