"""Run by alembic. `schema` gives the connection; there is no offline mode and no ini file."""

from __future__ import annotations

from alembic import context

from external_agents.adapters.postgres.schema import MIGRATION_OPTIONS
from external_agents.adapters.postgres.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    transaction_per_migration=True,
    **MIGRATION_OPTIONS,
)
with context.begin_transaction():
    context.run_migrations()
