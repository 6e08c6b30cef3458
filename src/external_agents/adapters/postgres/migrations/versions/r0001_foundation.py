"""Foundation."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql as pg

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

MOMENT = sa.DateTime(timezone=True)
FREQUENTLY_UPDATED = {"fillfactor": 50}


def upgrade() -> None:
    _agents()
    _limits()
    _invocations()
    _processes_and_keys()
    _room_for_governance()


def downgrade() -> None:
    for table in (
        "external_agent_approvals",
        "external_agent_deliveries",
        "external_agent_idempotency_keys",
        "api_keys",
        "instances",
        "external_agent_invocations",
        "external_agent_budgets",
        "external_agent_rate_windows",
        "external_agent_secrets",
        "external_agents",
    ):
        op.drop_table(table)


def _org_id() -> sa.Column[str]:
    return sa.Column("org_id", sa.Text, nullable=False)


def _key(table: str, *columns: str) -> sa.PrimaryKeyConstraint:
    return sa.PrimaryKeyConstraint(*columns, name=f"pk_{table}")


def _of_agent(table: str, column: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(
        ["org_id", column], ["external_agents.org_id", "external_agents.id"], name=f"fk_{table}_external_agents"
    )


def _agents() -> None:
    op.create_table(
        "external_agents",
        _org_id(),
        sa.Column("id", sa.Uuid, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("description", sa.Text, nullable=False),
        sa.Column("provider", sa.Text, nullable=False),
        sa.Column("webhook_url", sa.Text, nullable=False),
        sa.Column("auth_type", sa.Text, nullable=False),
        sa.Column("auth_config", pg.JSONB, nullable=False),
        sa.Column("platform_config", pg.JSONB, nullable=False),
        sa.Column("rate_limit_config", pg.JSONB),
        sa.Column("budget_config", pg.JSONB),
        sa.Column("tags", sa.ARRAY(sa.Text), nullable=False),
        sa.Column("timeout_s", sa.Double, nullable=False),
        sa.Column("max_attempts", sa.Integer, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("created_by", sa.Text, nullable=False),
        sa.Column("updated_by", sa.Text, nullable=False),
        sa.Column("created_at", MOMENT, nullable=False),
        sa.Column("updated_at", MOMENT, nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("name_folded", sa.Text, nullable=False),
        sa.Column("description_folded", sa.Text, nullable=False),
        _key("external_agents", "org_id", "id"),
    )
    op.create_table(
        "external_agent_secrets",
        _org_id(),
        sa.Column("agent_id", sa.Uuid, nullable=False),
        sa.Column("field", sa.Text, nullable=False),
        sa.Column("key_id", sa.Text, nullable=False),
        sa.Column("envelope", sa.LargeBinary, nullable=False),
        _key("external_agent_secrets", "org_id", "agent_id", "field"),
        _of_agent("external_agent_secrets", "agent_id"),
    )
    op.create_index("ix_external_agent_secrets_key_id", "external_agent_secrets", ["key_id"])


def _limits() -> None:
    op.create_table(
        "external_agent_rate_windows",
        _org_id(),
        sa.Column("agent_id", sa.Uuid, nullable=False),
        sa.Column("minute_head", sa.BigInteger, nullable=False),
        sa.Column("minute_counts", sa.ARRAY(sa.Integer), nullable=False),
        sa.Column("hour_head", sa.BigInteger, nullable=False),
        sa.Column("hour_counts", sa.ARRAY(sa.Integer), nullable=False),
        sa.Column("day_head", sa.BigInteger, nullable=False),
        sa.Column("day_counts", sa.ARRAY(sa.Integer), nullable=False),
        _key("external_agent_rate_windows", "org_id", "agent_id"),
        _of_agent("external_agent_rate_windows", "agent_id"),
        postgresql_with=FREQUENTLY_UPDATED,
    )
    op.create_table(
        "external_agent_budgets",
        _org_id(),
        sa.Column("agent_id", sa.Uuid, nullable=False),
        sa.Column("currency", sa.Text, nullable=False),
        sa.Column("month", sa.Date, nullable=False),
        sa.Column("spent", sa.Numeric, nullable=False),
        sa.Column("reserved", sa.Numeric, nullable=False),
        _key("external_agent_budgets", "org_id", "agent_id", "currency", "month"),
        _of_agent("external_agent_budgets", "agent_id"),
        sa.CheckConstraint("spent >= 0", name=op.f("ck_external_agent_budgets_spent")),
        sa.CheckConstraint("reserved >= 0", name=op.f("ck_external_agent_budgets_reserved")),
        postgresql_with=FREQUENTLY_UPDATED,
    )


def _invocations() -> None:
    table = "external_agent_invocations"
    op.create_table(
        table,
        _org_id(),
        sa.Column("id", sa.Uuid, nullable=False),
        sa.Column("external_agent_id", sa.Uuid, nullable=False),
        sa.Column("lineage_hop_id", sa.Text),
        sa.Column("parent_invocation_id", sa.Uuid),
        sa.Column("initiated_by", sa.Text, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("request_payload", pg.JSON, nullable=False),
        sa.Column("response_payload", pg.JSON),
        sa.Column("response_status", sa.Integer),
        sa.Column("attempts", pg.JSON, nullable=False),
        sa.Column("execution_time_ms", sa.Integer),
        sa.Column("error_code", sa.Text),
        sa.Column("error_message", sa.Text),
        sa.Column("reservation_amount", sa.Numeric),
        sa.Column("reservation_currency", sa.Text),
        sa.Column("cost_amount", sa.Numeric),
        sa.Column("cost_currency", sa.Text),
        sa.Column("cost_overrun", sa.Boolean, nullable=False),
        sa.Column("trace_id", sa.Text, nullable=False),
        sa.Column("created_at", MOMENT, nullable=False),
        sa.Column("completed_at", MOMENT),
        sa.Column("instance_id", sa.Uuid),
        _key(table, "org_id", "id"),
        _of_agent(table, "external_agent_id"),
        postgresql_partition_by="RANGE (id)",
    )
    op.create_index(f"ix_{table}_agent", table, ["org_id", "external_agent_id", "id"])
    op.create_index(f"ix_{table}_trace", table, ["org_id", "trace_id"])
    op.create_index(f"ix_{table}_instance", table, ["instance_id", "id"])
    op.execute(f"CREATE TABLE {table}_default PARTITION OF {table} DEFAULT")


def _processes_and_keys() -> None:
    op.create_table(
        "instances",
        sa.Column("id", sa.Uuid, nullable=False),
        sa.Column("started_at", MOMENT, nullable=False),
        sa.Column("beating_since", MOMENT, nullable=False),
        sa.Column("lease_until", MOMENT, nullable=False),
        sa.Column("running_from", sa.Uuid, nullable=False),
        _key("instances", "id"),
        postgresql_with=FREQUENTLY_UPDATED,
    )
    op.create_table(
        "api_keys",
        sa.Column("id", sa.Uuid, nullable=False),
        sa.Column("org_id", sa.Text, nullable=False),
        sa.Column("subject", sa.Text, nullable=False),
        sa.Column("permissions", sa.ARRAY(sa.Text), nullable=False),
        sa.Column("attributes", pg.JSONB, nullable=False),
        sa.Column("hash_key_id", sa.Text, nullable=False),
        sa.Column("secret_hash", sa.LargeBinary, nullable=False),
        sa.Column("created_at", MOMENT, nullable=False),
        sa.Column("expires_at", MOMENT),
        sa.Column("revoked_at", MOMENT),
        _key("api_keys", "id"),
    )
    op.create_index("ix_api_keys_org_id", "api_keys", ["org_id", "created_at"])


def _room_for_governance() -> None:
    table = "external_agent_idempotency_keys"
    op.create_table(
        table,
        _org_id(),
        sa.Column("agent_id", sa.Uuid, nullable=False),
        sa.Column("key", sa.Text, nullable=False),
        sa.Column("request_hash", sa.LargeBinary, nullable=False),
        sa.Column("invocation_id", sa.Uuid, nullable=False),
        sa.Column("created_at", MOMENT, nullable=False),
        _key(table, "org_id", "agent_id", "key"),
        _of_agent(table, "agent_id"),
    )
    op.create_index(f"ix_{table}_created_at", table, ["created_at"])
    table = "external_agent_deliveries"
    op.create_table(
        table,
        _org_id(),
        sa.Column("id", sa.Uuid, nullable=False),
        sa.Column("external_agent_id", sa.Uuid, nullable=False),
        sa.Column("invocation_id", sa.Uuid, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("attempts", pg.JSON, nullable=False),
        sa.Column("platform_message_id", sa.Text),
        sa.Column("error_message", sa.Text),
        sa.Column("next_attempt_at", MOMENT),
        sa.Column("created_at", MOMENT, nullable=False),
        sa.Column("completed_at", MOMENT),
        _key(table, "org_id", "id"),
        _of_agent(table, "external_agent_id"),
    )
    op.create_index(f"ix_{table}_agent", table, ["org_id", "external_agent_id", "id"])
    op.create_index(f"ix_{table}_invocation", table, ["org_id", "invocation_id"])
    table = "external_agent_approvals"
    op.create_table(
        table,
        _org_id(),
        sa.Column("id", sa.Uuid, nullable=False),
        sa.Column("external_agent_id", sa.Uuid, nullable=False),
        sa.Column("invocation_id", sa.Uuid),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("requested_by", sa.Text, nullable=False),
        sa.Column("decided_by", sa.Text),
        sa.Column("reason", sa.Text),
        sa.Column("created_at", MOMENT, nullable=False),
        sa.Column("decided_at", MOMENT),
        _key(table, "org_id", "id"),
        _of_agent(table, "external_agent_id"),
    )
    op.create_index(f"ix_{table}_agent", table, ["org_id", "external_agent_id", "id"])
