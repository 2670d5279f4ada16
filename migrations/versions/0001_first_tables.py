"""first tables"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql
revision = '0001'
down_revision = None
branch_labels = None
depends_on = None

# What is written once stays as it was written: the database itself refuses to change it.
APPEND_ONLY = ("ledger_entries", "ledger_seals", "ledger_checkpoints", "transitions", "manifests")
FORBID = """
CREATE FUNCTION forbid_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'rows of % are never changed or deleted', TG_TABLE_NAME
        USING ERRCODE = 'insufficient_privilege';
END $$
"""


def upgrade() -> None:
    """Apply the change."""
    op.create_table('idempotent_answers',
    sa.Column('caller', sa.Text(), nullable=False),
    sa.Column('route', sa.Text(), nullable=False),
    sa.Column('key', sa.Text(), nullable=False),
    sa.Column('body_digest', sa.LargeBinary(), nullable=False),
    sa.Column('answer', sa.LargeBinary(), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.PrimaryKeyConstraint('caller', 'route', 'key', name=op.f('pk_idempotent_answers'))
    )
    op.create_index(op.f('ix_idempotent_answers_created_at'), 'idempotent_answers', ['created_at'], unique=False)
    op.create_table('ledger_checkpoints',
    sa.Column('size', sa.BigInteger(), autoincrement=False, nullable=False),
    sa.Column('frontier', postgresql.ARRAY(sa.Text()), nullable=False),
    sa.Column('text', sa.Text(), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.PrimaryKeyConstraint('size', name=op.f('pk_ledger_checkpoints'))
    )
    op.create_table('organisations',
    sa.Column('id', sa.Uuid(), nullable=False),
    sa.Column('name', sa.Text(), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_organisations')),
    sa.UniqueConstraint('name', name=op.f('uq_organisations_name'))
    )
    op.create_table('projects',
    sa.Column('id', sa.Uuid(), nullable=False),
    sa.Column('organisation_id', sa.Uuid(), nullable=False),
    sa.Column('name', sa.Text(), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.ForeignKeyConstraint(['organisation_id'], ['organisations.id'], name=op.f('fk_projects_organisation_id')),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_projects')),
    sa.UniqueConstraint('organisation_id', 'name', name=op.f('uq_projects_organisation_id_name'))
    )
    op.create_table('clients',
    sa.Column('id', sa.Uuid(), nullable=False),
    sa.Column('project_id', sa.Uuid(), nullable=False),
    sa.Column('name', sa.Text(), nullable=False),
    sa.Column('tags', postgresql.ARRAY(sa.Text()), nullable=False),
    sa.Column('state', sa.Text(), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('last_seen_at', sa.DateTime(timezone=True), nullable=True),
    sa.CheckConstraint("state IN ('active', 'suspended', 'revoked')", name=op.f('ck_clients_state_known')),
    sa.ForeignKeyConstraint(['project_id'], ['projects.id'], name=op.f('fk_clients_project_id')),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_clients')),
    sa.UniqueConstraint('project_id', 'name', name=op.f('uq_clients_project_id_name'))
    )
    op.create_table('jobs',
    sa.Column('id', sa.Uuid(), nullable=False),
    sa.Column('project_id', sa.Uuid(), nullable=False),
    sa.Column('kind', sa.Text(), nullable=False),
    sa.Column('subject_id', sa.Uuid(), nullable=False),
    sa.Column('part', sa.BigInteger(), nullable=False),
    sa.Column('state', sa.Text(), nullable=False),
    sa.Column('run_after', sa.DateTime(timezone=True), nullable=False),
    sa.Column('attempts', sa.BigInteger(), nullable=False),
    sa.Column('lease_token', sa.Uuid(), nullable=True),
    sa.Column('lease_epoch', sa.BigInteger(), nullable=False),
    sa.Column('lease_until', sa.DateTime(timezone=True), nullable=True),
    sa.Column('error', sa.Text(), nullable=True),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('finished_at', sa.DateTime(timezone=True), nullable=True),
    sa.CheckConstraint("state IN ('due', 'leased', 'done', 'failed')", name=op.f('ck_jobs_state_known')),
    sa.ForeignKeyConstraint(['project_id'], ['projects.id'], name=op.f('fk_jobs_project_id')),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_jobs')),
    sa.UniqueConstraint('kind', 'subject_id', 'part', name=op.f('uq_jobs_kind_subject_id_part'))
    )
    op.create_index('ix_jobs_open', 'jobs', ['run_after'], unique=False, postgresql_where=sa.text("state IN ('due', 'leased')"))
    op.create_table('ledger_entries',
    sa.Column('id', sa.BigInteger(), sa.Identity(always=True), nullable=False),
    sa.Column('project_id', sa.Uuid(), nullable=True),
    sa.Column('at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('actor', sa.Text(), nullable=False),
    sa.Column('action', sa.Text(), nullable=False),
    sa.Column('subject', sa.Text(), nullable=False),
    sa.Column('body', postgresql.JSONB(astext_type=sa.Text()), nullable=False),
    sa.ForeignKeyConstraint(['project_id'], ['projects.id'], name=op.f('fk_ledger_entries_project_id')),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_ledger_entries'))
    )
    op.create_index(op.f('ix_ledger_entries_project_id'), 'ledger_entries', ['project_id'], unique=False)
    op.create_table('models',
    sa.Column('id', sa.Uuid(), nullable=False),
    sa.Column('project_id', sa.Uuid(), nullable=False),
    sa.Column('name', sa.Text(), nullable=False),
    sa.Column('space', postgresql.JSONB(astext_type=sa.Text()), nullable=False),
    sa.Column('space_digest', sa.Text(), nullable=False),
    sa.Column('elements', sa.BigInteger(), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.ForeignKeyConstraint(['project_id'], ['projects.id'], name=op.f('fk_models_project_id')),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_models')),
    sa.UniqueConstraint('project_id', 'name', name=op.f('uq_models_project_id_name'))
    )
    op.create_table('transitions',
    sa.Column('id', sa.BigInteger(), sa.Identity(always=True), nullable=False),
    sa.Column('project_id', sa.Uuid(), nullable=False),
    sa.Column('subject_kind', sa.Text(), nullable=False),
    sa.Column('subject_id', sa.Uuid(), nullable=False),
    sa.Column('from_state', sa.Text(), nullable=True),
    sa.Column('to_state', sa.Text(), nullable=False),
    sa.Column('reason', sa.Text(), nullable=True),
    sa.Column('actor', sa.Text(), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.ForeignKeyConstraint(['project_id'], ['projects.id'], name=op.f('fk_transitions_project_id')),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_transitions'))
    )
    op.create_index(op.f('ix_transitions_subject_id'), 'transitions', ['subject_id'], unique=False)
    op.create_table('enrolments',
    sa.Column('id', sa.Text(), nullable=False),
    sa.Column('project_id', sa.Uuid(), nullable=False),
    sa.Column('digest', sa.LargeBinary(), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('expires_at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('used_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('client_id', sa.Uuid(), nullable=True),
    sa.ForeignKeyConstraint(['client_id'], ['clients.id'], name=op.f('fk_enrolments_client_id')),
    sa.ForeignKeyConstraint(['project_id'], ['projects.id'], name=op.f('fk_enrolments_project_id')),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_enrolments'))
    )
    op.create_table('keys',
    sa.Column('id', sa.Text(), nullable=False),
    sa.Column('project_id', sa.Uuid(), nullable=False),
    sa.Column('client_id', sa.Uuid(), nullable=True),
    sa.Column('role', sa.Text(), nullable=False),
    sa.Column('digest', sa.LargeBinary(), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('expires_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('revoked_at', sa.DateTime(timezone=True), nullable=True),
    sa.ForeignKeyConstraint(['client_id'], ['clients.id'], name=op.f('fk_keys_client_id')),
    sa.ForeignKeyConstraint(['project_id'], ['projects.id'], name=op.f('fk_keys_project_id')),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_keys'))
    )
    op.create_index(op.f('ix_keys_client_id'), 'keys', ['client_id'], unique=False)
    op.create_table('ledger_seals',
    sa.Column('seq', sa.BigInteger(), autoincrement=False, nullable=False),
    sa.Column('entry_id', sa.BigInteger(), nullable=False),
    sa.Column('leaf', sa.LargeBinary(), nullable=False),
    sa.ForeignKeyConstraint(['entry_id'], ['ledger_entries.id'], name=op.f('fk_ledger_seals_entry_id')),
    sa.PrimaryKeyConstraint('seq', name=op.f('pk_ledger_seals')),
    sa.UniqueConstraint('entry_id', name=op.f('uq_ledger_seals_entry_id'))
    )
    op.create_table('runs',
    sa.Column('id', sa.Uuid(), nullable=False),
    sa.Column('project_id', sa.Uuid(), nullable=False),
    sa.Column('model_id', sa.Uuid(), nullable=False),
    sa.Column('name', sa.Text(), nullable=False),
    sa.Column('settings', postgresql.JSONB(astext_type=sa.Text()), nullable=False),
    sa.Column('state', sa.Text(), nullable=False),
    sa.Column('reason', sa.Text(), nullable=True),
    sa.Column('evaluation_ends', sa.DateTime(timezone=True), nullable=True),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.CheckConstraint("state IN ('created', 'running', 'paused', 'evaluating', 'finished', 'stopped')", name=op.f('ck_runs_state_known')),
    sa.ForeignKeyConstraint(['model_id'], ['models.id'], name=op.f('fk_runs_model_id')),
    sa.ForeignKeyConstraint(['project_id'], ['projects.id'], name=op.f('fk_runs_project_id')),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_runs')),
    sa.UniqueConstraint('project_id', 'name', name=op.f('uq_runs_project_id_name'))
    )
    op.create_table('arms',
    sa.Column('id', sa.Uuid(), nullable=False),
    sa.Column('run_id', sa.Uuid(), nullable=False),
    sa.Column('name', sa.Text(), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.ForeignKeyConstraint(['run_id'], ['runs.id'], name=op.f('fk_arms_run_id')),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_arms')),
    sa.UniqueConstraint('run_id', 'name', name=op.f('uq_arms_run_id_name'))
    )
    op.create_table('masks',
    sa.Column('id', sa.Uuid(), nullable=False),
    sa.Column('project_id', sa.Uuid(), nullable=False),
    sa.Column('arm_id', sa.Uuid(), nullable=False),
    sa.Column('client_id', sa.Uuid(), nullable=False),
    sa.Column('number', sa.BigInteger(), nullable=False),
    sa.Column('sha256', sa.Text(), nullable=False),
    sa.Column('object_key', sa.Text(), nullable=False),
    sa.Column('personal', sa.BigInteger(), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.ForeignKeyConstraint(['arm_id'], ['arms.id'], name=op.f('fk_masks_arm_id')),
    sa.ForeignKeyConstraint(['client_id'], ['clients.id'], name=op.f('fk_masks_client_id')),
    sa.ForeignKeyConstraint(['project_id'], ['projects.id'], name=op.f('fk_masks_project_id')),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_masks')),
    sa.UniqueConstraint('arm_id', 'client_id', 'number', name=op.f('uq_masks_arm_id_client_id_number'))
    )
    op.create_table('versions',
    sa.Column('id', sa.Uuid(), nullable=False),
    sa.Column('project_id', sa.Uuid(), nullable=False),
    sa.Column('model_id', sa.Uuid(), nullable=False),
    sa.Column('arm_id', sa.Uuid(), nullable=True),
    sa.Column('round_id', sa.Uuid(), nullable=True),
    sa.Column('parent_id', sa.Uuid(), nullable=True),
    sa.Column('number', sa.BigInteger(), nullable=False),
    sa.Column('object_key', sa.Text(), nullable=False),
    sa.Column('sha256', sa.Text(), nullable=False),
    sa.Column('size', sa.BigInteger(), nullable=False),
    sa.Column('manifest_sha256', sa.Text(), nullable=True),
    sa.Column('code_version', sa.Text(), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.ForeignKeyConstraint(['arm_id'], ['arms.id'], name=op.f('fk_versions_arm_id')),
    sa.ForeignKeyConstraint(['model_id'], ['models.id'], name=op.f('fk_versions_model_id')),
    sa.ForeignKeyConstraint(['parent_id'], ['versions.id'], name=op.f('fk_versions_parent_id')),
    sa.ForeignKeyConstraint(['project_id'], ['projects.id'], name=op.f('fk_versions_project_id')),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_versions')),
    sa.UniqueConstraint('arm_id', 'number', name=op.f('uq_versions_arm_id_number')),
    sa.UniqueConstraint('round_id', name=op.f('uq_versions_round_id'))
    )
    op.create_index('uq_versions_initial', 'versions', ['model_id'], unique=True, postgresql_where=sa.text('arm_id IS NULL'))
    op.create_table('rounds',
    sa.Column('id', sa.Uuid(), nullable=False),
    sa.Column('project_id', sa.Uuid(), nullable=False),
    sa.Column('run_id', sa.Uuid(), nullable=False),
    sa.Column('arm_id', sa.Uuid(), nullable=False),
    sa.Column('base_version_id', sa.Uuid(), nullable=False),
    sa.Column('number', sa.BigInteger(), nullable=False),
    sa.Column('attempt', sa.BigInteger(), nullable=False),
    sa.Column('state', sa.Text(), nullable=False),
    sa.Column('reason', sa.Text(), nullable=True),
    sa.Column('selection_ends', sa.DateTime(timezone=True), nullable=False),
    sa.Column('report_ends', sa.DateTime(timezone=True), nullable=False),
    sa.Column('opened_at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('closed_at', sa.DateTime(timezone=True), nullable=True),
    sa.CheckConstraint("state IN ('selecting', 'collecting', 'aggregating', 'published', 'abandoned', 'failed', 'cancelled')", name=op.f('ck_rounds_state_known')),
    sa.ForeignKeyConstraint(['arm_id'], ['arms.id'], name=op.f('fk_rounds_arm_id')),
    sa.ForeignKeyConstraint(['base_version_id'], ['versions.id'], name=op.f('fk_rounds_base_version_id')),
    sa.ForeignKeyConstraint(['project_id'], ['projects.id'], name=op.f('fk_rounds_project_id')),
    sa.ForeignKeyConstraint(['run_id'], ['runs.id'], name=op.f('fk_rounds_run_id')),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_rounds')),
    sa.UniqueConstraint('arm_id', 'number', 'attempt', name=op.f('uq_rounds_arm_id_number_attempt'))
    )
    op.create_index(op.f('ix_rounds_run_id'), 'rounds', ['run_id'], unique=False)
    op.create_index('uq_rounds_active', 'rounds', ['arm_id'], unique=True, postgresql_where=sa.text("state IN ('selecting', 'collecting', 'aggregating')"))
    op.create_table('assignments',
    sa.Column('id', sa.Uuid(), nullable=False),
    sa.Column('project_id', sa.Uuid(), nullable=False),
    sa.Column('run_id', sa.Uuid(), nullable=False),
    sa.Column('arm_id', sa.Uuid(), nullable=False),
    sa.Column('round_id', sa.Uuid(), nullable=True),
    sa.Column('client_id', sa.Uuid(), nullable=False),
    sa.Column('version_id', sa.Uuid(), nullable=False),
    sa.Column('mask_id', sa.Uuid(), nullable=True),
    sa.Column('kind', sa.Text(), nullable=False),
    sa.Column('attempt', sa.BigInteger(), nullable=False),
    sa.Column('state', sa.Text(), nullable=False),
    sa.Column('reason', sa.Text(), nullable=True),
    sa.Column('deadline', sa.DateTime(timezone=True), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.CheckConstraint("(kind = 'train') = (round_id IS NOT NULL)", name=op.f('ck_assignments_round_if_train')),
    sa.CheckConstraint("kind IN ('train', 'evaluate')", name=op.f('ck_assignments_kind_known')),
    sa.CheckConstraint("state IN ('assigned', 'reserved', 'uploaded', 'accepted', 'rejected', 'expired', 'late', 'declined')", name=op.f('ck_assignments_state_known')),
    sa.ForeignKeyConstraint(['arm_id'], ['arms.id'], name=op.f('fk_assignments_arm_id')),
    sa.ForeignKeyConstraint(['client_id'], ['clients.id'], name=op.f('fk_assignments_client_id')),
    sa.ForeignKeyConstraint(['mask_id'], ['masks.id'], name=op.f('fk_assignments_mask_id')),
    sa.ForeignKeyConstraint(['project_id'], ['projects.id'], name=op.f('fk_assignments_project_id')),
    sa.ForeignKeyConstraint(['round_id'], ['rounds.id'], name=op.f('fk_assignments_round_id')),
    sa.ForeignKeyConstraint(['run_id'], ['runs.id'], name=op.f('fk_assignments_run_id')),
    sa.ForeignKeyConstraint(['version_id'], ['versions.id'], name=op.f('fk_assignments_version_id')),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_assignments')),
    sa.UniqueConstraint('round_id', 'client_id', 'attempt', name=op.f('uq_assignments_round_id_client_id_attempt'))
    )
    op.create_index('ix_assignments_client_open', 'assignments', ['client_id', 'state'], unique=False)
    op.create_index('uq_assignments_evaluation', 'assignments', ['version_id', 'client_id'], unique=True, postgresql_where=sa.text("kind = 'evaluate'"))
    op.create_table('manifests',
    sa.Column('round_id', sa.Uuid(), nullable=False),
    sa.Column('body', sa.Text(), nullable=False),
    sa.Column('sha256', sa.Text(), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.ForeignKeyConstraint(['round_id'], ['rounds.id'], name=op.f('fk_manifests_round_id')),
    sa.PrimaryKeyConstraint('round_id', name=op.f('pk_manifests'))
    )
    op.create_table('evaluations',
    sa.Column('assignment_id', sa.Uuid(), nullable=False),
    sa.Column('project_id', sa.Uuid(), nullable=False),
    sa.Column('run_id', sa.Uuid(), nullable=False),
    sa.Column('client_id', sa.Uuid(), nullable=False),
    sa.Column('version_id', sa.Uuid(), nullable=False),
    sa.Column('report', postgresql.JSONB(astext_type=sa.Text()), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.ForeignKeyConstraint(['assignment_id'], ['assignments.id'], name=op.f('fk_evaluations_assignment_id')),
    sa.ForeignKeyConstraint(['client_id'], ['clients.id'], name=op.f('fk_evaluations_client_id')),
    sa.ForeignKeyConstraint(['project_id'], ['projects.id'], name=op.f('fk_evaluations_project_id')),
    sa.ForeignKeyConstraint(['run_id'], ['runs.id'], name=op.f('fk_evaluations_run_id')),
    sa.ForeignKeyConstraint(['version_id'], ['versions.id'], name=op.f('fk_evaluations_version_id')),
    sa.PrimaryKeyConstraint('assignment_id', name=op.f('pk_evaluations'))
    )
    op.create_index(op.f('ix_evaluations_run_id'), 'evaluations', ['run_id'], unique=False)
    op.create_table('updates',
    sa.Column('id', sa.Uuid(), nullable=False),
    sa.Column('project_id', sa.Uuid(), nullable=False),
    sa.Column('round_id', sa.Uuid(), nullable=False),
    sa.Column('assignment_id', sa.Uuid(), nullable=False),
    sa.Column('client_id', sa.Uuid(), nullable=False),
    sa.Column('mask_id', sa.Uuid(), nullable=False),
    sa.Column('number', sa.BigInteger(), nullable=False),
    sa.Column('object_key', sa.Text(), nullable=False),
    sa.Column('sha256', sa.Text(), nullable=False),
    sa.Column('size', sa.BigInteger(), nullable=False),
    sa.Column('examples', sa.BigInteger(), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.ForeignKeyConstraint(['assignment_id'], ['assignments.id'], name=op.f('fk_updates_assignment_id')),
    sa.ForeignKeyConstraint(['client_id'], ['clients.id'], name=op.f('fk_updates_client_id')),
    sa.ForeignKeyConstraint(['mask_id'], ['masks.id'], name=op.f('fk_updates_mask_id')),
    sa.ForeignKeyConstraint(['project_id'], ['projects.id'], name=op.f('fk_updates_project_id')),
    sa.ForeignKeyConstraint(['round_id'], ['rounds.id'], name=op.f('fk_updates_round_id')),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_updates')),
    sa.UniqueConstraint('assignment_id', name=op.f('uq_updates_assignment_id')),
    sa.UniqueConstraint('round_id', 'number', name=op.f('uq_updates_round_id_number'))
    )
    op.create_table('uploads',
    sa.Column('id', sa.Uuid(), nullable=False),
    sa.Column('project_id', sa.Uuid(), nullable=False),
    sa.Column('assignment_id', sa.Uuid(), nullable=True),
    sa.Column('model_id', sa.Uuid(), nullable=True),
    sa.Column('staging_key', sa.Text(), nullable=False),
    sa.Column('size', sa.BigInteger(), nullable=False),
    sa.Column('sha256', sa.Text(), nullable=False),
    sa.Column('md5', sa.Text(), nullable=False),
    sa.Column('state', sa.Text(), nullable=False),
    sa.Column('reason', sa.Text(), nullable=True),
    sa.Column('detail', sa.Text(), nullable=True),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('completed_at', sa.DateTime(timezone=True), nullable=True),
    sa.CheckConstraint("state IN ('reserved', 'uploaded', 'accepted', 'rejected', 'late')", name=op.f('ck_uploads_state_known')),
    sa.CheckConstraint('(assignment_id IS NULL) <> (model_id IS NULL)', name=op.f('ck_uploads_one_purpose')),
    sa.ForeignKeyConstraint(['assignment_id'], ['assignments.id'], name=op.f('fk_uploads_assignment_id')),
    sa.ForeignKeyConstraint(['model_id'], ['models.id'], name=op.f('fk_uploads_model_id')),
    sa.ForeignKeyConstraint(['project_id'], ['projects.id'], name=op.f('fk_uploads_project_id')),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_uploads')),
    sa.UniqueConstraint('assignment_id', name=op.f('uq_uploads_assignment_id')),
    sa.UniqueConstraint('staging_key', name=op.f('uq_uploads_staging_key'))
    )
    op.create_index(op.f('ix_uploads_model_id'), 'uploads', ['model_id'], unique=False)
    # Versions and rounds name each other, so this key comes when both tables are there.
    op.create_foreign_key('fk_versions_round_id', 'versions', 'rounds', ['round_id'], ['id'])
    op.execute(FORBID)
    for table in APPEND_ONLY:
        op.execute(
            f"CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON {table} "
            "FOR EACH STATEMENT EXECUTE FUNCTION forbid_change()"
        )


def downgrade() -> None:
    """Take the change back."""
    for table in APPEND_ONLY:
        op.execute(f"DROP TRIGGER append_only ON {table}")
    op.execute("DROP FUNCTION forbid_change()")
    op.drop_constraint('fk_versions_round_id', 'versions', type_='foreignkey')
    op.drop_index(op.f('ix_uploads_model_id'), table_name='uploads')
    op.drop_table('uploads')
    op.drop_table('updates')
    op.drop_index(op.f('ix_evaluations_run_id'), table_name='evaluations')
    op.drop_table('evaluations')
    op.drop_table('manifests')
    op.drop_index('uq_assignments_evaluation', table_name='assignments', postgresql_where=sa.text("kind = 'evaluate'"))
    op.drop_index('ix_assignments_client_open', table_name='assignments')
    op.drop_table('assignments')
    op.drop_index('uq_rounds_active', table_name='rounds', postgresql_where=sa.text("state IN ('selecting', 'collecting', 'aggregating')"))
    op.drop_index(op.f('ix_rounds_run_id'), table_name='rounds')
    op.drop_table('rounds')
    op.drop_index('uq_versions_initial', table_name='versions', postgresql_where=sa.text('arm_id IS NULL'))
    op.drop_table('versions')
    op.drop_table('masks')
    op.drop_table('arms')
    op.drop_table('runs')
    op.drop_table('ledger_seals')
    op.drop_index(op.f('ix_keys_client_id'), table_name='keys')
    op.drop_table('keys')
    op.drop_table('enrolments')
    op.drop_index(op.f('ix_transitions_subject_id'), table_name='transitions')
    op.drop_table('transitions')
    op.drop_table('models')
    op.drop_index(op.f('ix_ledger_entries_project_id'), table_name='ledger_entries')
    op.drop_table('ledger_entries')
    op.drop_index('ix_jobs_open', table_name='jobs', postgresql_where=sa.text("state IN ('due', 'leased')"))
    op.drop_table('jobs')
    op.drop_table('clients')
    op.drop_table('projects')
    op.drop_table('organisations')
    op.drop_table('ledger_checkpoints')
    op.drop_index(op.f('ix_idempotent_answers_created_at'), table_name='idempotent_answers')
    op.drop_table('idempotent_answers')
