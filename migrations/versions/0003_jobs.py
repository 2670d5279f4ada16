"""jobs: when the bell was rung again; updates: one for each client and round"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = '0003'
down_revision = '0002'
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply the change."""
    op.add_column('jobs', sa.Column('rung_at', sa.DateTime(timezone=True), nullable=True))
    op.create_unique_constraint(op.f('uq_updates_round_id_client_id'), 'updates', ['round_id', 'client_id'])


def downgrade() -> None:
    """Take it back."""
    op.drop_constraint(op.f('uq_updates_round_id_client_id'), 'updates', type_='unique')
    op.drop_column('jobs', 'rung_at')
