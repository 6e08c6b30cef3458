"""
Millions of old invocations, made by SQL, in minutes.

The month's partition is made anew without indexes, filled, and only then attached, which gives it its indexes: one that
is built at the end costs a fraction of one that is kept up row by row.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

import attrs
import psycopg
from psycopg import sql

from benchmarks.estate import Estate
from benchmarks.processes import BenchmarkError
from external_agents.adapters.postgres.partitions import PARTITION_PREFIX
from external_agents.domain.ids import first_id_at

PARENT = sql.Identifier("external_agent_invocations")
BYTES_A_ROW = 2_000
"""On disk while it is made: the row, its indexes, the sorting for them, and what of the log is kept."""
CHUNK = 250_000
AT_ONCE = 2
SORT_MEMORY = "512MB"
MILLISECOND = 1_000

# Ids go up with time, agents come at random. Of 1,000 invocations 30 have failed and one is unknown. md5 gives the
# random bits, so every run makes the same rows.
_FILL = sql.SQL(
    """
    INSERT INTO {partition} (
        org_id, id, external_agent_id, initiated_by, status, request_payload, response_payload, response_status,
        attempts, execution_time_ms, error_code, error_message, reservation_amount, reservation_currency,
        cost_amount, cost_currency, cost_overrun, trace_id, created_at, completed_at, instance_id, ended
    )
    SELECT
        agent.org_id,
        (lpad(to_hex(ms), 12, '0') || '7' || substr(noise, 1, 3) || '8' || substr(noise, 4, 15))::uuid,
        agent.id,
        'benchmark',
        status,
        json_build_object('text', repeat('x', 188)),
        CASE status WHEN 'succeeded' THEN json_build_object('said', repeat('x', 153), 'metadata', cost_report) END,
        CASE status WHEN 'succeeded' THEN 200 WHEN 'failed' THEN 500 END,
        CASE status WHEN 'unknown' THEN '[]'::json ELSE json_build_array(json_build_object(
            'at', to_char(at, 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"'),
            'status', CASE status WHEN 'succeeded' THEN 200 ELSE 500 END,
            'duration_ms', 120
        )) END,
        CASE status WHEN 'unknown' THEN NULL ELSE 121 END,
        CASE status WHEN 'failed' THEN 'http_status' WHEN 'unknown' THEN 'interrupted' END,
        CASE status WHEN 'failed' THEN 'The agent answered with 500.' END,
        0.05, 'USD',
        CASE status WHEN 'succeeded' THEN 0.01 WHEN 'unknown' THEN 0.05 END,
        CASE WHEN status <> 'failed' THEN 'USD' END,
        false,
        noise,
        at,
        at + interval '121 ms',
        %(instance_id)s,
        true
    FROM generate_series(%(first)s::bigint, %(last)s::bigint) AS number
    CROSS JOIN LATERAL (
        SELECT md5(number::text) AS noise, (%(from_ms)s + number * %(span_ms)s::float8 / %(rows)s)::bigint AS ms
    ) AS drawn
    CROSS JOIN LATERAL (
        SELECT to_timestamp(ms / 1000.0) AS at,
            json_build_object('cost', '0.01') AS cost_report,
            CASE WHEN number %% 1000 = 0 THEN 'unknown' WHEN number %% 1000 <= 30 THEN 'failed' ELSE 'succeeded' END
                AS status
    ) AS made
    JOIN benchmark_agents AS agent
        ON agent.number = ('x' || substr(noise, 20, 7))::bit(28)::int %% %(agents)s
    """
)
_ACCOUNTS = """
    INSERT INTO external_agent_budgets (org_id, agent_id, currency, month, spent, reserved)
    SELECT org_id, external_agent_id, cost_currency, date_trunc('month', created_at AT TIME ZONE 'UTC')::date,
        sum(cost_amount), 0
    FROM external_agent_invocations WHERE cost_amount IS NOT NULL GROUP BY 1, 2, 3, 4
"""


@attrs.frozen(kw_only=True)
class Span:
    """The time in which the rows were made, up to now, within the partition of this month."""

    partition: str
    start: datetime
    end: datetime

    @classmethod
    def this_month(cls) -> Span:
        now = datetime.now(UTC)
        start = now.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
        return cls(partition=f"{PARTITION_PREFIX}{start:%Y_%m}", start=start, end=now)

    def moment(self, part: float) -> datetime:
        return self.start + part * (self.end - self.start)


def require_room(folder: Path, rows: int) -> None:
    """
    Raises:
        BenchmarkError: The disk is too full.
    """
    free, wanted = shutil.disk_usage(folder).free, rows * BYTES_A_ROW
    if free < wanted:
        raise BenchmarkError(
            f"{rows:,} rows need {wanted / 1e9:.0f} GB, and {folder} has {free / 1e9:.0f} GB: give fewer --rows, "
            "or another --folder"
        )


async def fill(dsn: str, estate: Estate, rows: int, tell: Callable[[str], None]) -> UUID:
    """Returns the first id that is not one of these rows. The partition of this month must be empty."""
    span = Span.this_month()
    began = time.monotonic()
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
        await _list_agents(connection, estate)
        attach = await _take_off(connection, span.partition)
        await _insert(dsn, span, rows, len(estate.agents), tell)
        tell(f"  {rows:,} rows after {time.monotonic() - began:.0f} s; indexes …")
        await connection.execute(f"SET maintenance_work_mem = '{SORT_MEMORY}'")
        await connection.execute(attach)
        tell(f"  indexes after {time.monotonic() - began:.0f} s; VACUUM ANALYZE …")
        await connection.execute(_ACCOUNTS)
        await connection.execute(sql.SQL("VACUUM (ANALYZE) {}").format(PARENT))
        await connection.execute("DROP TABLE benchmark_agents")
        await connection.execute("CHECKPOINT")
    tell(f"  filled after {time.monotonic() - began:.0f} s")
    return first_id_at(datetime.now(UTC))


async def _take_off(connection: psycopg.AsyncConnection[tuple[object, ...]], partition: str) -> sql.Composed:
    """Put a table without indexes in the place of the partition. Returns the statement that makes it one again."""
    table = sql.Identifier(partition)
    described = await connection.execute(
        "SELECT pg_get_expr(relpartbound, oid), array_to_string(reloptions, ', ') FROM pg_class "
        "WHERE oid = %s::regclass",
        [partition],
    )
    [(bound, options)] = await described.fetchall()
    found = await connection.execute(sql.SQL("SELECT FROM {} LIMIT 1").format(table))
    assert found.rowcount == 0, "what is there would be lost"
    await connection.execute(sql.SQL("DROP TABLE {}").format(table))
    await connection.execute(
        sql.SQL("CREATE TABLE {} (LIKE {} INCLUDING DEFAULTS INCLUDING STORAGE INCLUDING COMPRESSION) {}").format(
            table, PARENT, sql.SQL(f"WITH ({options})" if options else "")
        )
    )
    # Indexes and constraints come with the attachment.
    return sql.SQL("ALTER TABLE {} ATTACH PARTITION {} {}").format(PARENT, table, sql.SQL(str(bound)))


async def _list_agents(connection: psycopg.AsyncConnection[tuple[object, ...]], estate: Estate) -> None:
    """A table of them, by number, to draw from."""
    await connection.execute("CREATE TABLE benchmark_agents (number int PRIMARY KEY, org_id text, id uuid)")
    await connection.execute(
        "INSERT INTO benchmark_agents SELECT ordinality - 1, org_id, id "
        "FROM unnest(%s::text[], %s::uuid[]) WITH ORDINALITY AS agent (org_id, id, ordinality)",
        [[agent.org_id for agent in estate.agents], [agent.id for agent in estate.agents]],
    )
    await connection.execute("ANALYZE benchmark_agents")


async def _insert(dsn: str, span: Span, rows: int, agents: int, tell: Callable[[str], None]) -> None:
    """In chunks, a few at once."""
    chunks = iter(range(0, rows, CHUNK))
    done = 0
    from_ms = int(span.start.timestamp() * MILLISECOND)
    values = {
        "from_ms": from_ms,
        "span_ms": int(span.end.timestamp() * MILLISECOND) - from_ms,
        "rows": rows,
        "agents": agents,
        "instance_id": first_id_at(span.start),
    }

    async def work() -> None:
        nonlocal done
        async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
            await connection.execute("SET synchronous_commit = off")
            for first in chunks:
                last = min(first + CHUNK, rows) - 1
                statement = _FILL.format(partition=sql.Identifier(span.partition))
                await connection.execute(statement, {**values, "first": first, "last": last})
                done += last - first + 1
                tell(f"  {done:,} rows")

    async with asyncio.TaskGroup() as tasks:
        for _ in range(AT_ONCE):
            tasks.create_task(work())
