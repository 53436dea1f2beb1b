"""What several processes on one database agree by: leases, claims, pushes, counts of changes."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "shared"
down_revision = "xet"


def upgrade() -> None:
    with op.batch_alter_table("unfinished") as table:
        table.add_column(sa.Column("holder", sa.String(32)))
    op.create_table(
        "processes",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("expires", sa.Double, nullable=False),
    )
    op.create_table(
        "claims",
        sa.Column("session", sa.String(64), sa.ForeignKey("unfinished.session", ondelete="CASCADE"), primary_key=True),
        sa.Column("key", sa.Text, primary_key=True),
        sqlite_with_rowid=False,
    )
    op.create_index("claims_key", "claims", ["key"])
    op.create_table("doomed", sa.Column("key", sa.Text, primary_key=True), sqlite_with_rowid=False)
    op.create_table(
        "pushes",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column(
            "session",
            sa.String(64),
            sa.ForeignKey("unfinished.session", ondelete="CASCADE"),
            nullable=False,
            unique=True,
        ),
        sa.Column("repository", sa.Text, nullable=False),
        sa.Column("ref", sa.Text, nullable=False),
        sa.Column("message", sa.Text, nullable=False),
        sa.Column("author", sa.Text, nullable=False),
        sa.Column("base", sa.String(40)),
        sa.Column("used", sa.Double, nullable=False),
    )
    op.create_table(
        "push_files",
        sa.Column("push", sa.String(32), sa.ForeignKey("pushes.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("path", sa.Text, primary_key=True),
        sa.Column("size", sa.BigInteger, nullable=False),
        sa.Column("executable", sa.Boolean, nullable=False),
        sa.Column("sha256", sa.String(64)),
        sa.Column("git_oid", sa.String(40)),
        sa.Column("recipe", sa.String(64)),
        sa.Column("lfs", sa.Boolean),
        sa.Column("new_bytes", sa.BigInteger),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "generations",
        sa.Column("name", sa.String(16), primary_key=True),
        sa.Column("value", sa.BigInteger, nullable=False),
    )
    op.execute("INSERT INTO generations (name, value) VALUES ('names', 0), ('content', 0)")
