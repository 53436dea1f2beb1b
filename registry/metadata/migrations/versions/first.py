"""The tables of the first registries, which numbered their schema instead (it was 1)."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "first"
down_revision = None

ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "settings",
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("value", sa.Text, nullable=False),
    )
    op.create_table(
        "objects",
        sa.Column("id", ID, primary_key=True),
        sa.Column("domain", sa.String(64), nullable=False),
        sa.Column("key", sa.Text, nullable=False, unique=True),
        sa.Column("size", sa.BigInteger, nullable=False),
        sa.Column("created", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "chunks",
        sa.Column("domain", sa.String(64), primary_key=True),
        sa.Column("id", sa.LargeBinary(32), primary_key=True),
        sa.Column("object", ID, sa.ForeignKey("objects.id"), nullable=False),
        sa.Column("offset", sa.BigInteger, nullable=False),
        sa.Column("length", sa.Integer, nullable=False),
        sa.Column("encoded", sa.Integer, nullable=False),
        sa.Column("codec", sa.String(32), nullable=False),
        sa.Column("key_id", sa.String(64)),
        sqlite_with_rowid=False,
    )
    op.create_index("chunks_object", "chunks", ["object"])
    op.create_table(
        "blobs",
        sa.Column("domain", sa.String(64), primary_key=True),
        sa.Column("sha256", sa.String(64), primary_key=True),
        sa.Column("size", sa.BigInteger, nullable=False),
        sa.Column("recipe", sa.String(64), nullable=False),
        sa.Column("git_oid", sa.String(40), nullable=False),
        sa.Column("lfs", sa.Boolean, nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("pending", sa.Boolean, nullable=False),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "blob_objects",
        sa.Column("domain", sa.String(64), primary_key=True),
        sa.Column("sha256", sa.String(64), primary_key=True),
        sa.Column("object", ID, sa.ForeignKey("objects.id"), primary_key=True),
        sqlite_with_rowid=False,
    )
    op.create_index("blob_objects_object", "blob_objects", ["object"])
    op.create_table(
        "repositories",
        sa.Column("id", ID, primary_key=True),
        sa.Column("name", sa.Text, nullable=False, unique=True),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("domain", sa.String(64), nullable=False),
        sa.Column("created", sa.BigInteger, nullable=False),
        sa.Column("updated", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "commits",
        sa.Column("repository", ID, sa.ForeignKey("repositories.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("commit", sa.String(40), primary_key=True),
        sa.Column("manifest", sa.String(64), nullable=False),
        sa.Column("parent", sa.String(40)),
        sa.Column("time", sa.BigInteger, nullable=False),
        sa.Column("size", sa.BigInteger, nullable=False),
        sa.Column("record", sa.LargeBinary, nullable=False),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "refs",
        sa.Column("repository", ID, sa.ForeignKey("repositories.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("commit", sa.String(40), nullable=False),
        sa.Column("updated", sa.BigInteger, nullable=False),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "repository_blobs",
        sa.Column("repository", ID, sa.ForeignKey("repositories.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("sha256", sa.String(64), primary_key=True),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "ref_moves",
        sa.Column("id", ID, primary_key=True),
        sa.Column("repository", sa.Text, nullable=False),
        sa.Column("ref", sa.Text, nullable=False),
        sa.Column("old", sa.String(40)),
        sa.Column("new", sa.String(40)),
        sa.Column("author", sa.Text, nullable=False),
        sa.Column("time", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "unfinished",
        sa.Column("session", sa.String(64), primary_key=True),
        sa.Column("started", sa.BigInteger, nullable=False),
    )
