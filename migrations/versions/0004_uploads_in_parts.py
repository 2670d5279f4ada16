"""Uploads in parts, and counters of what a client uploads.

Revision ID: 0004
Revises: 0003
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Bring the schema forward."""
    op.add_column("uploads", sa.Column("part_size", sa.BigInteger(), nullable=True))
    op.add_column("uploads", sa.Column("parts", postgresql.ARRAY(sa.Text()), nullable=True))
    op.add_column("uploads", sa.Column("multipart_id", sa.Text(), nullable=True))
    op.create_index(op.f("ix_uploads_multipart_id"), "uploads", ["multipart_id"], unique=False)
    for window, counter in (("minute", "minute_calls"), ("day", "day_bytes")):
        op.add_column("clients", sa.Column(window, sa.DateTime(timezone=True), nullable=True))
        op.add_column(
            "clients", sa.Column(counter, sa.BigInteger(), server_default="0", nullable=False)
        )


def downgrade() -> None:
    """Take the change back."""
    for column in ("day_bytes", "day", "minute_calls", "minute"):
        op.drop_column("clients", column)
    op.drop_index(op.f("ix_uploads_multipart_id"), table_name="uploads")
    for column in ("multipart_id", "parts", "part_size"):
        op.drop_column("uploads", column)
