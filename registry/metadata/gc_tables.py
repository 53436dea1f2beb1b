"""Tables of garbage collection."""

from __future__ import annotations

import sqlalchemy as sa

from registry.metadata.tables import metadata

_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_A_COMMIT = ["commits.repository", "commits.commit"]

pins = sa.Table(
    "pins",
    metadata,
    sa.Column("holder", sa.String(200), primary_key=True),
    sa.Column("repository", _ID, primary_key=True),
    sa.Column("commit", sa.String(40), primary_key=True),
    sa.Column("expires", sa.Double, nullable=False),
    sa.ForeignKeyConstraint(["repository", "commit"], _A_COMMIT, ondelete="CASCADE"),
    sa.Index("pins_commit", "repository", "commit"),
    sqlite_with_rowid=False,
)
"""Leases on commits: nodes that have them mounted say so, and say so again before the time is over."""

condemned_commits = sa.Table(
    "condemned_commits",
    metadata,
    sa.Column("repository", _ID, primary_key=True),
    sa.Column("commit", sa.String(40), primary_key=True),
    sa.Column("since", sa.Double, nullable=False),
    sa.ForeignKeyConstraint(["repository", "commit"], _A_COMMIT, ondelete="CASCADE"),
    sqlite_with_rowid=False,
)

condemned_blobs = sa.Table(
    "condemned_blobs",
    metadata,
    sa.Column("domain", sa.String(64), primary_key=True),
    sa.Column("sha256", sa.String(64), primary_key=True),
    sa.Column("since", sa.Double, nullable=False),
    sa.ForeignKeyConstraint(["domain", "sha256"], ["blobs.domain", "blobs.sha256"], ondelete="CASCADE"),
    sqlite_with_rowid=False,
)

removals = sa.Table(
    "removals",
    metadata,
    sa.Column("repository", _ID, sa.ForeignKey("repositories.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("domain", sa.String(64), nullable=False),
)
"""Repositories that were removed and have rows still, with the name and the domain that they had."""

recounts = sa.Table(
    "recounts",
    metadata,
    sa.Column("repository", _ID, sa.ForeignKey("repositories.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("since", sa.Double, nullable=False),
)
"""Repositories that may show blobs which none of their commits holds any more: garbage since then."""

turns = sa.Table(
    "turns",
    metadata,
    sa.Column("name", sa.String(32), primary_key=True),
    sa.Column("holder", sa.String(32), nullable=False),
)
"""Work that only one process does at a time, and which one does it, as long as it is alive."""
