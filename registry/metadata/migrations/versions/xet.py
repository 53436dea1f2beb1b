"""Xet layouts of blobs."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "xet"
down_revision = "admission"


def upgrade() -> None:
    op.create_table(
        "xet_layouts",
        sa.Column("domain", sa.String(64), primary_key=True),
        sa.Column("sha256", sa.String(64), primary_key=True),
        sa.Column("until", sa.BigInteger, nullable=False),
        sa.Column("failures", sa.Integer, nullable=False),
        sa.Column("file", sa.String(64)),
        sa.Column("record", sa.String(64)),
        sa.Column("object", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), sa.ForeignKey("objects.id")),
        sa.ForeignKeyConstraint(["domain", "sha256"], ["blobs.domain", "blobs.sha256"], ondelete="CASCADE"),
        sqlite_with_rowid=False,
    )
    op.create_index("xet_layouts_file", "xet_layouts", ["file"])
    op.create_index("blobs_size", "blobs", ["domain", "size"])
