"""What is asked on the way of a request, or every few seconds, goes along an index however large the tables are."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import psycopg
import pytest

from external_agents.domain.ids import first_id_at
from postgres_server import dsn

ROWS = 30_000
ORG, AGENT, INSTANCE = "org-7", UUID(int=7), UUID(int=3)

# An id a millisecond, over 50 organisations with an agent each, over 5 instances.
FILL = """
    INSERT INTO external_agents
    SELECT 'org-' || n, lpad(to_hex(n), 32, '0')::uuid, 'n', '', 'custom', 'https://a.example/', 'none', '{}', '{}', NULL,
        NULL, '{}', 30, 3, 'active', 's', 's', now(), now(), 1, 'n', ''
    FROM generate_series(0, 49) AS n;
    INSERT INTO external_agent_invocations (org_id, id, external_agent_id, initiated_by, status, request_payload, attempts,
        cost_overrun, trace_id, created_at, instance_id)
    SELECT 'org-' || n % 50, (lpad(to_hex(%(start)s + n), 12, '0') || '70008000' || lpad(to_hex(n), 12, '0'))::uuid,
        lpad(to_hex(n % 50), 32, '0')::uuid, 's', 'succeeded', '{}', '[]', false, md5(n::text), now(),
        lpad(to_hex(n % 5), 32, '0')::uuid
    FROM generate_series(0, %(rows)s - 1) AS n;
    ANALYZE;
"""
QUERIES: dict[str, tuple[str, str]] = {
    "by id": ("SELECT * FROM external_agent_invocations WHERE org_id = %(org)s AND id = %(id)s", "pkey"),
    "newest of an organisation": (
        "SELECT * FROM external_agent_invocations WHERE org_id = %(org)s AND id < %(id)s ORDER BY id DESC LIMIT 21",
        "pkey",
    ),
    "newest of an agent": (
        "SELECT * FROM external_agent_invocations WHERE org_id = %(org)s AND external_agent_id = %(agent)s "
        "ORDER BY id DESC LIMIT 21",
        "external_agent_id_id_idx",
    ),
    "of a trace": (
        "SELECT * FROM external_agent_invocations WHERE org_id = %(org)s AND trace_id = %(trace)s ORDER BY id DESC",
        "trace_id_idx",
    ),
    "running under a dead instance": (
        "SELECT * FROM external_agent_invocations WHERE instance_id = %(instance)s AND id >= %(id)s "
        "AND status = 'running' ORDER BY id LIMIT 100 FOR UPDATE SKIP LOCKED",
        "instance_id_id_idx",
    ),
    "to settle": (
        "UPDATE external_agent_invocations SET status = 'failed' "
        "WHERE org_id = %(org)s AND id = %(id)s AND status = 'running'",
        "pkey",
    ),
}


@pytest.fixture
def filled(postgres_url: str) -> str:
    now = datetime.now(UTC)
    with psycopg.connect(dsn(postgres_url)) as connection:
        start = int(now.timestamp() * 1000) - ROWS
        for statement in FILL.split(";"):
            connection.execute(statement.replace("%(start)s", str(start)).replace("%(rows)s", str(ROWS)))
    return postgres_url


@pytest.mark.parametrize("mode", ["force_custom_plan", "force_generic_plan"])
def test_no_table_is_read_as_a_whole(filled: str, mode: str) -> None:
    parameters: dict[str, Any] = {
        "org": ORG,
        "agent": AGENT,
        "trace": "0" * 32,
        "instance": INSTANCE,
        "id": first_id_at(datetime.now(UTC) - timedelta(seconds=1)),
    }
    with psycopg.connect(dsn(filled)) as connection:
        connection.execute(f"SET plan_cache_mode = {mode}")
        for name, (query, index) in QUERIES.items():
            plan = "\n".join(line for (line,) in connection.execute("EXPLAIN " + query, parameters, prepare=True))
            assert "Seq Scan" not in plan.replace("Seq Scan on external_agent_invocations_default", ""), (name, plan)
            assert index in plan, (name, plan)
