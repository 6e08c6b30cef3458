"""Group commit."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

TABLE = "external_agent_invocations"


def upgrade() -> None:
    # A partitioned table cannot be given another key: its rows are moved into a new one.
    op.rename_table(TABLE, "former")
    _drop_names("former")
    op.execute(
        f"CREATE TABLE {TABLE} (LIKE former, ended boolean NOT NULL DEFAULT false) PARTITION BY RANGE (ended, id)"
    )
    op.create_primary_key(f"pk_{TABLE}", TABLE, ["org_id", "id", "ended"])
    op.create_index(f"ix_{TABLE}_agent", TABLE, ["external_agent_id", "id"])
    op.create_index(f"ix_{TABLE}_trace", TABLE, ["trace_id"], postgresql_using="hash")
    failures = sa.text("status IN ('failed', 'unknown', 'cancelled')")
    op.create_index(f"ix_{TABLE}_failures", TABLE, ["org_id", "id"], postgresql_where=failures)
    op.create_index(f"ix_{TABLE}_agent_failures", TABLE, ["external_agent_id", "id"], postgresql_where=failures)
    op.execute(
        # Its rows live for as long as agents take: most of it is dead at any time.
        f"CREATE TABLE {TABLE}_running PARTITION OF {TABLE} FOR VALUES FROM (false, MINVALUE) TO (true, MINVALUE)"
        " WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 20000,"
        " autovacuum_vacuum_cost_delay = 0)"
    )
    _move("former", "true, ", "*, status NOT IN ('pending', 'running')")
    _change_counts("{0} || (SELECT sum(n)::integer FROM unnest({0}) AS n)")
    op.execute(_functions())


def downgrade() -> None:
    op.execute("DROP FUNCTION external_agents_commit")
    op.execute("DROP FUNCTION external_agents_advanced")
    _change_counts("trim_array({0}, 1)")
    op.rename_table(TABLE, "former")
    _drop_names("former")
    op.execute(f"CREATE TABLE {TABLE} (LIKE former) PARTITION BY RANGE (id)")
    op.drop_column(TABLE, "ended")
    op.create_primary_key(f"pk_{TABLE}", TABLE, ["org_id", "id"])
    op.create_foreign_key(
        f"fk_{TABLE}_external_agents", TABLE, "external_agents", ["org_id", "external_agent_id"], ["org_id", "id"]
    )
    op.create_index(f"ix_{TABLE}_agent", TABLE, ["org_id", "external_agent_id", "id"])
    op.create_index(f"ix_{TABLE}_trace", TABLE, ["org_id", "trace_id"])
    op.create_index(f"ix_{TABLE}_instance", TABLE, ["instance_id", "id"])
    columns = [column["name"] for column in sa.inspect(op.get_bind()).get_columns(TABLE)]
    _move("former", "", ", ".join(columns))


def _drop_names(table: str) -> None:
    """The new table's indexes and partitions take them."""
    op.drop_constraint(f"pk_{TABLE}", table)
    for index in sa.inspect(op.get_bind()).get_indexes(table):
        op.drop_index(str(index["name"]), table)
    partitions = (
        "SELECT relname FROM pg_inherits JOIN pg_class ON oid = inhrelid WHERE inhparent = CAST(:t AS regclass)"
    )
    for name in op.get_bind().scalars(sa.text(partitions), {"t": table}):
        op.rename_table(name, name.replace(TABLE, "former"))


def _move(former: str, prefix: str, columns: str) -> None:
    """Every month's partition again, and a default one; `prefix`: what stands before the id in the key."""
    bounds = sa.text(
        "SELECT relname, (regexp_matches(pg_get_expr(relpartbound, oid), '[0-9a-f-]{36}', 'g'))[1]"
        " FROM pg_inherits JOIN pg_class ON oid = inhrelid WHERE inhparent = CAST(:t AS regclass)"
    )
    ids: dict[str, list[str]] = {}
    for name, bound in op.get_bind().execute(bounds, {"t": former}):
        ids.setdefault(name.replace("former", TABLE), []).append(bound)
    op.execute(f"CREATE TABLE {TABLE}_default PARTITION OF {TABLE} DEFAULT")
    for name, (first, end) in ids.items():
        op.execute(f"CREATE TABLE {name} PARTITION OF {TABLE} FOR VALUES FROM ({prefix}'{first}') TO ({prefix}'{end}')")
    op.execute(f"INSERT INTO {TABLE} SELECT {columns} FROM {former}")  # noqa: S608
    op.drop_table(former)


def _change_counts(expression: str) -> None:
    """Of every window of every agent; their sum stands behind them here."""
    names = [f"{window}_counts" for window in ("minute", "hour", "day")]
    changes = ", ".join(f"{name} = {expression.format(name)}" for name in names)
    op.execute(f"UPDATE external_agent_rate_windows SET {changes}")  # noqa: S608


def _functions() -> sa.TextClause:
    return sa.text(Path(__file__).with_suffix(".sql").read_text("utf-8").replace(":", "\\:"))
