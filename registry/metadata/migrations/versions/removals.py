"""What is being deleted, from the store and in steps from the tables.

Processes of the version before keep working beside those of this one but for deletions: they don't see what is leaving
the store, so end them first.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "removals"
down_revision = "detached"


def upgrade() -> None:
    op.add_column("doomed", sa.Column("remover", sa.String(32)))
    op.create_index("doomed_remover", "doomed", ["remover"])
    number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    op.create_table(
        "removals",
        sa.Column("repository", number, sa.ForeignKey("repositories.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("domain", sa.String(64), nullable=False),
    )
    op.create_table(
        "recounts",
        sa.Column("repository", number, sa.ForeignKey("repositories.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("since", sa.Double, nullable=False),
    )
