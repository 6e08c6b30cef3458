"""The ledger in PostgreSQL."""

from __future__ import annotations

from external_agents.adapters.postgres.plain.ledger import PlainPostgresLedger


class PostgresLedger(PlainPostgresLedger):
    pass
