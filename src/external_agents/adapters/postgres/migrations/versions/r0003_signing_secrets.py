"""Signing secrets."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("external_agents", sa.Column("previous_signing_secret_until", sa.DateTime(timezone=True)))


def downgrade() -> None:
    # Without the column nothing would end the time of a previous secret when the schema comes again.
    op.execute("DELETE FROM external_agent_secrets WHERE field IN ('signing_secret', 'signing_secret.previous')")
    op.drop_column("external_agents", "previous_signing_secret_until")
