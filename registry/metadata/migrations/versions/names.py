"""Refs have kinds: what was there is a branch."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "names"
down_revision = "gc"


def upgrade() -> None:
    op.add_column("refs", sa.Column("kind", sa.String(8), nullable=False, server_default="branch"))
    op.create_index("ref_moves_repository", "ref_moves", ["repository"])
