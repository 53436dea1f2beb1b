"""Xet layouts in SQL: which blobs have one, under which hash, and who is making one.

A row without a ``record`` is a claim: somebody makes the layout until ``until``, or it failed and is not tried again
before. Blobs without a row are the queue. All of it goes with the blob. Every function runs inside a transaction.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from registry.metadata.mirror_tables import downloads
from registry.metadata.tables import (
    blob_objects,
    blobs,
    metadata,
    objects,
    repositories,
    repository_blobs,
    settings,
)

_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")

xet_layouts = sa.Table(
    "xet_layouts",
    metadata,
    sa.Column("domain", sa.String(64), primary_key=True),
    sa.Column("sha256", sa.String(64), primary_key=True),
    sa.Column("until", sa.BigInteger, nullable=False),
    sa.Column("failures", sa.Integer, nullable=False),
    sa.Column("file", sa.String(64)),
    sa.Column("record", sa.String(64)),
    sa.Column("object", _ID, sa.ForeignKey("objects.id")),
    sa.ForeignKeyConstraint(["domain", "sha256"], ["blobs.domain", "blobs.sha256"], ondelete="CASCADE"),
    sa.Index("xet_layouts_file", "file"),
    sqlite_with_rowid=False,
)
"""``file`` is the blob's hash in the Xet protocol, as text; ``record`` the sha256 of the layout's record."""

sa.Index("blobs_size", blobs.c.domain, blobs.c.size)  # the queue is looked at every few seconds

KEY_SETTING = "xet_key"


@dataclass(frozen=True, slots=True)
class Queued:
    """A blob that has no layout yet; ``failures`` is how often it was tried in vain."""

    domain: str
    sha256: str
    size: int
    failures: int


def key(connection: Connection, new: str) -> str:
    """The key that access tokens are signed with, in hexadecimal; ``new`` becomes it where there is none yet."""
    found = connection.scalar(sa.select(settings.c.value).where(settings.c.name == KEY_SETTING))
    if found is None:
        connection.execute(settings.insert().values(name=KEY_SETTING, value=new))
        return new
    return str(found)


def find_key(connection: Connection) -> str | None:
    """That key, or None where there is none yet."""
    return connection.scalar(sa.select(settings.c.value).where(settings.c.name == KEY_SETTING))


def files_of(connection: Connection, domain: str, digests: Iterable[str]) -> dict[str, str]:
    """Xet hashes, by sha256, of those of the blobs (500 at most) that have a layout."""
    c = xet_layouts.c
    query = sa.select(c.sha256, c.file).where(c.domain == domain, c.sha256.in_(list(digests)), c.record.is_not(None))
    return dict(connection.execute(query).all())


def blobs_of(connection: Connection, domain: str, file: str) -> list[str]:
    """The blobs with this Xet hash: one, or none."""
    c = xet_layouts.c
    query = sa.select(c.sha256).where(c.file == file, c.domain == domain, c.record.is_not(None))
    return list(connection.scalars(query))


def record_of(connection: Connection, domain: str, sha256: str) -> str | None:
    """The sha256 of the record of the blob's layout, or None where there is none."""
    c = xet_layouts.c
    return connection.scalar(sa.select(c.record).where(c.domain == domain, c.sha256 == sha256))


def failures_of(connection: Connection, domain: str, sha256: str) -> int:
    """How often a layout of the blob, which has none yet, was tried in vain."""
    c = xet_layouts.c
    where = (c.domain == domain) & (c.sha256 == sha256) & c.record.is_(None)
    return connection.scalar(sa.select(c.failures).where(where)) or 0


def waiting(connection: Connection, domain: str, least: int) -> int:
    """How many blobs of at least so many bytes, published or downloaded, have no layout."""
    return connection.scalar(sa.select(sa.func.count()).select_from(_queue(domain, least).subquery())) or 0


def claim(connection: Connection, domain: str, least: int, now: int, until: int) -> Queued | None:
    """The largest blob in the queue of at least ``least`` bytes that nobody makes a layout for, which is claimed."""
    free = _queue(domain, least).where(sa.or_(xet_layouts.c.until.is_(None), xet_layouts.c.until <= now))
    row = connection.execute(free.order_by(blobs.c.size.desc(), blobs.c.sha256).limit(1)).one_or_none()
    if row is None:
        return None
    sha256, size, failures = row.sha256, row.size, row.failures
    if failures is None:
        connection.execute(
            xet_layouts.insert().values(domain=domain, sha256=sha256, until=until, failures=0, file=None, record=None)
        )
    else:
        hold(connection, domain, sha256, until)
    return Queued(domain, sha256, size, failures or 0)


def hold(connection: Connection, domain: str, sha256: str, until: int, *, failed: bool = False) -> None:
    """Keep a claim until a later time; after a failure nobody tries again before."""
    c = xet_layouts.c
    where = (c.domain == domain) & (c.sha256 == sha256) & c.record.is_(None)
    values = {"until": until, "failures": c.failures + (1 if failed else 0)}
    connection.execute(xet_layouts.update().where(where).values(values))


def add(connection: Connection, domain: str, sha256: str, file: str, record: str, object_key: str) -> bool:
    """Record a layout whose object has a row; False where the blob has gone meanwhile."""
    number = sa.select(objects.c.id).where(objects.c.key == object_key).scalar_subquery()
    c = xet_layouts.c
    where = (c.domain == domain) & (c.sha256 == sha256)
    values = {"file": file, "record": record, "object": number, "until": 0}
    if not connection.execute(xet_layouts.update().where(where, c.record.is_(None)).values(values)).rowcount:
        return False
    # The blob needs it now: whoever looks for garbage by what blobs need leaves it, and takes it with the blob.
    connection.execute(blob_objects.insert().values(domain=domain, sha256=sha256, object=number))
    return True


def _queue(domain: str, least: int) -> sa.Select[tuple[str, int, int]]:
    """(sha256, size, failures) of the blobs without a layout, LFS files only, as on the Hub: those that are published,
    and those that were downloaded for a commit of which more is to come."""
    b, c = blobs.c, xet_layouts.c
    held = (
        sa.select(repository_blobs.c.sha256)
        .join(repositories, repository_blobs.c.repository == repositories.c.id)
        .where(repository_blobs.c.sha256 == b.sha256, repositories.c.domain == domain)
        .exists()
    )
    # Of another domain, maybe, where the blob is in both: then its layout is made a little early.
    downloaded = sa.select(downloads.c.sha256).where(downloads.c.sha256 == b.sha256).exists()
    wanted = sa.or_(b.pending.is_(False) & held, downloaded)
    return (
        sa.select(b.sha256, b.size, c.failures)
        .select_from(blobs.outerjoin(xet_layouts, (c.domain == b.domain) & (c.sha256 == b.sha256)))
        .where(b.domain == domain, b.size >= max(least, 1), b.lfs, c.record.is_(None), wanted)
    )
