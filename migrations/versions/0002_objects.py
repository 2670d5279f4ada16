"""objects: a register of what lies in the store, and marks for what has gone"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = '0002'
down_revision = '0001'
branch_labels = None
depends_on = None

NAMED_IN = ("versions", "masks", "updates")
# What is in the store already was written by an older version that registered nothing.
BACKFILL = """
INSERT INTO objects (key, project_id, size, claimed_at)
SELECT DISTINCT ON (object_key) object_key, project_id, size, created_at FROM (
    SELECT object_key, project_id, size, created_at FROM versions
    UNION ALL SELECT object_key, project_id, size, created_at FROM updates
    UNION ALL SELECT k.object_key, k.project_id, (m.elements + 7) / 8, k.created_at FROM masks k
        JOIN arms a ON a.id = k.arm_id JOIN runs r ON r.id = a.run_id JOIN models m ON m.id = r.model_id
) AS named ORDER BY object_key, created_at DESC
"""


def upgrade() -> None:
    """Apply the change."""
    op.create_table('objects',
    sa.Column('key', sa.Text(), nullable=False),
    sa.Column('project_id', sa.Uuid(), nullable=True),
    sa.Column('size', sa.BigInteger(), nullable=False),
    sa.Column('claimed_at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('deletion_id', sa.Uuid(), nullable=True),
    sa.Column('deleted_at', sa.DateTime(timezone=True), nullable=True),
    sa.ForeignKeyConstraint(['project_id'], ['projects.id'], name=op.f('fk_objects_project_id')),
    sa.PrimaryKeyConstraint('key', name=op.f('pk_objects'))
    )
    op.create_index('ix_objects_doomed', 'objects', ['deletion_id'], unique=False, postgresql_where=sa.text('deletion_id IS NOT NULL AND deleted_at IS NULL'))
    op.execute(BACKFILL)
    for table in NAMED_IN:
        op.create_index(f'ix_{table}_object_key', table, ['object_key'], unique=False)
        op.create_foreign_key(f'fk_{table}_object_key', table, 'objects', ['object_key'], ['key'])
    op.add_column('versions', sa.Column('recomputable', sa.Boolean(), server_default=sa.text('true'), nullable=False))
    op.add_column('clients', sa.Column('erased_at', sa.DateTime(timezone=True), nullable=True))


def downgrade() -> None:
    """Take the change back."""
    op.drop_column('clients', 'erased_at')
    op.drop_column('versions', 'recomputable')
    for table in NAMED_IN:
        op.drop_constraint(f'fk_{table}_object_key', table, type_='foreignkey')
        op.drop_index(f'ix_{table}_object_key', table_name=table)
    op.drop_index('ix_objects_doomed', table_name='objects')
    op.drop_table('objects')
