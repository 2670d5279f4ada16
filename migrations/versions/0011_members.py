"""members: people who sign in elsewhere; keys bound to a certificate"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = '0011'
down_revision = '0010'
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply the change."""
    op.add_column('keys', sa.Column('certificate', sa.Text(), nullable=True))
    op.create_table(
        'members',
        sa.Column('id', sa.Uuid(), nullable=False),
        sa.Column('organisation_id', sa.Uuid(), nullable=False),
        sa.Column('project_id', sa.Uuid(), nullable=True),
        sa.Column('issuer', sa.Text(), nullable=False),
        sa.Column('subject', sa.Text(), nullable=False),
        sa.Column('name', sa.Text(), nullable=False),
        sa.Column('role', sa.Text(), nullable=False),
        sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
        sa.Column('ended_at', sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(['organisation_id'], ['organisations.id'], name=op.f('fk_members_organisation_id')),
        sa.ForeignKeyConstraint(['project_id'], ['projects.id'], name=op.f('fk_members_project_id')),
        sa.PrimaryKeyConstraint('id', name=op.f('pk_members')),
    )
    op.create_index(op.f('ix_members_organisation_id'), 'members', ['organisation_id'])
    op.create_index('ix_members_person', 'members', ['issuer', 'subject'])


def downgrade() -> None:
    """Take it back."""
    op.drop_index('ix_members_person', 'members')
    op.drop_index(op.f('ix_members_organisation_id'), 'members')
    op.drop_table('members')
    op.drop_column('keys', 'certificate')
