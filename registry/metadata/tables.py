"""The registry's tables, in SQLAlchemy Core: one schema for SQLite and PostgreSQL.

Hashes of chunks are 32 raw bytes, everything else is hexadecimal text. Sizes and offsets are in bytes, times in whole
seconds since 1970 UTC. Rows of `chunks` are the placements: mutable, versioned; all other content rows are immutable.
A change here needs a migration (registry/metadata/migrations).
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ColumnElement,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
)

metadata = MetaData()

_Id = BigInteger().with_variant(Integer(), "sqlite")

settings = Table(
    "settings",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("value", Text, nullable=False),
)

objects = Table(
    "objects",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("domain", String(64), nullable=False),
    Column("key", Text, nullable=False, unique=True),
    Column("size", BigInteger, nullable=False),
    Column("created", BigInteger, nullable=False),
    Column("keep_until", Double, nullable=False, server_default="0"),
    Column("gain", Double),
)
"""``keep_until``: a blob was removed that had bytes here; until then readers may know placements that name it.
``gain``: which share of the size encoding the chunks would save, where that was found to be too little."""

chunks = Table(
    "chunks",
    metadata,
    Column("domain", String(64), primary_key=True),
    Column("id", LargeBinary(32), primary_key=True),
    Column("object", _Id, ForeignKey("objects.id"), nullable=False),
    Column("offset", BigInteger, nullable=False),
    Column("length", Integer, nullable=False),
    Column("encoded", Integer, nullable=False),
    Column("codec", String(32), nullable=False),
    Column("key_id", String(64)),
    Index("chunks_object", "object"),
    sqlite_with_rowid=False,
)

blobs = Table(
    "blobs",
    metadata,
    Column("domain", String(64), primary_key=True),
    Column("sha256", String(64), primary_key=True),
    Column("size", BigInteger, nullable=False),
    Column("recipe", String(64), nullable=False),
    Column("git_oid", String(40), nullable=False),
    Column("lfs", Boolean, nullable=False),
    Column("version", Integer, nullable=False),
    Column("pending", Boolean, nullable=False),
    Column("last_read", BigInteger, nullable=False, server_default="0"),
    sqlite_with_rowid=False,
)
"""Blobs whose chunks are all stored. ``version`` is the placement's; ``pending`` until a commit holds the blob;
``last_read`` when somebody read it, to the hour."""

blob_objects = Table(
    "blob_objects",
    metadata,
    Column("domain", String(64), primary_key=True),
    Column("sha256", String(64), primary_key=True),
    Column("object", _Id, ForeignKey("objects.id"), primary_key=True),
    Index("blob_objects_object", "object"),
    sqlite_with_rowid=False,
)
"""Objects that a blob needs: those its chunks lie in, and its recipe. An object that no blob needs is garbage."""

repositories = Table(
    "repositories",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    Column("kind", String(16), nullable=False),
    Column("domain", String(64), nullable=False),
    Column("created", BigInteger, nullable=False),
    Column("updated", BigInteger, nullable=False),
)

GONE = ""
"""The domain of a repository that was removed and has rows still (registry/metadata/removals.py)."""


def is_there() -> ColumnElement[bool]:
    """Whether the row of ``repositories`` is not of one that was removed."""
    return repositories.c.domain != GONE


commits = Table(
    "commits",
    metadata,
    Column("repository", _Id, ForeignKey("repositories.id", ondelete="CASCADE"), primary_key=True),
    Column("commit", String(40), primary_key=True),
    Column("manifest", String(64), nullable=False),
    Column("parent", String(40)),
    Column("time", BigInteger, nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("record", LargeBinary, nullable=False),
    Column("touched", BigInteger, nullable=False, server_default="0"),
    sqlite_with_rowid=False,
)
"""``touched``: when the commit was last published, or a ref pointed at it or left it."""

refs = Table(
    "refs",
    metadata,
    Column("repository", _Id, ForeignKey("repositories.id", ondelete="CASCADE"), primary_key=True),
    Column("name", Text, primary_key=True),
    Column("commit", String(40), nullable=False),
    Column("updated", BigInteger, nullable=False),
    Column("kind", String(8), nullable=False, server_default="branch"),
    sqlite_with_rowid=False,
)
"""Names of commits. ``kind``: a branch moves with every publish, an alias when somebody says so, a tag never."""

repository_blobs = Table(
    "repository_blobs",
    metadata,
    Column("repository", _Id, ForeignKey("repositories.id", ondelete="CASCADE"), primary_key=True),
    Column("sha256", String(64), primary_key=True),
    Index("repository_blobs_sha256", "sha256"),
    sqlite_with_rowid=False,
)
"""Which blobs a repository's commits hold: a blob is served only through a repository that has it."""

notices = Table(
    "notices",
    metadata,
    Column("repository", _Id, ForeignKey("repositories.id", ondelete="CASCADE"), primary_key=True),
    Column("commit", String(40), primary_key=True),
    Column("state", String(16), nullable=False),
    Column("message", Text, nullable=False),
    Column("replacement", Text),
    Column("author", Text, nullable=False),
    Column("time", BigInteger, nullable=False),
    sqlite_with_rowid=False,
)
"""What people should know before they use a repository (commit "") or one of its commits: deprecated, retired."""

ref_moves = Table(
    "ref_moves",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("repository", Text, nullable=False),
    Column("ref", Text, nullable=False),
    Column("old", String(40)),
    Column("new", String(40)),
    Column("author", Text, nullable=False),
    Column("time", BigInteger, nullable=False),
    Index("ref_moves_repository", "repository"),
)
"""Audit: every move of a ref, kept when the repository is gone (hence its name, not its number)."""

processes = Table(
    "processes",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("name", Text, nullable=False),
    Column("expires", Double, nullable=False),
    Column("url", Text, nullable=False, server_default=""),
    Column("guard", BigInteger),
)
"""Registry processes at work, and where others reach them. Each renews its lease; what one holds whose lease is over is
given back by the others. ``guard``: a number that it holds while it is connected (registry/metadata/guard.py)."""

unfinished = Table(
    "unfinished",
    metadata,
    Column("session", String(64), primary_key=True),
    Column("started", BigInteger, nullable=False),
    Column("holder", String(32)),
)
"""Sessions under way, each held by a process or, where ``holder`` is null, by a push."""

claims = Table(
    "claims",
    metadata,
    Column("session", String(64), ForeignKey("unfinished.session", ondelete="CASCADE"), primary_key=True),
    Column("key", Text, primary_key=True),
    Index("claims_key", "key"),
    sqlite_with_rowid=False,
)
"""What a session is about to write or relies on: objects by key, blobs by ``claims.of_blob``."""

doomed = Table(
    "doomed",
    metadata,
    Column("key", Text, primary_key=True),
    Column("not_before", Double, nullable=False, server_default="0"),
    Column("remover", String(32)),
    Index("doomed_remover", "remover"),
    sqlite_with_rowid=False,
)
"""Objects to be deleted from the store, not before a time, unless somebody names or claims them again. Those with a
``remover`` are being deleted by now: until ``not_before`` at the latest."""

pushes = Table(
    "pushes",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("session", String(64), ForeignKey("unfinished.session", ondelete="CASCADE"), nullable=False, unique=True),
    Column("repository", Text, nullable=False),
    Column("ref", Text, nullable=False),
    Column("message", Text, nullable=False),
    Column("author", Text, nullable=False),
    Column("base", String(40)),
    Column("used", Double, nullable=False),
)
"""Pushes under way. ``base`` is where the ref pointed at the start, ``used`` when a call was last seen."""

push_files = Table(
    "push_files",
    metadata,
    Column("push", String(32), ForeignKey("pushes.id", ondelete="CASCADE"), primary_key=True),
    Column("path", Text, primary_key=True),
    Column("size", BigInteger, nullable=False),
    Column("executable", Boolean, nullable=False),
    Column("sha256", String(64)),
    Column("git_oid", String(40)),
    Column("recipe", String(64)),
    Column("lfs", Boolean),
    Column("new_bytes", BigInteger),
    sqlite_with_rowid=False,
)
"""Files that a push announced; those that are stored have a ``sha256`` and what follows it."""

generations = Table(
    "generations",
    metadata,
    Column("name", String(16), primary_key=True),
    Column("value", BigInteger, nullable=False),
)
"""Counts of committed changes, in one row for each kind: what other processes have in memory may be out of date."""

quarantine = Table(
    "quarantine",
    metadata,
    Column("repository", _Id, ForeignKey("repositories.id", ondelete="CASCADE"), primary_key=True),
    Column("sha256", String(64), primary_key=True),
    Column("path", Text, nullable=False),
    Column("findings", Text, nullable=False),
    Column("since", BigInteger, nullable=False),
    Column("released", BigInteger),
    Column("released_by", Text),
    sqlite_with_rowid=False,
)
"""A blob of a repository that a rule held back; ``released`` is when somebody let it go, in unix seconds."""

signatures = Table(
    "signatures",
    metadata,
    Column("repository", _Id, ForeignKey("repositories.id", ondelete="CASCADE"), primary_key=True),
    Column("commit", String(40), primary_key=True),
    Column("signer", Text, nullable=False),
    Column("checked", BigInteger, nullable=False),
    sqlite_with_rowid=False,
)
"""Who signed a commit, where a rule asked for it."""
