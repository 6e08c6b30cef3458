"""Keys."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

SECRETS = "external_agent_secrets"


def upgrade() -> None:
    op.add_column("api_keys", sa.Column("last_used_at", sa.DateTime(timezone=True)))
    in_force = sa.text("revoked_at IS NULL")
    op.create_index("ix_api_keys_hash_key_id", "api_keys", ["hash_key_id"], postgresql_where=in_force)
    op.create_table(
        "api_key_hash_keys",
        sa.Column("hash_key_id", sa.Text, nullable=False),
        sa.Column("key_id", sa.Text, nullable=False),
        sa.Column("envelope", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("hash_key_id", name="pk_api_key_hash_keys"),
    )
    _index_secrets("key_id", "org_id", "agent_id", "field")


def downgrade() -> None:
    _index_secrets("key_id")
    op.drop_table("api_key_hash_keys")
    op.drop_index("ix_api_keys_hash_key_id", "api_keys")
    op.drop_column("api_keys", "last_used_at")


def _index_secrets(*columns: str) -> None:
    op.drop_index(f"ix_{SECRETS}_key_id", SECRETS)
    op.create_index(f"ix_{SECRETS}_key_id", SECRETS, list(columns))
