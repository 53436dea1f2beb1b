"""Recompression: when a blob was last read, and what encoding an object's chunks would save."""

from __future__ import annotations

import time

import sqlalchemy as sa
from alembic import op

revision = "recompress"
down_revision = "quotas"


def upgrade() -> None:
    op.add_column("blobs", sa.Column("last_read", sa.BigInteger, nullable=False, server_default="0"))
    op.add_column("objects", sa.Column("gain", sa.Double))
    # Nobody noted when these were read last, so all of them count as read now.
    op.execute(sa.text("UPDATE blobs SET last_read = :now").bindparams(now=int(time.time())))
