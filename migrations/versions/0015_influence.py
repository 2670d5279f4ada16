"""bounded influence: how far an update moves its base, its sketch, and since when strikes count

Revision ID: 0015
Revises: 0014
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Bring the schema forward."""
    op.add_column("updates", sa.Column("change_norm", sa.Double(), nullable=True))
    op.add_column("updates", sa.Column("sketch", sa.LargeBinary(), nullable=True))
    op.add_column("clients", sa.Column("forgiven_at", sa.DateTime(timezone=True), nullable=True))


def downgrade() -> None:
    """Take the change back."""
    op.drop_column("clients", "forgiven_at")
    op.drop_column("updates", "sketch")
    op.drop_column("updates", "change_norm")
