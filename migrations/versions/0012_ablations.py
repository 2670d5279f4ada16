"""ablations: assignments that ask what a client's personal part is worth, and their answers"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

ABLATE = sa.text("kind = 'ablate'")


def upgrade() -> None:
    """Apply the change."""
    _kinds("'train', 'evaluate', 'ablate'")
    columns = ["version_id", "client_id", "attempt"]
    op.create_index("uq_assignments_ablation", "assignments", columns, unique=True, postgresql_where=ABLATE)
    op.create_table(
        "ablations",
        sa.Column("assignment_id", sa.Uuid(), nullable=False),
        sa.Column("project_id", sa.Uuid(), nullable=False),
        sa.Column("run_id", sa.Uuid(), nullable=False),
        sa.Column("client_id", sa.Uuid(), nullable=False),
        sa.Column("version_id", sa.Uuid(), nullable=False),
        sa.Column("report", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["assignment_id"], ["assignments.id"], name=op.f("fk_ablations_assignment_id")),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_ablations_project_id")),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name=op.f("fk_ablations_run_id")),
        sa.ForeignKeyConstraint(["client_id"], ["clients.id"], name=op.f("fk_ablations_client_id")),
        sa.ForeignKeyConstraint(["version_id"], ["versions.id"], name=op.f("fk_ablations_version_id")),
        sa.PrimaryKeyConstraint("assignment_id", name=op.f("pk_ablations")),
    )
    op.create_index("ix_ablations_client", "ablations", ["run_id", "client_id"])


def downgrade() -> None:
    """Take it back: ablations and their assignments go."""
    op.drop_index("ix_ablations_client", "ablations")
    op.drop_table("ablations")
    op.drop_index("uq_assignments_ablation", "assignments", postgresql_where=ABLATE)
    op.execute("DELETE FROM assignments WHERE kind = 'ablate'")
    _kinds("'train', 'evaluate'")


def _kinds(known: str) -> None:
    name = op.f("ck_assignments_kind_known")
    op.drop_constraint(name, "assignments", type_="check")
    op.create_check_constraint(name, "assignments", f"kind IN ({known})")
