"""What many rows cost: a call's speed over ten million of them, reading among them, and the bytes of one."""

from __future__ import annotations

import asyncio
import base64
import random
from collections.abc import Mapping, Sequence
from datetime import datetime
from uuid import UUID

import attrs
import psycopg
from psycopg import sql

from benchmarks.cases.throughput import AGENTS_EACH, CONNECTIONS, ORGS, ratio
from benchmarks.estate import Estate, KnownAgent
from benchmarks.filling import Span, fill, require_room
from benchmarks.judging import Bound, Finding, Outcome, percentile
from benchmarks.workbench import Site, Variant, Workbench, dsn_of, interleaved, outcome, request_text
from external_agents.domain.ids import first_id_at

API = "/api/external-agents"
READERS = 2
READS = 400
READS_BEFORE = 40
READ_BOUND = Bound(floor=20, aim=10, at_most=True)
SIZED_ROWS = 20_000


def full_table(bench: Workbench) -> Outcome:
    """Ten million rows (`--rows`) in the table: the hot case over an empty one, and the time of lists and gets."""
    require_room(bench.folder, bench.plan.rows)
    with bench.site() as empty_site, bench.site(orgs=ORGS, agents_each=AGENTS_EACH) as site:
        since = asyncio.run(fill(dsn_of(site.url), site.estate, bench.plan.rows, bench.tell))
        hot_site = attrs.evolve(site, estate=Estate(site.estate.agents[:1]), since=since)
        with bench.ours(empty_site) as empty, bench.ours(hot_site) as full:
            empty.name, full.name = "empty table", "full table"
            interleaved(bench, full, empty, connections=CONNECTIONS)
            bench.profile(full, connections=CONNECTIONS)
            bound = Bound(floor=0.90, aim=0.95)
            what = f"{bench.plan.rows:,} rows in the table"
            findings = [ratio("rows", f"{what}, hot case over an empty one", full.rounds, empty.rounds, bound)]
            for kind, requests in _reads(site).items():
                findings.append(_read(full, f"{what}, p99 of {kind}", requests))
            return outcome(findings, full, empty)


def row_size(bench: Workbench) -> Outcome:
    """The bytes of one invocation with a payload and an answer of 200 bytes, indexes included."""
    rows = min(SIZED_ROWS, bench.plan.rows)
    with bench.site() as site, bench.ours(site) as ours:
        ours.round(connections=CONNECTIONS, count=rows)
        as_it_stands, vacuumed_by_itself = _bytes_a_row(site)
        with psycopg.connect(dsn_of(site.url), autocommit=True) as connection:
            connection.execute("VACUUM (ANALYZE) external_agent_invocations")
        after_vacuum, _ = _bytes_a_row(site)
        if vacuumed_by_itself:
            judged, when = as_it_stands, "as it stands, autovacuum has been there"
            other = f"after another VACUUM {sum(after_vacuum.values()):,.0f} B"
        else:
            judged, when = after_vacuum, "after a VACUUM, since autovacuum had no time to come"
            other = f"as it stood {sum(as_it_stands.values()):,.0f} B"
        parts = ", ".join(f"{name} {size:,.0f}" for name, size in judged.items())
        note = f"{when}; {other}. Of it {parts}. Partitions without rows take {_bytes_without_rows(site):,} B beside."
        finding = Finding(
            case="size",
            what="one invocation, payload and answer of 200 bytes",
            ours=f"{rows:,} rows",
            figure=sum(judged.values()),
            unit="B",
            bound=Bound(floor=1_000, aim=800, at_most=True),
            note=note,
        )
        return outcome([finding], ours)


def _read(variant: Variant, what: str, requests: Sequence[str]) -> Finding:
    """So many reads, or as many as fit into a round."""
    for count in (READS_BEFORE, READS):
        seconds = variant.bench.plan.seconds
        running = variant.begin(connections=READERS, requests=requests, count=count, seconds=seconds)
        done = variant.take(running, invokes=False)
    p50, p99 = (percentile(done.latencies_ms, per_cent) for per_cent in (50, 99))
    variant.bench.tell(f"  {what}: p50 {p50:.1f} ms, p99 {p99:.1f} ms")
    return Finding(case="rows", what=what, ours=f"p50 {p50:.1f} ms", figure=p99, unit="ms", bound=READ_BOUND)


def _reads(site: Site) -> Mapping[str, Sequence[str]]:
    """Requests of each kind, over many organisations and agents."""
    draw = random.Random(1)
    span = Span.this_month()
    agents = draw.sample(list(site.estate.agents), min(100, len(site.estate.agents)))
    deep, later = span.moment(0.3), span.moment(0.31)
    day = f"since={_told(deep)}&until={_told(later)}"
    return {
        "the newest": [_get(agent, "/invocations?limit=20") for agent in agents],
        "100 of the newest": [_get(agent, "/invocations?limit=100") for agent in agents],
        "the failed (3 %)": [_get(agent, "/invocations?status=failed") for agent in agents],
        "the unknown (0.1 %)": [_get(agent, "/invocations?status=unknown") for agent in agents],
        "the running (none)": [_get(agent, "/invocations?status=running") for agent in agents],
        "one agent's": [_get(agent, f"/{agent.id}/invocations") for agent in agents],
        "one agent's failed": [_get(agent, f"/{agent.id}/invocations?status=failed") for agent in agents],
        "a page deep in": [_get(agent, f"/invocations?cursor={_cursor(first_id_at(deep))}") for agent in agents],
        "a stretch of time": [_get(agent, f"/invocations?{day}") for agent in agents],
        "getting one": [
            _get(agent, f"/{agent.id}/invocations/{invocation_id}") for agent, invocation_id in _some(site, agents)
        ],
    }


def _some(site: Site, agents: Sequence[KnownAgent]) -> list[tuple[KnownAgent, UUID]]:
    """For each agent an invocation of long ago."""
    statement = """
        SELECT id FROM external_agent_invocations WHERE org_id = %s AND external_agent_id = %s
        ORDER BY id LIMIT 1
    """
    with psycopg.connect(dsn_of(site.url)) as connection:
        found = [(agent, connection.execute(statement, [agent.org_id, agent.id]).fetchone()) for agent in agents]
    return [(agent, row[0]) for agent, row in found if row is not None]


def _get(agent: KnownAgent, path: str) -> str:
    return request_text("GET", API + path, agent.key)


def _cursor(invocation_id: UUID) -> str:
    return base64.urlsafe_b64encode(invocation_id.bytes).rstrip(b"=").decode("ascii")


def _told(moment: datetime) -> str:
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _bytes_a_row(site: Site) -> tuple[dict[str, float], bool]:
    """By what takes them, for the partitions that have rows; and whether autovacuum has been at all of them."""
    sizes: dict[str, float] = {}
    vacuumed = True
    with psycopg.connect(dsn_of(site.url), autocommit=True) as connection:
        partitions = connection.execute(
            "SELECT tableoid::regclass::text, count(*) FROM external_agent_invocations GROUP BY 1"
        ).fetchall()
        rows = sum(count for _, count in partitions)
        for partition, _ in partitions:
            for name, size in connection.execute(_SIZES, {"partition": partition}).fetchall():
                sizes[name] = sizes.get(name, 0) + size / rows
            [count] = connection.execute(
                sql.SQL("SELECT autovacuum_count FROM pg_stat_all_tables WHERE relid = %s::regclass"), [partition]
            ).fetchone() or [0]
            vacuumed = vacuumed and bool(count)
    return sizes, vacuumed


def _bytes_without_rows(site: Site) -> int:
    """Of partitions that have none now: next months', and what invocations pass through while they run."""
    with psycopg.connect(dsn_of(site.url)) as connection:
        total = connection.execute(_EMPTY_SIZE).fetchone()
    assert total is not None
    return int(total[0])


_EMPTY_SIZE = """
    SELECT coalesce(sum(pg_total_relation_size(relid)), 0) FROM pg_partition_tree('external_agent_invocations')
    WHERE isleaf AND relid NOT IN (SELECT tableoid FROM external_agent_invocations)
"""
_SIZES = """
    SELECT 'table' AS name, pg_table_size(%(partition)s::regclass) AS size
    UNION ALL
    SELECT 'index ' || (
        SELECT string_agg(attname, '+' ORDER BY attnum) FROM pg_attribute WHERE attrelid = indexrelid
    ), pg_total_relation_size(indexrelid) FROM pg_index
    WHERE indrelid = %(partition)s::regclass
"""
