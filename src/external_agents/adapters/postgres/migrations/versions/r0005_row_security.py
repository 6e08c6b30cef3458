"""Row security."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

TABLES = (
    "external_agents",
    "external_agent_secrets",
    "external_agent_rate_windows",
    "external_agent_budgets",
    "external_agent_invocations",
    "external_agent_idempotency_keys",
    "external_agent_deliveries",
    "external_agent_approvals",
    "api_keys",
)
PARTITIONED = "external_agent_invocations"
POLICY = "of_these_organisations"
# The same as org_id = ANY (string_to_array(…, ',')), since no id has a comma. But it is asked of row after row, and
# taking the list apart each time costs the server, with 50 organisations in a batch, three times as much more.
IS_NAMED = "strpos(',' || current_setting('app.org_ids', true) || ',', ',' || org_id || ',') > 0"
FUNCTIONS = (
    "api_keys",
    "note_uses",
    "needed_keys",
    "running_organisations",
    "forget_instance",
    "clear_idempotency_keys",
    "add_partition",
)

LOCK_WAIT = "    PERFORM set_config('lock_timeout', lock_wait, true);\n"
CONFINED = """\
    IF row_security_active('external_agents'::regclass) THEN
        -- Of this transaction, and exactly those that the batch is about.
        PERFORM set_config(
            'app.org_ids', array_to_string(ARRAY(SELECT DISTINCT unnest(s_org_id || g_org_id)), ','), true
        );
    END IF;
"""


def upgrade() -> None:
    for table in TABLES:
        # Not FORCE: what the owner does is about all organisations, such as a migration, which would change nothing.
        op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
        op.execute(f"CREATE POLICY {POLICY} ON {table} USING ({IS_NAMED})")
    for partition in _partitions():
        # Without a policy: by their own names nobody but the owner reads them, whatever is granted on them.
        op.execute(f"ALTER TABLE {partition} ENABLE ROW LEVEL SECURITY")
    op.execute(_functions())
    _change_commit(LOCK_WAIT, LOCK_WAIT + CONFINED)


def downgrade() -> None:
    _change_commit(LOCK_WAIT + CONFINED, LOCK_WAIT)
    for function in FUNCTIONS:
        op.execute(f"DROP FUNCTION external_agents_{function}")
    for partition in _partitions():
        op.execute(f"ALTER TABLE {partition} DISABLE ROW LEVEL SECURITY")
    for table in TABLES:
        op.execute(f"DROP POLICY {POLICY} ON {table}")
        op.execute(f"ALTER TABLE {table} DISABLE ROW LEVEL SECURITY")


def _partitions() -> list[str]:
    found = "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = CAST(:parent AS regclass)"
    return list(op.get_bind().scalars(sa.text(found), {"parent": PARTITIONED}))


def _functions() -> sa.TextClause:
    schema = op.get_bind().scalar(sa.text("SELECT quote_ident(current_schema())"))
    return _as_is(Path(__file__).with_suffix(".sql").read_text("utf-8").replace("SCHEMA,", f"{schema},"))


def _change_commit(former: str, new: str) -> None:
    """In the function as it is, so that other migrations may change other parts of it."""
    definition = op.get_bind().scalar(sa.text("SELECT pg_get_functiondef('external_agents_commit'::regproc)"))
    assert definition is not None
    assert definition.count(former) == 1, "external_agents_commit is not as this migration knows it"
    op.execute(_as_is(definition.replace(former, new)))


def _as_is(statements: str) -> sa.TextClause:
    return sa.text(statements.replace(":", "\\:"))
