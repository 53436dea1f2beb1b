"""Which refs an upstream has, and which of them are one's own here."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "detached"
down_revision = "sharing"


def upgrade() -> None:
    op.create_table(
        "mirror_detached",
        sa.Column("repository", sa.Text, primary_key=True),
        sa.Column("ref", sa.Text, primary_key=True),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "mirror_ref_lists",
        sa.Column("repository", sa.Text, primary_key=True),
        sa.Column("what", sa.String(16), primary_key=True),
        sa.Column("listing", sa.LargeBinary, nullable=False),
        sa.Column("checked", sa.Float, nullable=False),
        sqlite_with_rowid=False,
    )
