"""Upstream repositories that are followed: listings ahead of the bytes, refs, finished downloads."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "mirror"
down_revision = "shared"


def upgrade() -> None:
    op.create_table(
        "downloads",
        sa.Column("repository", sa.Text, primary_key=True),
        sa.Column("content", sa.String(80), primary_key=True),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("time", sa.BigInteger, nullable=False),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "mirror_repositories",
        sa.Column("repository", sa.Text, primary_key=True),
        sa.Column("restricted", sa.Boolean, nullable=False),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "mirror_refs",
        sa.Column("repository", sa.Text, primary_key=True),
        sa.Column("ref", sa.Text, primary_key=True),
        sa.Column("commit", sa.String(40), nullable=False),
        sa.Column("checked", sa.Float, nullable=False),
        sa.Column("pending", sa.String(40)),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "mirror_snapshots",
        sa.Column("repository", sa.Text, primary_key=True),
        sa.Column("commit", sa.String(40), primary_key=True),
        sa.Column("listing", sa.LargeBinary, nullable=False),
        sa.Column("published", sa.Boolean, nullable=False),
        sa.Column("time", sa.BigInteger, nullable=False),
        sqlite_with_rowid=False,
    )
