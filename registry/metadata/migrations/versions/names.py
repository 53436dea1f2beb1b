"""Refs have kinds: what was there is a branch. Notices: what is deprecated, what is retired."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "names"
down_revision = "gc"

ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.add_column("refs", sa.Column("kind", sa.String(8), nullable=False, server_default="branch"))
    op.create_index("ref_moves_repository", "ref_moves", ["repository"])
    op.create_table(
        "notices",
        sa.Column("repository", ID, sa.ForeignKey("repositories.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("commit", sa.String(40), primary_key=True),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("message", sa.Text, nullable=False),
        sa.Column("replacement", sa.Text),
        sa.Column("author", sa.Text, nullable=False),
        sa.Column("time", sa.BigInteger, nullable=False),
        sqlite_with_rowid=False,
    )
