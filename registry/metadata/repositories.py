"""Queries on repositories, commits, refs and the audit of their moves. Every function runs inside a transaction."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import EllipsisType
from typing import Final

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from helios.errors import Conflict, RepoNotFound, RevisionNotFound
from helios.names import RepoId, is_commit
from heliosfs.store.manifest import CommitRecord
from registry.metadata.database import batches, insert_new
from registry.metadata.tables import (
    blobs,
    commits,
    is_there,
    notices,
    ref_moves,
    refs,
    repositories,
    repository_blobs,
)

KINDS: Final = ("branch", "tag", "alias")

Expected = str | None | EllipsisType
"""What a compare-and-swap expects: a commit, None for "no such ref yet", ``...`` for anything."""


@dataclass(frozen=True, slots=True)
class Repository:
    """A row of the table; ``id`` is internal."""

    id: int
    name: str
    domain: str
    updated: int


@dataclass(frozen=True, slots=True)
class Commit:
    """A row of the table: ``record`` is the commit record's bytes, ``size`` the bytes of all its files."""

    commit: str
    manifest: str
    parent: str | None
    record: bytes


_REPOSITORY = (repositories.c.id, repositories.c.name, repositories.c.domain, repositories.c.updated)
_COMMIT = (commits.c.commit, commits.c.manifest, commits.c.parent, commits.c.record)


def find(connection: Connection, repo: RepoId) -> Repository | None:
    """The repository, or None."""
    row = connection.execute(sa.select(*_REPOSITORY).where(repositories.c.name == str(repo))).one_or_none()
    return None if row is None else Repository(*row)


def require(connection: Connection, repo: RepoId) -> Repository:
    """The repository; raises RepoNotFound."""
    found = find(connection, repo)
    if found is None:
        raise RepoNotFound(f"the registry has no repository {repo.id!r} ({repo.kind})")
    return found


def ensure(connection: Connection, repo: RepoId, domain: str, now: int) -> Repository:
    """The repository, made in that domain if there is none. Raises Conflict for one that lies in another."""
    values = {"name": str(repo), "kind": repo.kind, "domain": domain, "created": now, "updated": now}
    insert_new(connection, repositories, [values])
    found = require(connection, repo)
    if found.domain != domain:
        raise Conflict(
            f"{repo.id} ({repo.kind}) lies in the domain {found.domain}, but this registry's settings say {domain}",
            hint="Give all processes of the registry the same registry.tenants; docs/registry-domains.md says how a "
            "repository gets into another domain.",
        )
    return found


def listing(connection: Connection, kind: str | None) -> list[tuple[Repository, dict[str, str], dict[str, str]]]:
    """All repositories of a kind (or of all) with their refs and the kinds of those that are no branches, by name."""
    query = (
        sa.select(*_REPOSITORY, refs.c.name, refs.c.commit, refs.c.kind)
        .select_from(repositories.outerjoin(refs, refs.c.repository == repositories.c.id))
        .where(is_there())
        .order_by(repositories.c.name, refs.c.name)
    )
    if kind is not None:
        query = query.where(repositories.c.kind == kind)
    out: dict[int, tuple[Repository, dict[str, str], dict[str, str]]] = {}
    for *fields, ref, commit, is_ in connection.execute(query):
        _, found, kinds = out.setdefault(fields[0], (Repository(*fields), {}, {}))
        if ref is not None:
            found[ref] = commit
            if is_ != "branch":
                kinds[ref] = is_
    return list(out.values())


def count(connection: Connection) -> int:
    """How many repositories there are."""
    return connection.scalar(sa.select(sa.func.count()).select_from(repositories).where(is_there())) or 0


def refs_of(connection: Connection, repository: Repository) -> dict[str, str]:
    """The repository's refs, sorted by name."""
    query = sa.select(refs.c.name, refs.c.commit).where(refs.c.repository == repository.id).order_by(refs.c.name)
    return dict(connection.execute(query).all())


def kinds_of(connection: Connection, repository: Repository) -> dict[str, str]:
    """Those of the repository's refs that are no branches: name -> ``tag`` or ``alias``."""
    c = refs.c
    query = sa.select(c.name, c.kind).where(c.repository == repository.id, c.kind != "branch").order_by(c.name)
    return dict(connection.execute(query).all())


def ref_target(connection: Connection, repository: Repository, ref: str) -> str | None:
    """The commit that a ref names, or None where there is no such ref."""
    query = sa.select(refs.c.commit).where(refs.c.repository == repository.id, refs.c.name == ref)
    return connection.scalar(query)


def resolve(connection: Connection, repo: RepoId, rev: str) -> tuple[str, str, str, bool] | None:
    """The commit that a ref or a commit id names, its manifest's digest, the repository's domain, and whether that has
    notices, in one statement; None for neither."""
    noticed = sa.select(notices.c.commit).where(notices.c.repository == repositories.c.id).exists()
    query = sa.select(commits.c.commit, commits.c.manifest, repositories.c.domain, noticed)
    query = query.where(repositories.c.name == str(repo))
    query = query.join_from(commits, repositories, commits.c.repository == repositories.c.id)
    if is_commit(rev):
        query = query.where(commits.c.commit == rev)
    else:
        same = (refs.c.repository == repositories.c.id) & (refs.c.commit == commits.c.commit)
        query = query.join(refs, same).where(refs.c.name == rev)
    row = connection.execute(query).one_or_none()
    return None if row is None else (row[0], row[1], row[2], bool(row[3]))


def find_commit(connection: Connection, repository: Repository, commit: str) -> Commit | None:
    """A commit of the repository, or None."""
    query = sa.select(*_COMMIT).where(commits.c.repository == repository.id, commits.c.commit == commit)
    row = connection.execute(query).one_or_none()
    return None if row is None else Commit(*row)


def require_commit(connection: Connection, repository: Repository, commit: str) -> Commit:
    """A commit of the repository; raises RevisionNotFound."""
    found = find_commit(connection, repository, commit)
    if found is None:
        raise RevisionNotFound(f"{repository.name} has no commit {commit}")
    return found


def held_of(connection: Connection, repository: Repository, ids: Iterable[str]) -> set[str]:
    """Those of the commits that the repository has."""
    found: set[str] = set()
    for batch in batches(sorted(set(ids))):
        query = sa.select(commits.c.commit).where(commits.c.repository == repository.id, commits.c.commit.in_(batch))
        found |= set(connection.scalars(query))
    return found


def commits_of(connection: Connection, repository: Repository) -> list[tuple[str, str]]:
    """Every commit of a repository with its manifest's digest."""
    query = sa.select(commits.c.commit, commits.c.manifest).where(commits.c.repository == repository.id)
    return [(commit, manifest) for commit, manifest in connection.execute(query)]


def all_commits(connection: Connection) -> Iterator[tuple[str, RepoId, str, str]]:
    """Every commit: (domain, repository, commit, manifest digest)."""
    query = sa.select(repositories.c.domain, repositories.c.name, commits.c.commit, commits.c.manifest).join_from(
        commits, repositories, commits.c.repository == repositories.c.id
    )
    for domain, name, commit, manifest in connection.execute(query.where(is_there())):
        yield domain, RepoId.from_canonical(name), commit, manifest


def add_commit(
    connection: Connection, repository: Repository, record: CommitRecord, size: int, blobs: Iterable[str], now: int
) -> None:
    """Add a commit and make its blobs reachable through the repository; one that is there already stays as it is."""
    values = {
        "repository": repository.id,
        "commit": record.commit,
        "manifest": record.manifest,
        "parent": record.parent,
        "time": record.time,
        "size": size,
        "record": record.encode(),
        "touched": now,
    }
    insert_new(connection, commits, [values])
    _touch(connection, repository, [record.commit], now)
    rows = [{"repository": repository.id, "sha256": sha256} for sha256 in sorted(set(blobs))]
    insert_new(connection, repository_blobs, rows)


def holds_blob(connection: Connection, repository: Repository, sha256: str) -> bool:
    """Whether one of the repository's commits holds the blob."""
    query = sa.select(repository_blobs.c.sha256).where(
        repository_blobs.c.repository == repository.id, repository_blobs.c.sha256 == sha256
    )
    return connection.scalar(query) is not None


def blobs_of(connection: Connection, repository: Repository) -> list[str]:
    """The distinct blobs of a repository."""
    query = sa.select(repository_blobs.c.sha256).where(repository_blobs.c.repository == repository.id)
    return list(connection.scalars(query))


def domains_of(connection: Connection) -> list[tuple[RepoId, str]]:
    """Every repository, and the domain that it lies in; sorted by name."""
    query = sa.select(repositories.c.name, repositories.c.domain).where(is_there()).order_by(repositories.c.name)
    return [(RepoId.from_canonical(name), domain) for name, domain in connection.execute(query)]


def sizes(connection: Connection) -> dict[int, int]:
    """Bytes of the distinct blobs of every repository, by its number."""
    query = (
        sa.select(repository_blobs.c.repository, sa.func.sum(blobs.c.size))
        .join_from(repository_blobs, repositories, repository_blobs.c.repository == repositories.c.id)
        .join(blobs, (blobs.c.domain == repositories.c.domain) & (blobs.c.sha256 == repository_blobs.c.sha256))
        .group_by(repository_blobs.c.repository)
    )
    return {id_: int(size) for id_, size in connection.execute(query)}


def logical_bytes(connection: Connection, repository: Repository | None) -> int:
    """Bytes of all commits' files, each commit counted as a whole copy."""
    query = sa.select(sa.func.coalesce(sa.func.sum(commits.c.size), 0))
    if repository is not None:
        query = query.where(commits.c.repository == repository.id)
    else:
        query = query.where(commits.c.repository.in_(sa.select(repositories.c.id).where(is_there())))
    return int(connection.scalar(query) or 0)


def move_ref(
    connection: Connection,
    repository: Repository,
    ref: str,
    commit: str | None,
    *,
    expect: Expected,
    author: str,
    now: int,
    kind: str = "branch",
    tags_move: bool = False,
) -> bool:
    """Point a ref at a commit, or remove it (None), by compare-and-swap; returns whether it moved.

    ``kind`` is what a new ref becomes; one that is there keeps its own. Raises Conflict when the ref is not where
    ``expect`` says, and for a tag that is to point elsewhere unless ``tags_move``: an upstream may do as it likes with
    its own; RevisionNotFound when a ref to remove is not there.
    """
    row = connection.execute(
        sa.select(refs.c.commit, refs.c.kind).where(refs.c.repository == repository.id, refs.c.name == ref)
    ).one_or_none()
    old, found = (None, kind) if row is None else row
    if expect is not ... and old != expect:
        raise moved(repository.name, ref, old, expect)
    if old is None and commit is None:
        raise RevisionNotFound(f"{repository.name} has no ref {ref!r}")
    if old == commit:
        return False
    if found == "tag" and old is not None and commit is not None and not tags_move:
        raise Conflict(
            f"{repository.name}@{ref} is a tag, at {old}: tags don't move",
            hint="Choose another name; or remove the tag first, if nobody relies on it.",
        )
    where = (refs.c.repository == repository.id) & (refs.c.name == ref)
    if commit is None:
        connection.execute(refs.delete().where(where))
    elif old is None:
        connection.execute(
            refs.insert().values(repository=repository.id, name=ref, commit=commit, updated=now, kind=kind)
        )
    else:
        connection.execute(refs.update().where(where).values(commit=commit, updated=now))
    connection.execute(repositories.update().where(repositories.c.id == repository.id).values(updated=now))
    _touch(connection, repository, [id_ for id_ in (old, commit) if id_ is not None], now)
    _audit(connection, repository.name, ref, old, commit, author, now)
    return True


def moved(repo: str, ref: str, old: str | None, expect: Expected) -> Conflict:
    """The error for a ref that is elsewhere than expected."""
    return Conflict(
        f"{repo}@{ref} has moved: it is {old or 'gone'}, expected {expect or 'no such ref'}",
        hint="Somebody else published in the meantime; look at it and try again.",
    )


def set_kind(connection: Connection, repository: Repository, ref: str, kind: str) -> None:
    """Make a ref one of another kind, unless it is a tag: tags stay tags."""
    where = (refs.c.repository == repository.id) & (refs.c.name == ref) & (refs.c.kind != "tag")
    connection.execute(refs.update().where(where, refs.c.kind != kind).values(kind=kind))


def _touch(connection: Connection, repository: Repository, ids: list[str], now: int) -> None:
    """Note that commits were in use just now: they are kept for a while from here on (registry/gc)."""
    where = (commits.c.repository == repository.id) & commits.c.commit.in_(ids)
    connection.execute(commits.update().where(where).values(touched=now))


@dataclass(frozen=True, slots=True)
class Move:
    """A ref's way from a commit (None: it was new) to another (None: it was removed); ``time`` in unix seconds."""

    ref: str
    old: str | None
    new: str | None
    author: str
    time: int


def moves_of(
    connection: Connection, repo: RepoId, ref: str | None = None, limit: int | None = None, by: str = ""
) -> list[Move]:
    """The audit of a repository, or of one of its refs, newest first. It outlives the repository.

    ``by`` is how the author begins who made the moves.
    """
    c = ref_moves.c
    query = sa.select(c.ref, c.old, c.new, c.author, c.time).where(c.repository == str(repo)).order_by(c.id.desc())
    if ref is not None:
        query = query.where(c.ref == ref)
    if by:
        query = query.where(c.author.startswith(by, autoescape=True))
    return [Move(*row) for row in connection.execute(query.limit(limit))]


def _audit(
    connection: Connection, name: str, ref: str, old: str | None, new: str | None, author: str, now: int
) -> None:
    values = {"repository": name, "ref": ref, "old": old, "new": new, "author": author, "time": now}
    connection.execute(ref_moves.insert().values(values))


def holders(connection: Connection, domain: str, sha256: str) -> list[RepoId]:
    """The repositories that have a commit with the blob."""
    query = (
        sa.select(repositories.c.name)
        .join_from(repository_blobs, repositories, repository_blobs.c.repository == repositories.c.id)
        .where(repositories.c.domain == domain, repository_blobs.c.sha256 == sha256)
    )
    return [RepoId.from_canonical(name) for name in connection.scalars(query)]
