"""The tables of what processes do for each other (registry/metadata/sharing.py has the queries)."""

from __future__ import annotations

from sqlalchemy import Column, Double, ForeignKey, Index, String, Table, Text

from registry.metadata.tables import metadata

flights = Table(
    "flights",
    metadata,
    Column("content", Text, primary_key=True),
    Column("process", String(32), ForeignKey("processes.id", ondelete="CASCADE"), nullable=False),
    Index("flights_process", "process"),
    sqlite_with_rowid=False,
)
"""Which process brings a content from the upstream; the others get it from there."""

uploads = Table(
    "uploads",
    metadata,
    Column("session", String(64), ForeignKey("unfinished.session", ondelete="CASCADE"), primary_key=True),
    Column("repository", Text, nullable=False),
    Column("process", String(32), nullable=False),
    Column("used", Double, nullable=False),
    Index("uploads_repository", "repository"),
    sqlite_with_rowid=False,
)
"""Sessions of uploads by the Hub's calls, opened by a process for a repository; ``used`` when a call was last seen.

The process may end before the commit comes: others go on, so nothing is deleted with it."""

uploaded = Table(
    "uploaded",
    metadata,
    Column("session", String(64), ForeignKey("uploads.session", ondelete="CASCADE"), primary_key=True),
    Column("sha256", String(64), primary_key=True),
    sqlite_with_rowid=False,
)
"""Blobs that a session has stored and that no commit has taken yet."""
