"""A process holds a number while it is connected, so that others see at once that it has ended."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "guard"
down_revision = "removals"


def upgrade() -> None:
    op.add_column("processes", sa.Column("guard", sa.BigInteger))
