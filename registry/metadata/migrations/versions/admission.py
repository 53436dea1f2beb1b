"""Files that are kept back, and who signed which commit."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "admission"
down_revision = "first"

ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "quarantine",
        sa.Column("repository", ID, sa.ForeignKey("repositories.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("sha256", sa.String(64), primary_key=True),
        sa.Column("path", sa.Text, nullable=False),
        sa.Column("findings", sa.Text, nullable=False),
        sa.Column("since", sa.BigInteger, nullable=False),
        sa.Column("released", sa.BigInteger),
        sa.Column("released_by", sa.Text),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "signatures",
        sa.Column("repository", ID, sa.ForeignKey("repositories.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("commit", sa.String(40), primary_key=True),
        sa.Column("signer", sa.Text, nullable=False),
        sa.Column("checked", sa.BigInteger, nullable=False),
        sqlite_with_rowid=False,
    )
