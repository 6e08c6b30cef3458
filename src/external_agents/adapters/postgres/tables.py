"""
The tables.

Every tenant table's primary key begins with org_id, every foreign key contains it, and every statement filters by it:
tenants cannot mix, and the tables can be distributed. `api_keys` (found before the organisation is known),
`api_key_hash_keys` and `instances` are no tenant tables.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Date,
    DateTime,
    Double,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Numeric,
    Table,
    Text,
    Uuid,
    false,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY

from external_agents.adapters.postgres.columns import JSON_TEXT, JSONB_TEXT

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(referred_table_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
    }
)

_MOMENT = DateTime(timezone=True)
_FREQUENTLY_UPDATED = {"fillfactor": 50}


def _org_id() -> Column[Any]:
    return Column("org_id", Text, primary_key=True)


def _agent_key(column: str) -> ForeignKeyConstraint:
    return ForeignKeyConstraint(["org_id", column], ["external_agents.org_id", "external_agents.id"])


agents = Table(
    "external_agents",
    metadata,
    _org_id(),
    Column("id", Uuid, primary_key=True),
    Column("name", Text, nullable=False),
    Column("description", Text, nullable=False),
    Column("provider", Text, nullable=False),
    Column("webhook_url", Text, nullable=False),
    Column("auth_type", Text, nullable=False),
    Column("auth_config", JSONB_TEXT, nullable=False),
    Column("platform_config", JSONB_TEXT, nullable=False),
    Column("rate_limit_config", JSONB_TEXT),
    Column("budget_config", JSONB_TEXT),
    Column("tags", ARRAY(Text), nullable=False),
    Column("timeout_s", Double, nullable=False),
    Column("max_attempts", Integer, nullable=False),
    Column("status", Text, nullable=False),
    Column("created_by", Text, nullable=False),
    Column("updated_by", Text, nullable=False),
    Column("created_at", _MOMENT, nullable=False),
    Column("updated_at", _MOMENT, nullable=False),
    Column("version", Integer, nullable=False),
    # Case-folded by this library: what lower() and ILIKE make of `Ä` depends on the server's version and locale.
    Column("name_folded", Text, nullable=False),
    Column("description_folded", Text, nullable=False),
    Column("previous_signing_secret_until", _MOMENT),
)
"""Lists go along the primary key, backwards; their filters look at the agents of one organisation only."""

secrets = Table(
    "external_agent_secrets",
    metadata,
    _org_id(),
    Column("agent_id", Uuid, primary_key=True),
    Column("field", Text, primary_key=True),
    Column("key_id", Text, nullable=False),
    Column("envelope", LargeBinary, nullable=False),
    _agent_key("agent_id"),
    Index("ix_external_agent_secrets_key_id", "key_id", "org_id", "agent_id", "field"),
)
"""Sealed before they get here. key_id is for finding what an older key still seals, in an order to go through."""

rate_windows = Table(
    "external_agent_rate_windows",
    metadata,
    _org_id(),
    Column("agent_id", Uuid, primary_key=True),
    Column("minute_head", BigInteger, nullable=False),
    Column("minute_counts", ARRAY(Integer), nullable=False),
    Column("hour_head", BigInteger, nullable=False),
    Column("hour_counts", ARRAY(Integer), nullable=False),
    Column("day_head", BigInteger, nullable=False),
    Column("day_counts", ARRAY(Integer), nullable=False),
    _agent_key("agent_id"),
    postgresql_with=_FREQUENTLY_UPDATED,
)
"""One row an agent, made with it. Its lock is also what orders admissions and changes of the agent."""

budgets = Table(
    "external_agent_budgets",
    metadata,
    _org_id(),
    Column("agent_id", Uuid, primary_key=True),
    Column("currency", Text, primary_key=True),
    Column("month", Date, primary_key=True),
    Column("spent", Numeric, nullable=False),
    Column("reserved", Numeric, nullable=False),
    _agent_key("agent_id"),
    CheckConstraint("spent >= 0", name="spent"),
    CheckConstraint("reserved >= 0", name="reserved"),
    postgresql_with=_FREQUENTLY_UPDATED,
)

FAILURES = text("status IN ('failed', 'unknown', 'cancelled')")

invocations = Table(
    "external_agent_invocations",
    metadata,
    _org_id(),
    Column("id", Uuid, primary_key=True),
    Column("external_agent_id", Uuid, nullable=False),
    Column("lineage_hop_id", Text),
    Column("parent_invocation_id", Uuid),
    Column("initiated_by", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("request_payload", JSON_TEXT, nullable=False),
    Column("response_payload", JSON_TEXT),
    Column("response_status", Integer),
    Column("attempts", JSON_TEXT, nullable=False),
    Column("execution_time_ms", Integer),
    Column("error_code", Text),
    Column("error_message", Text),
    Column("reservation_amount", Numeric),
    Column("reservation_currency", Text),
    Column("cost_amount", Numeric),
    Column("cost_currency", Text),
    Column("cost_overrun", Boolean, nullable=False),
    Column("trace_id", Text, nullable=False),
    Column("created_at", _MOMENT, nullable=False),
    Column("completed_at", _MOMENT),
    Column("instance_id", Uuid),
    Column("ended", Boolean, primary_key=True, server_default=false()),
    # Not by organisation first: the agent's id is enough, and what is in every row is to be short.
    Index("ix_external_agent_invocations_agent", "external_agent_id", "id"),
    Index("ix_external_agent_invocations_trace", "trace_id", postgresql_using="hash"),
    # What did not succeed is rare, and looked for.
    Index("ix_external_agent_invocations_failures", "org_id", "id", postgresql_where=FAILURES),
    Index("ix_external_agent_invocations_agent_failures", "external_agent_id", "id", postgresql_where=FAILURES),
    postgresql_partition_by="RANGE (ended, id)",
)
"""
What runs lies in a partition of its own, and moves when it ends to that of its month: the months hold rows that were
written once, without dead ones between them and with one entry in each index. (A batch ends all rows of a page at once;
updated where they were, most found no room there, and a third of the table was dead.)

The id is a UUIDv7, and created_at its own millisecond. There is no foreign key: whoever writes here has read the agent,
whose row is never removed. See `partitions`.
"""

instances = Table(
    "instances",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("started_at", _MOMENT, nullable=False),
    Column("beating_since", _MOMENT, nullable=False),
    Column("lease_until", _MOMENT, nullable=False),
    Column("running_from", Uuid, nullable=False),
    postgresql_with=_FREQUENTLY_UPDATED,
)
"""
Running processes.

beating_since: since then the heartbeats came without a break. running_from: invocations with a smaller id have ended.
"""

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("org_id", Text, nullable=False),
    Column("subject", Text, nullable=False),
    Column("permissions", ARRAY(Text), nullable=False),
    Column("attributes", JSONB_TEXT, nullable=False),
    Column("hash_key_id", Text, nullable=False),
    Column("secret_hash", LargeBinary, nullable=False),
    Column("created_at", _MOMENT, nullable=False),
    Column("expires_at", _MOMENT),
    Column("revoked_at", _MOMENT),
    Column("last_used_at", _MOMENT),
    Index("ix_api_keys_org_id", "org_id", "created_at"),
    Index("ix_api_keys_hash_key_id", "hash_key_id", postgresql_where=text("revoked_at IS NULL")),
)
"""last_used_at: the first use that was noted in the last hour (UTC) that had any."""

api_key_hash_keys = Table(
    "api_key_hash_keys",
    metadata,
    Column("hash_key_id", Text, primary_key=True),
    Column("key_id", Text, nullable=False),
    Column("envelope", LargeBinary, nullable=False),
)
"""
What API keys were hashed with under secret keys that are to be retired, sealed with a later one.

A hash cannot be made anew without the API key itself; so the hashes stay, and what they were made with is sealed.
"""

idempotency_keys = Table(
    "external_agent_idempotency_keys",
    metadata,
    _org_id(),
    Column("agent_id", Uuid, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("request_hash", LargeBinary, nullable=False),
    Column("invocation_id", Uuid, nullable=False),
    Column("created_at", _MOMENT, nullable=False),
    _agent_key("agent_id"),
    Index("ix_external_agent_idempotency_keys_created_at", "created_at"),
)
"""created_at is the store's time of the admission; the primary key finds a key, the index those that have expired."""

deliveries = Table(
    "external_agent_deliveries",
    metadata,
    _org_id(),
    Column("id", Uuid, primary_key=True),
    Column("external_agent_id", Uuid, nullable=False),
    Column("invocation_id", Uuid, nullable=False),
    Column("kind", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("attempts", JSON_TEXT, nullable=False),
    Column("platform_message_id", Text),
    Column("error_message", Text),
    Column("next_attempt_at", _MOMENT),
    Column("created_at", _MOMENT, nullable=False),
    Column("completed_at", _MOMENT),
    _agent_key("external_agent_id"),
    Index("ix_external_agent_deliveries_agent", "org_id", "external_agent_id", "id"),
    Index("ix_external_agent_deliveries_invocation", "org_id", "invocation_id"),
)
"""Room for deliveries; nothing is written here yet."""

approvals = Table(
    "external_agent_approvals",
    metadata,
    _org_id(),
    Column("id", Uuid, primary_key=True),
    Column("external_agent_id", Uuid, nullable=False),
    Column("invocation_id", Uuid),
    Column("status", Text, nullable=False),
    Column("requested_by", Text, nullable=False),
    Column("decided_by", Text),
    Column("reason", Text),
    Column("created_at", _MOMENT, nullable=False),
    Column("decided_at", _MOMENT),
    _agent_key("external_agent_id"),
    Index("ix_external_agent_approvals_agent", "org_id", "external_agent_id", "id"),
)
"""Room for approvals; nothing is written here yet."""
