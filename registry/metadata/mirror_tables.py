"""The tables of what is known of upstream repositories (registry/metadata/mirror.py has the queries)."""

from __future__ import annotations

from sqlalchemy import BigInteger, Boolean, Column, Float, LargeBinary, String, Table, Text

from registry.metadata.tables import metadata

downloads = Table(
    "downloads",
    metadata,
    Column("repository", Text, primary_key=True),
    Column("content", String(80), primary_key=True),
    Column("sha256", String(64), nullable=False),
    Column("time", BigInteger, nullable=False),
    sqlite_with_rowid=False,
)
"""Files that were downloaded and stored for a snapshot that is not published yet: ``content`` is ``RemoteFile.key``."""

mirror_repositories = Table(
    "mirror_repositories",
    metadata,
    Column("repository", Text, primary_key=True),
    Column("restricted", Boolean, nullable=False),
    sqlite_with_rowid=False,
)
"""Repositories that are followed; ``restricted``: only who shows the upstream's permission may read them."""

mirror_refs = Table(
    "mirror_refs",
    metadata,
    Column("repository", Text, primary_key=True),
    Column("ref", Text, primary_key=True),
    Column("commit", String(40), nullable=False),
    Column("checked", Float, nullable=False),
    Column("pending", String(40)),
    sqlite_with_rowid=False,
)
"""Refs that are followed: where they point here, when the upstream was asked, and a move that waits for approval."""

mirror_snapshots = Table(
    "mirror_snapshots",
    metadata,
    Column("repository", Text, primary_key=True),
    Column("commit", String(40), primary_key=True),
    Column("listing", LargeBinary, nullable=False),
    Column("published", Boolean, nullable=False),
    Column("time", BigInteger, nullable=False),
    sqlite_with_rowid=False,
)
"""What upstream commits hold (``registry/mirror/listing.py``), kept for good: a commit never changes."""

mirror_detached = Table(
    "mirror_detached",
    metadata,
    Column("repository", Text, primary_key=True),
    Column("ref", Text, primary_key=True),
    sqlite_with_rowid=False,
)
"""Refs of followed repositories that somebody has made one's own: the upstream is not asked for them."""

mirror_ref_lists = Table(
    "mirror_ref_lists",
    metadata,
    Column("repository", Text, primary_key=True),
    Column("what", String(16), primary_key=True),
    Column("listing", LargeBinary, nullable=False),
    Column("checked", Float, nullable=False),
    sqlite_with_rowid=False,
)
"""The upstream's refs as it told them last (``what``: ``refs``, or ``requests`` for pull requests'), and when."""
