"""webhooks, and what is on its way to them"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = '0009'
down_revision = '0008'
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply the change."""
    op.create_table(
        'webhooks',
        sa.Column('id', sa.Uuid(), nullable=False),
        sa.Column('project_id', sa.Uuid(), nullable=False),
        sa.Column('url', sa.Text(), nullable=False),
        sa.Column('events', sa.ARRAY(sa.Text()), nullable=False),
        sa.Column('state', sa.Text(), nullable=False),
        sa.Column('seen', sa.BigInteger(), nullable=False),
        sa.Column('generation', sa.BigInteger(), nullable=False),
        sa.Column('rotated_at', sa.DateTime(timezone=True), nullable=True),
        sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("state IN ('active', 'disabled')", name=op.f('ck_webhooks_state_known')),
        sa.ForeignKeyConstraint(['project_id'], ['projects.id'], name=op.f('fk_webhooks_project_id')),
        sa.PrimaryKeyConstraint('id', name=op.f('pk_webhooks')),
    )
    op.create_index(op.f('ix_webhooks_project_id'), 'webhooks', ['project_id'])
    op.create_table(
        'deliveries',
        sa.Column('id', sa.Uuid(), nullable=False),
        sa.Column('webhook_id', sa.Uuid(), nullable=False),
        sa.Column('seq', sa.BigInteger(), nullable=False),
        sa.Column('state', sa.Text(), nullable=False),
        sa.Column('attempts', sa.BigInteger(), nullable=False),
        sa.Column('status', sa.BigInteger(), nullable=True),
        sa.Column('error', sa.Text(), nullable=True),
        sa.Column('due_at', sa.DateTime(timezone=True), nullable=False),
        sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
        sa.Column('finished_at', sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("state IN ('waiting', 'delivered', 'dead')", name=op.f('ck_deliveries_state_known')),
        sa.ForeignKeyConstraint(['webhook_id'], ['webhooks.id'], name=op.f('fk_deliveries_webhook_id')),
        sa.ForeignKeyConstraint(['seq'], ['ledger_seals.seq'], name=op.f('fk_deliveries_seq')),
        sa.PrimaryKeyConstraint('id', name=op.f('pk_deliveries')),
        sa.UniqueConstraint('webhook_id', 'seq', name=op.f('uq_deliveries_webhook_id_seq')),
    )
    op.create_index('ix_deliveries_due', 'deliveries', ['due_at'], postgresql_where=sa.text("state = 'waiting'"))


def downgrade() -> None:
    """Take it back."""
    op.drop_index('ix_deliveries_due', 'deliveries')
    op.drop_table('deliveries')
    op.drop_index(op.f('ix_webhooks_project_id'), 'webhooks')
    op.drop_table('webhooks')
