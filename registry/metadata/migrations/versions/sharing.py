"""Processes know where they reach each other, who of them brings what, and what was uploaded at any of them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "sharing"
down_revision = "recompress"


def upgrade() -> None:
    op.add_column("processes", sa.Column("url", sa.Text, nullable=False, server_default=""))
    op.create_table(
        "flights",
        sa.Column("content", sa.Text, primary_key=True),
        sa.Column("process", sa.String(32), sa.ForeignKey("processes.id", ondelete="CASCADE"), nullable=False),
        sqlite_with_rowid=False,
    )
    op.create_index("flights_process", "flights", ["process"])
    op.create_table(
        "uploads",
        sa.Column("session", sa.String(64), sa.ForeignKey("unfinished.session", ondelete="CASCADE"), primary_key=True),
        sa.Column("repository", sa.Text, nullable=False),
        sa.Column("process", sa.String(32), nullable=False),
        sa.Column("used", sa.Double, nullable=False),
        sqlite_with_rowid=False,
    )
    op.create_index("uploads_repository", "uploads", ["repository"])
    op.create_table(
        "uploaded",
        sa.Column("session", sa.String(64), sa.ForeignKey("uploads.session", ondelete="CASCADE"), primary_key=True),
        sa.Column("sha256", sa.String(64), primary_key=True),
        sqlite_with_rowid=False,
    )
