"""Quotas and what is reserved under them, priority classes, and usage by the hour."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "quotas"
down_revision = "names"


def upgrade() -> None:
    op.create_table(
        "quota_accounts",
        sa.Column("quota", sa.Text, primary_key=True),
        sa.Column("logical", sa.BigInteger, nullable=False),
        sa.Column("stored", sa.BigInteger, nullable=False),
        sa.Column("logical_charged", sa.BigInteger, nullable=False),
        sa.Column("stored_charged", sa.BigInteger, nullable=False),
        sa.Column("counted", sa.Double, nullable=False),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "quota_reservations",
        sa.Column("session", sa.String(64), sa.ForeignKey("unfinished.session", ondelete="CASCADE"), primary_key=True),
        sa.Column("quota", sa.Text, primary_key=True),
        sa.Column("key", sa.String(96), primary_key=True),
        sa.Column("logical", sa.BigInteger, nullable=False),
        sa.Column("stored", sa.BigInteger, nullable=False),
        sa.Index("quota_reservations_key", "quota", "key"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "priorities",
        sa.Column("repository", sa.Text, primary_key=True),
        sa.Column("ref", sa.Text, primary_key=True),
        sa.Column("priority", sa.String(16), nullable=False),
        sa.Column("author", sa.Text, nullable=False),
        sa.Column("time", sa.BigInteger, nullable=False),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "usage",
        sa.Column("time", sa.BigInteger, primary_key=True),
        sa.Column("span", sa.Integer, primary_key=True),
        sa.Column("repository", sa.Text, primary_key=True),
        sa.Column("commit", sa.String(40), primary_key=True),
        sa.Column("node", sa.String(200), primary_key=True),
        sa.Column("reads", sa.BigInteger, nullable=False),
        sa.Column("bytes", sa.BigInteger, nullable=False),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "usage_reporters",
        sa.Column("reporter", sa.String(64), primary_key=True),
        sa.Column("sequence", sa.BigInteger, nullable=False),
        sa.Column("time", sa.BigInteger, nullable=False),
        sqlite_with_rowid=False,
    )
