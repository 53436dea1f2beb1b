"""What is known of upstream repositories, in SQL: listings ahead of the bytes, followed refs, finished downloads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from helios.names import RepoId
from registry.metadata.database import batches, insert_new
from registry.metadata.mirror_tables import downloads, mirror_refs, mirror_repositories, mirror_snapshots


@dataclass(frozen=True, slots=True)
class FollowedRef:
    """A row of ``mirror_refs``; ``checked`` in seconds since 1970."""

    repository: str
    ref: str
    commit: str
    checked: float
    pending: str | None


_REF = (
    mirror_refs.c.repository,
    mirror_refs.c.ref,
    mirror_refs.c.commit,
    mirror_refs.c.checked,
    mirror_refs.c.pending,
)


def all_restricted(connection: Connection) -> set[str]:
    """The restricted ones of the followed repositories."""
    return set(connection.scalars(sa.select(mirror_repositories.c.repository).where(mirror_repositories.c.restricted)))


def restricted(connection: Connection, repo: RepoId) -> bool | None:
    """Whether the repository is restricted; None: it is not followed."""
    query = sa.select(mirror_repositories.c.restricted).where(mirror_repositories.c.repository == str(repo))
    return connection.scalar(query)


def set_restricted(connection: Connection, repo: RepoId, value: bool) -> None:
    """Follow the repository from here on."""
    insert_new(connection, mirror_repositories, [{"repository": str(repo), "restricted": value}])
    where = mirror_repositories.c.repository == str(repo)
    connection.execute(mirror_repositories.update().where(where).values(restricted=value))


def find_ref(connection: Connection, repo: RepoId, ref: str) -> FollowedRef | None:
    query = sa.select(*_REF).where(mirror_refs.c.repository == str(repo), mirror_refs.c.ref == ref)
    row = connection.execute(query).one_or_none()
    return None if row is None else FollowedRef(*row)


def list_refs(connection: Connection, repo: RepoId | None = None) -> list[FollowedRef]:
    """The followed refs of a repository, or of all, sorted."""
    query = sa.select(*_REF).order_by(mirror_refs.c.repository, mirror_refs.c.ref)
    if repo is not None:
        query = query.where(mirror_refs.c.repository == str(repo))
    return [FollowedRef(*row) for row in connection.execute(query)]


def set_ref(
    connection: Connection, repo: RepoId, ref: str, *, commit: str, checked: float, pending: str | None
) -> None:
    """Write where a followed ref points."""
    values = {"repository": str(repo), "ref": ref, "commit": commit, "checked": checked, "pending": pending}
    insert_new(connection, mirror_refs, [values])
    where = (mirror_refs.c.repository == str(repo)) & (mirror_refs.c.ref == ref)
    connection.execute(mirror_refs.update().where(where).values(commit=commit, checked=checked, pending=pending))


def refs_at(connection: Connection, repo: RepoId, commit: str) -> list[str]:
    """The followed refs that point at the commit."""
    query = sa.select(mirror_refs.c.ref).where(mirror_refs.c.repository == str(repo), mirror_refs.c.commit == commit)
    return list(connection.scalars(query))


def find_snapshot(connection: Connection, repo: RepoId, commit: str) -> tuple[bytes, bool] | None:
    """A snapshot's listing and whether it is published."""
    c = mirror_snapshots.c
    query = sa.select(c.listing, c.published).where(c.repository == str(repo), c.commit == commit)
    row = connection.execute(query).one_or_none()
    return None if row is None else (bytes(row[0]), bool(row[1]))


def add_snapshot(connection: Connection, repo: RepoId, commit: str, listing: bytes, now: int) -> None:
    """Keep a snapshot's listing; one that is there stays as it is."""
    values = {"repository": str(repo), "commit": commit, "listing": listing, "published": False, "time": now}
    insert_new(connection, mirror_snapshots, [values])


def set_published(connection: Connection, repo: RepoId, commit: str) -> None:
    where = (mirror_snapshots.c.repository == str(repo)) & (mirror_snapshots.c.commit == commit)
    connection.execute(mirror_snapshots.update().where(where).values(published=True))


def unpublished(connection: Connection, repo: RepoId | None = None) -> list[tuple[str, str, bytes]]:
    """Snapshots whose files are not all here: (repository, commit, listing)."""
    c = mirror_snapshots.c
    query = sa.select(c.repository, c.commit, c.listing).where(sa.not_(c.published))
    if repo is not None:
        query = query.where(c.repository == str(repo))
    return [(name, commit, bytes(listing)) for name, commit, listing in connection.execute(query)]


def add_download(connection: Connection, repo: RepoId, content: str, sha256: str, now: int) -> None:
    """The content is stored, as the blob ``sha256``."""
    insert_new(connection, downloads, [{"repository": str(repo), "content": content, "sha256": sha256, "time": now}])


def find_downloads(connection: Connection, repo: RepoId, contents: Sequence[str]) -> dict[str, str]:
    """Those of the contents that were stored for this repository: content -> sha256."""
    c = downloads.c
    query = sa.select(c.content, c.sha256).where(c.repository == str(repo))
    out: dict[str, str] = {}
    for batch in batches(sorted(set(contents))):
        out.update(dict(connection.execute(query.where(c.content.in_(batch))).all()))
    return out


def downloaded(connection: Connection) -> set[str]:
    """The blobs of all downloads."""
    return set(connection.scalars(sa.select(downloads.c.sha256)))


def drop_downloads(connection: Connection, repo: RepoId, keep: Iterable[str]) -> set[str]:
    """Forget a repository's downloads, all but these contents; returns the blobs that nobody keeps here any more."""
    c, kept = downloads.c, set(keep)
    rows = dict(connection.execute(sa.select(c.content, c.sha256).where(c.repository == str(repo))).all())
    gone = sorted(rows.keys() - kept)
    for batch in batches(gone):
        connection.execute(downloads.delete().where(c.repository == str(repo), c.content.in_(batch)))
    return {rows[content] for content in gone}


def old_downloads(connection: Connection, before: int) -> list[RepoId]:
    """Repositories whose newest download is older than ``before``, in seconds since 1970."""
    c = downloads.c
    query = sa.select(c.repository).group_by(c.repository).having(sa.func.max(c.time) < before)
    return [RepoId.from_canonical(name) for name in connection.scalars(query)]


def forget(connection: Connection, repo: RepoId, ref: str | None = None) -> None:
    """Stop following a ref, or without one the repository with all that is known of it."""
    if ref is not None:
        connection.execute(mirror_refs.delete().where(mirror_refs.c.repository == str(repo), mirror_refs.c.ref == ref))
        return
    for table in (mirror_refs, mirror_snapshots, mirror_repositories, downloads):
        connection.execute(table.delete().where(table.c.repository == str(repo)))
