"""noise_commitment: what binds a run with differential privacy to the secret of its noise"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply the change."""
    op.add_column("runs", sa.Column("noise_commitment", sa.Text(), nullable=True))


def downgrade() -> None:
    """Take it back."""
    op.drop_column("runs", "noise_commitment")
