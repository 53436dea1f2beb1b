"""What is known of upstream repositories, in SQL: listings ahead of the bytes, followed refs, finished downloads."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from helios.decoding import from_msgpack
from helios.errors import Conflict, IntegrityError
from helios.names import RepoId
from registry.metadata.claims import of_blob
from registry.metadata.content import outlast
from registry.metadata.database import batches, insert_new
from registry.metadata.mirror_tables import (
    downloads,
    mirror_detached,
    mirror_ref_lists,
    mirror_refs,
    mirror_repositories,
    mirror_snapshots,
)


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


def unfinished(connection: Connection, repo: RepoId, since: int) -> list[bytes]:
    """Listings of the repository's snapshots whose files are not all here and may still be wanted: a ref points at the
    snapshot, or is to be let to it, or it was learnt ``since`` then, in seconds since 1970."""
    c, refs = mirror_snapshots.c, mirror_refs.c
    followed = sa.exists().where(
        refs.repository == c.repository, (refs.commit == c.commit) | (refs.pending == c.commit)
    )
    query = sa.select(c.listing).where(c.repository == str(repo), sa.not_(c.published), followed | (c.time >= since))
    return [bytes(listing) for listing in connection.scalars(query)]


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


def downloaded(connection: Connection) -> list[tuple[RepoId, str]]:
    """The blobs of all downloads, with the repository that each was stored for."""
    query = sa.select(downloads.c.repository, downloads.c.sha256).distinct()
    return [(RepoId.from_canonical(name), sha256) for name, sha256 in connection.execute(query)]


def listings_of(connection: Connection, sha256: str) -> list[tuple[RepoId, str, str, bytes]]:
    """Where a stored blob comes from that no commit need hold: (repository, content, commit, the commit's listing)."""
    d, s = downloads.c, mirror_snapshots.c
    query = sa.select(d.repository, d.content, s.commit, s.listing).where(d.sha256 == sha256)
    query = query.join_from(downloads, mirror_snapshots, d.repository == s.repository)
    return [(RepoId.from_canonical(name), *rest) for name, *rest in connection.execute(query)]


def drop_downloads(connection: Connection, repo: RepoId, domain: str, keep: Iterable[str], until: float) -> set[str]:
    """Forget a repository's downloads, all but these contents; returns the blobs that nobody keeps here any more.

    What they lie in stays until then, of the database's clock: readers were told where that is while this was kept. It
    is said here, in this transaction, because from then on whoever claims them may end, or die, at any time.
    """
    c, kept = downloads.c, set(keep)
    rows = dict(connection.execute(sa.select(c.content, c.sha256).where(c.repository == str(repo))).all())
    gone = sorted(rows.keys() - kept)
    for batch in batches(gone):
        connection.execute(downloads.delete().where(c.repository == str(repo), c.content.in_(batch)))
    dropped = {rows[key] for key in gone}
    outlast(connection, {of_blob(domain, sha256) for sha256 in dropped}, until)
    return dropped


def old_downloads(connection: Connection, before: int) -> list[RepoId]:
    """Repositories whose newest download is older than ``before``, in seconds since 1970."""
    c = downloads.c
    query = sa.select(c.repository).group_by(c.repository).having(sa.func.max(c.time) < before)
    return [RepoId.from_canonical(name) for name in connection.scalars(query)]


def refuse_followed(connection: Connection, repo: RepoId, ref: str) -> None:
    """Raise Conflict for a ref that follows an upstream."""
    if find_ref(connection, repo, ref) is not None:
        raise follows_upstream(repo, ref)


def follows_upstream(repo: RepoId, ref: str) -> Conflict:
    """The error for whoever would move such a ref by hand."""
    return Conflict(
        f"{repo.id}@{ref} follows the upstream, so it is not for pushes: use another branch, or have an administrator "
        f"detach it (helios mirror detach {repo.id}@{ref})"
    )


def detach(connection: Connection, repo: RepoId, ref: str) -> None:
    """Follow the ref no more, and not again either."""
    c = mirror_refs.c
    connection.execute(mirror_refs.delete().where(c.repository == str(repo), c.ref == ref))
    insert_new(connection, mirror_detached, [{"repository": str(repo), "ref": ref}])


def detached(connection: Connection, repo: RepoId) -> set[str]:
    """The refs of a followed repository that are one's own."""
    c = mirror_detached.c
    return set(connection.scalars(sa.select(c.ref).where(c.repository == str(repo))))


def forget(connection: Connection, repo: RepoId, ref: str | None = None) -> bool:
    """Stop following a ref, or without one the repository with all that is known of it; returns whether that was
    followed, or detached. What is asked for again is looked for upstream again. Its downloads are for
    ``drop_downloads``."""
    if ref is not None:
        return (
            sum(
                connection.execute(table.delete().where(table.c.repository == str(repo), table.c.ref == ref)).rowcount
                for table in (mirror_refs, mirror_detached)
            )
            > 0
        )
    tables = (mirror_refs, mirror_detached, mirror_ref_lists, mirror_snapshots, mirror_repositories)
    return sum(connection.execute(t.delete().where(t.c.repository == str(repo))).rowcount for t in tables) > 0


@dataclass(frozen=True, slots=True)
class RefList:
    """The upstream's refs by their full names (``refs/heads/main``), and when it was asked, in seconds since 1970."""

    targets: Mapping[str, str]
    checked: float


def find_ref_list(connection: Connection, repo: RepoId, what: str) -> RefList | None:
    """The upstream's refs as it told them last; ``what`` is ``refs``, or ``requests`` for those of pull requests."""
    c = mirror_ref_lists.c
    query = sa.select(c.listing, c.checked).where(c.repository == str(repo), c.what == what)
    row = connection.execute(query).one_or_none()
    if row is None:
        return None
    try:
        return RefList(from_msgpack(zlib.decompress(row[0]), dict[str, str]), row[1])
    except (zlib.error, msgspec.DecodeError) as error:
        raise IntegrityError(f"the list of an upstream's refs in the metadata is damaged: {error}") from error


def put_ref_list(connection: Connection, repo: RepoId, what: str, targets: Mapping[str, str], checked: float) -> None:
    listing = zlib.compress(msgspec.msgpack.encode(dict(targets)), 1)
    values = {"repository": str(repo), "what": what, "listing": listing, "checked": checked}
    insert_new(connection, mirror_ref_lists, [values])
    c = mirror_ref_lists.c
    where = (c.repository == str(repo)) & (c.what == what)
    connection.execute(mirror_ref_lists.update().where(where).values(listing=listing, checked=checked))
