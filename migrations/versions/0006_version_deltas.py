"""versions: the encoding of what they add to the version before, and the file that holds it

Revision ID: 0006
Revises: 0005
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Bring the schema forward."""
    op.add_column(
        "versions", sa.Column("encoding", sa.Text(), server_default="f32", nullable=False)
    )
    op.add_column("versions", sa.Column("delta_key", sa.Text(), nullable=True))
    op.add_column("versions", sa.Column("delta_sha256", sa.Text(), nullable=True))
    op.add_column("versions", sa.Column("delta_size", sa.BigInteger(), nullable=True))
    op.create_index(op.f("ix_versions_delta_key"), "versions", ["delta_key"], unique=False)
    op.create_foreign_key(
        op.f("fk_versions_delta_key_objects"), "versions", "objects", ["delta_key"], ["key"]
    )
    op.create_check_constraint(
        op.f("ck_versions_delta_whole"),
        "versions",
        "(delta_key IS NULL) = (delta_sha256 IS NULL) AND"
        " (delta_key IS NULL) = (delta_size IS NULL)",
    )


def downgrade() -> None:
    """Take the change back."""
    op.drop_constraint(op.f("ck_versions_delta_whole"), "versions", type_="check")
    op.drop_constraint(op.f("fk_versions_delta_key_objects"), "versions", type_="foreignkey")
    op.drop_index(op.f("ix_versions_delta_key"), table_name="versions")
    for column in ("delta_size", "delta_sha256", "delta_key", "encoding"):
        op.drop_column("versions", column)
