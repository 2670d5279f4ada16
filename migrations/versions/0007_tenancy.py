"""keys: of an organisation, named, narrowed, rotated, last used; limits on clients"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = '0007'
down_revision = '0006'
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply the change."""
    op.add_column('organisations', sa.Column('client_limit', sa.BigInteger(), nullable=True))
    op.add_column('projects', sa.Column('client_limit', sa.BigInteger(), nullable=True))
    op.add_column('keys', sa.Column('organisation_id', sa.Uuid(), nullable=True))
    op.execute('UPDATE keys SET organisation_id = (SELECT organisation_id FROM projects WHERE projects.id = keys.project_id)')
    op.alter_column('keys', 'organisation_id', nullable=False)
    op.alter_column('keys', 'project_id', nullable=True)
    op.add_column('keys', sa.Column('name', sa.Text(), server_default='', nullable=False))
    op.add_column('keys', sa.Column('scopes', sa.ARRAY(sa.Text()), nullable=True))
    op.add_column('keys', sa.Column('predecessor_id', sa.Text(), nullable=True))
    op.add_column('keys', sa.Column('last_used_at', sa.DateTime(timezone=True), nullable=True))
    op.create_foreign_key(op.f('fk_keys_organisation_id'), 'keys', 'organisations', ['organisation_id'], ['id'])
    op.create_foreign_key(op.f('fk_keys_predecessor_id'), 'keys', 'keys', ['predecessor_id'], ['id'])
    op.create_unique_constraint(op.f('uq_keys_predecessor_id'), 'keys', ['predecessor_id'])
    op.create_index(op.f('ix_keys_organisation_id'), 'keys', ['organisation_id'])
    op.create_index(op.f('ix_keys_project_id'), 'keys', ['project_id'])


def downgrade() -> None:
    """Take it back; keys of a whole organisation end."""
    op.drop_index(op.f('ix_keys_project_id'), 'keys')
    op.drop_index(op.f('ix_keys_organisation_id'), 'keys')
    op.drop_constraint(op.f('uq_keys_predecessor_id'), 'keys', type_='unique')
    op.execute('UPDATE keys SET predecessor_id = NULL')
    op.execute('DELETE FROM keys WHERE project_id IS NULL')
    for column in ('last_used_at', 'predecessor_id', 'scopes', 'name', 'organisation_id'):
        op.drop_column('keys', column)
    op.alter_column('keys', 'project_id', nullable=False)
    op.drop_column('projects', 'client_limit')
    op.drop_column('organisations', 'client_limit')
