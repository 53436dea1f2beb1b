"""The tables of quotas, priority classes and usage (registry/metadata/quotas.py, priorities.py, usage.py)."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Double, ForeignKey, Index, Integer, String, Table, Text

from registry.metadata.tables import metadata

quota_accounts = Table(
    "quota_accounts",
    metadata,
    Column("quota", Text, primary_key=True),
    Column("logical", BigInteger, nullable=False),
    Column("stored", BigInteger, nullable=False),
    Column("logical_charged", BigInteger, nullable=False),
    Column("stored_charged", BigInteger, nullable=False),
    Column("counted", Double, nullable=False),
    sqlite_with_rowid=False,
)
"""Bytes that each quota's repositories use: as they were counted, and what was charged ever since the first count.

``logical`` and ``stored`` are what a count has found less what had been charged by then, so what is used is always the
sum of the two columns, and a charge that comes while somebody counts is lost in neither. ``counted`` is a time of the
database's clock.
"""

quota_reservations = Table(
    "quota_reservations",
    metadata,
    Column("session", String(64), ForeignKey("unfinished.session", ondelete="CASCADE"), primary_key=True),
    Column("quota", Text, primary_key=True),
    Column("key", String(96), primary_key=True),
    Column("logical", BigInteger, nullable=False),
    Column("stored", BigInteger, nullable=False),
    Index("quota_reservations_key", "quota", "key"),
    sqlite_with_rowid=False,
)
"""Bytes that are promised to sessions under way, until they end, however they do. ``key`` is the sha256 of what comes:
stored bytes that several wait for count once; or, with a colon in it, something of the session's own."""

priorities = Table(
    "priorities",
    metadata,
    Column("repository", Text, primary_key=True),
    Column("ref", Text, primary_key=True),
    Column("priority", String(16), nullable=False),
    Column("author", Text, nullable=False),
    Column("time", BigInteger, nullable=False),
    sqlite_with_rowid=False,
)
"""The class that somebody gave a repository (ref "") or one of its refs; not tied to what is held: a class may be given
before the first pull."""

usage = Table(
    "usage",
    metadata,
    Column("time", BigInteger, primary_key=True),
    Column("span", Integer, primary_key=True),
    Column("repository", Text, primary_key=True),
    Column("commit", String(40), primary_key=True),
    Column("node", String(200), primary_key=True),
    Column("reads", BigInteger, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    sqlite_with_rowid=False,
)
"""Reads and their bytes in the ``span`` seconds from ``time`` on: hours, and days of what is older."""

usage_reporters = Table(
    "usage_reporters",
    metadata,
    Column("reporter", String(64), primary_key=True),
    Column("sequence", BigInteger, nullable=False),
    Column("time", BigInteger, nullable=False),
    sqlite_with_rowid=False,
)
"""The last report of each mount that was counted: one that is sent again counts no second time."""
