"""Garbage collection: what is condemned, pins, and until when objects are kept for readers that know of them."""

from __future__ import annotations

import time

import sqlalchemy as sa
from alembic import op

revision = "gc"
down_revision = "mirror"

ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    for table, column in (
        ("objects", sa.Column("keep_until", sa.Double, nullable=False, server_default="0")),
        ("commits", sa.Column("touched", sa.BigInteger, nullable=False, server_default="0")),
        ("doomed", sa.Column("not_before", sa.Double, nullable=False, server_default="0")),
    ):
        op.add_column(table, column)
    # Nobody noted when these were in use last, so all of them are kept for the whole time from now on.
    op.execute(sa.text("UPDATE commits SET touched = :now").bindparams(now=int(time.time())))
    op.create_index("repository_blobs_sha256", "repository_blobs", ["sha256"])
    op.create_table(
        "pins",
        sa.Column("holder", sa.String(200), primary_key=True),
        sa.Column("repository", ID, primary_key=True),
        sa.Column("commit", sa.String(40), primary_key=True),
        sa.Column("expires", sa.Double, nullable=False),
        sa.ForeignKeyConstraint(["repository", "commit"], ["commits.repository", "commits.commit"], ondelete="CASCADE"),
        sqlite_with_rowid=False,
    )
    op.create_index("pins_commit", "pins", ["repository", "commit"])
    op.create_table(
        "condemned_commits",
        sa.Column("repository", ID, primary_key=True),
        sa.Column("commit", sa.String(40), primary_key=True),
        sa.Column("since", sa.Double, nullable=False),
        sa.ForeignKeyConstraint(["repository", "commit"], ["commits.repository", "commits.commit"], ondelete="CASCADE"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "condemned_blobs",
        sa.Column("domain", sa.String(64), primary_key=True),
        sa.Column("sha256", sa.String(64), primary_key=True),
        sa.Column("since", sa.Double, nullable=False),
        sa.ForeignKeyConstraint(["domain", "sha256"], ["blobs.domain", "blobs.sha256"], ondelete="CASCADE"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "turns",
        sa.Column("name", sa.String(32), primary_key=True),
        sa.Column("holder", sa.String(32), nullable=False),
    )
