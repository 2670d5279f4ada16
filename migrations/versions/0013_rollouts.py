"""rollouts: cohorts, channels, rollouts, and evaluations that belong to one"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None

EVALUATION, IN_ROLLOUT = "uq_assignments_evaluation", "uq_assignments_rollout"
OF_RUN = sa.text("kind = 'evaluate' AND rollout_id IS NULL")
ACTIVE = sa.text("state IN ('held', 'passed', 'running')")
STATES = "'running', 'passed', 'held', 'promoted', 'rolled_back'"


def upgrade() -> None:
    """Apply the change."""
    _cohorts_and_channels()
    _rollouts()
    for table, column, other in (
        ("runs", "cohort_id", "cohorts"),
        ("assignments", "rollout_id", "rollouts"),
        ("evaluations", "rollout_id", "rollouts"),
    ):
        op.add_column(table, sa.Column(column, sa.Uuid(), nullable=True))
        op.create_foreign_key(op.f(f"fk_{table}_{column}"), table, other, [column], ["id"])
    op.drop_index(EVALUATION, "assignments")
    columns = ["version_id", "client_id"]
    op.create_index(EVALUATION, "assignments", columns, unique=True, postgresql_where=OF_RUN)
    op.create_index(
        IN_ROLLOUT,
        "assignments",
        ["rollout_id", "client_id", "attempt"],
        unique=True,
        postgresql_where=sa.text("rollout_id IS NOT NULL"),
    )


def _cohorts_and_channels() -> None:
    op.create_table(
        "cohorts",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("project_id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("rule", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("salt", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_cohorts_project_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_cohorts")),
        sa.UniqueConstraint("project_id", "name", name=op.f("uq_cohorts_project_id_name")),
    )
    op.create_table(
        "channels",
        sa.Column("model_id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("project_id", sa.Uuid(), nullable=False),
        sa.Column("version_id", sa.Uuid(), nullable=False),
        sa.Column("previous_id", sa.Uuid(), nullable=True),
        sa.Column("cohort_id", sa.Uuid(), nullable=True),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("moved_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("name IN ('stable', 'pilot')", name=op.f("ck_channels_name_known")),
        sa.ForeignKeyConstraint(["model_id"], ["models.id"], name=op.f("fk_channels_model_id")),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_channels_project_id")),
        sa.ForeignKeyConstraint(["version_id"], ["versions.id"], name=op.f("fk_channels_version_id")),
        sa.ForeignKeyConstraint(["previous_id"], ["versions.id"], name=op.f("fk_channels_previous_id")),
        sa.ForeignKeyConstraint(["cohort_id"], ["cohorts.id"], name=op.f("fk_channels_cohort_id")),
        sa.PrimaryKeyConstraint("model_id", "name", name=op.f("pk_channels")),
    )
    op.create_index(op.f("ix_channels_project_id"), "channels", ["project_id"])


def _rollouts() -> None:
    op.create_table(
        "rollouts",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("project_id", sa.Uuid(), nullable=False),
        sa.Column("model_id", sa.Uuid(), nullable=False),
        sa.Column("channel", sa.Text(), nullable=False),
        sa.Column("version_id", sa.Uuid(), nullable=False),
        sa.Column("old_version_id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("settings", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("stage", sa.BigInteger(), nullable=False),
        sa.Column("stage_ends", sa.DateTime(timezone=True), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint(f"state IN ({STATES})", name=op.f("ck_rollouts_state_known")),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_rollouts_project_id")),
        sa.ForeignKeyConstraint(["model_id"], ["models.id"], name=op.f("fk_rollouts_model_id")),
        sa.ForeignKeyConstraint(["version_id"], ["versions.id"], name=op.f("fk_rollouts_version_id")),
        sa.ForeignKeyConstraint(["old_version_id"], ["versions.id"], name=op.f("fk_rollouts_old_version_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_rollouts")),
        sa.UniqueConstraint("project_id", "name", name=op.f("uq_rollouts_project_id_name")),
    )
    op.create_index("uq_rollouts_active", "rollouts", ["model_id", "channel"], unique=True, postgresql_where=ACTIVE)
    op.create_table(
        "rollout_clients",
        sa.Column("rollout_id", sa.Uuid(), nullable=False),
        sa.Column("client_id", sa.Uuid(), nullable=False),
        sa.Column("stage", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(["rollout_id"], ["rollouts.id"], name=op.f("fk_rollout_clients_rollout_id")),
        sa.ForeignKeyConstraint(["client_id"], ["clients.id"], name=op.f("fk_rollout_clients_client_id")),
        sa.PrimaryKeyConstraint("rollout_id", "client_id", name=op.f("pk_rollout_clients")),
    )
    op.create_table(
        "rollout_judgements",
        sa.Column("rollout_id", sa.Uuid(), nullable=False),
        sa.Column("stage", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("verdict", sa.Text(), nullable=False),
        sa.Column("gates", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["rollout_id"], ["rollouts.id"], name=op.f("fk_rollout_judgements_rollout_id")),
        sa.PrimaryKeyConstraint("rollout_id", "stage", name=op.f("pk_rollout_judgements")),
    )


def downgrade() -> None:
    """Take it back: evaluations that belong to rollouts go."""
    op.execute("DELETE FROM evaluations WHERE rollout_id IS NOT NULL")
    op.drop_index(IN_ROLLOUT, "assignments")
    op.drop_index(EVALUATION, "assignments")
    op.execute("DELETE FROM assignments WHERE rollout_id IS NOT NULL")
    for table, column in (("evaluations", "rollout_id"), ("assignments", "rollout_id"), ("runs", "cohort_id")):
        op.drop_column(table, column)
    columns, evaluate = ["version_id", "client_id"], sa.text("kind = 'evaluate'")
    op.create_index(EVALUATION, "assignments", columns, unique=True, postgresql_where=evaluate)
    for table in ("rollout_judgements", "rollout_clients", "rollouts", "channels", "cohorts"):
        op.drop_table(table)
