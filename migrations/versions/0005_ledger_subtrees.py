"""ledger: inner nodes of the tree beside the leaves, so that a proof reads a few rows"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

# RFC 6962: a node is SHA-256(0x01 || left || right). Level by level, for what is sealed already.
FILL = """
DO $$
DECLARE
    half bigint := 1;
    level int := 0;
    sealed bigint := (SELECT count(*) FROM ledger_seals);
BEGIN
    WHILE 2 * half <= sealed LOOP
        UPDATE ledger_seals AS r SET subtrees = r.subtrees || sha256('\\x01'::bytea
            || CASE WHEN level = 0 THEN l.leaf ELSE substring(l.subtrees FROM 32 * level - 31 FOR 32) END
            || CASE WHEN level = 0 THEN r.leaf ELSE substring(r.subtrees FROM 32 * level - 31 FOR 32) END)
        FROM ledger_seals AS l
        WHERE l.seq = r.seq - half AND (r.seq + 1) % (2 * half) = 0;
        half := 2 * half;
        level := level + 1;
    END LOOP;
END $$
"""


def upgrade() -> None:
    """Apply the change."""
    op.add_column(
        "ledger_seals", sa.Column("subtrees", sa.LargeBinary(), nullable=False, server_default="")
    )
    op.execute("ALTER TABLE ledger_seals DISABLE TRIGGER append_only")
    op.execute(FILL)
    op.execute("ALTER TABLE ledger_seals ENABLE TRIGGER append_only")
    op.alter_column("ledger_seals", "subtrees", server_default=None)


def downgrade() -> None:
    """Take the change back."""
    op.drop_column("ledger_seals", "subtrees")
