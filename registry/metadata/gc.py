"""Garbage in SQL: which commits are kept and why, what is condemned, and removing it. Every function runs inside a
transaction; times are seconds of the database's clock.

Removing asks again, in the writing transaction that removes, whether what was condemned is garbage still. So a mark is
never believed; it only says since when something has been garbage.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from registry.metadata.claims import claimed, of_blob
from registry.metadata.content import drop_objects, is_held, is_needed
from registry.metadata.database import batches, insert_new
from registry.metadata.gc_tables import condemned_blobs, condemned_commits, pins, recounts, removals
from registry.metadata.mirror_tables import mirror_refs, mirror_snapshots
from registry.metadata.repositories import Repository
from registry.metadata.tables import (
    blob_objects,
    blobs,
    claims,
    commits,
    doomed,
    objects,
    quarantine,
    refs,
    repositories,
    repository_blobs,
    signatures,
)

Owner = TypeVar("Owner", int, str)
"""A repository's number or a domain."""

# --- which commits stay, and why ---


@dataclass(frozen=True, slots=True)
class Keep:
    """How long a commit stays that was in use, in seconds, and whether the parents of those that refs name stay."""

    seconds: float
    history: bool = False


def _ancestors(repository: int | None) -> sa.CTE:
    """(repository, commit) of every commit that a ref points at, and of its parents as far as they are held; of one
    repository alone where that is all that is asked for."""
    named = sa.select(refs.c.repository, refs.c.commit)
    if repository is not None:
        named = named.where(refs.c.repository == repository)
    found = named.cte("ancestors", recursive=True)
    parents = sa.select(commits.c.repository, commits.c.parent).join(
        found, (commits.c.repository == found.c.repository) & (commits.c.commit == found.c.commit)
    )
    return found.union(parents.where(commits.c.parent.is_not(None)))


def roots(now: float, keep: Keep, repository: int | None = None) -> dict[str, sa.ColumnElement[bool]]:
    """Conditions on a row of ``commits``, any of which keeps it: why -> condition. The row may be known to be of one
    repository."""
    c = commits.c
    followed = sa.select(mirror_refs.c.ref).join(repositories, repositories.c.name == mirror_refs.c.repository)
    followed = followed.where(
        repositories.c.id == c.repository,
        sa.or_(mirror_refs.c.commit == c.commit, mirror_refs.c.pending == c.commit),
    )
    named = sa.select(refs.c.name).where(refs.c.repository == c.repository, refs.c.commit == c.commit)
    history = _ancestors(repository).c
    held = sa.select(history.commit).where(history.repository == c.repository, history.commit == c.commit)
    return {
        "refs": sa.or_(named.exists(), followed.exists()),
        "history": held.exists() if keep.history else sa.false(),
        "pinned": sa.select(pins.c.holder)
        .where(pins.c.repository == c.repository, pins.c.commit == c.commit, pins.c.expires > now)
        .exists(),
        "recent": c.touched > now - keep.seconds,
    }


def kept(connection: Connection, now: float, keep: Keep) -> dict[str, int]:
    """How many commits there are (``all``), and how many are kept for each reason, the first that holds."""
    out = {"all": connection.scalar(sa.select(sa.func.count()).select_from(commits).where(_is_there())) or 0}
    before: list[sa.ColumnElement[bool]] = []
    for why, holds in roots(now, keep).items():
        query = sa.select(sa.func.count()).select_from(commits).where(_is_there(), holds, *(~other for other in before))
        out[why] = connection.scalar(query) or 0
        before.append(holds)
    return out


def _is_there() -> sa.ColumnElement[bool]:
    """Whether the commit is of a repository that was not removed."""
    return commits.c.repository.not_in(sa.select(removals.c.repository))


def _garbage(now: float, keep: Keep, repository: int | None = None) -> sa.ColumnElement[bool]:
    return _is_there() & ~sa.or_(*roots(now, keep, repository).values())


def unreachable(connection: Connection, now: float, keep: Keep) -> list[tuple[int, str, str]]:
    """Every commit that nothing keeps: (repository, commit, manifest)."""
    query = sa.select(commits.c.repository, commits.c.commit, commits.c.manifest).where(_garbage(now, keep))
    return [(number, commit, manifest) for number, commit, manifest in connection.execute(query)]


def _unheld() -> sa.ColumnElement[bool]:
    """Whether no repository of its domain holds the row of ``blobs``, which one held once."""
    return ~is_held() & blobs.c.pending.is_(False)


def unheld_blobs(connection: Connection, domain: str) -> list[str]:
    """Every blob that a commit held once and none does now."""
    return list(connection.scalars(sa.select(blobs.c.sha256).where(blobs.c.domain == domain, _unheld())))


# --- the mark ---


def commits_to_condemn(connection: Connection, now: float, keep: Keep, limit: int) -> list[tuple[int, str]]:
    """At most so many commits that nothing keeps and that are not condemned: (repository, commit)."""
    c, marked = commits.c, condemned_commits.c
    seen = sa.select(marked.commit).where(marked.repository == c.repository, marked.commit == c.commit).exists()
    query = sa.select(c.repository, c.commit).where(_garbage(now, keep), ~seen).limit(limit)
    return [(number, commit) for number, commit in connection.execute(query)]


def condemn_commits(connection: Connection, found: Collection[tuple[int, str]], now: float, keep: Keep) -> None:
    """Condemn those of the commits that nothing keeps."""
    for number, ids in _grouped(found).items():
        where = (commits.c.repository == number) & commits.c.commit.in_(ids)
        query = sa.select(commits.c.commit).where(where, _garbage(now, keep, number))
        rows = [{"repository": number, "commit": commit, "since": now} for commit in connection.scalars(query)]
        insert_new(connection, condemned_commits, rows)


def commits_to_acquit(connection: Connection, now: float, keep: Keep, limit: int) -> list[tuple[int, str]]:
    """At most so many condemned commits that something keeps again: (repository, commit)."""
    marked = condemned_commits.c
    query = sa.select(marked.repository, marked.commit).join(
        commits, (commits.c.repository == marked.repository) & (commits.c.commit == marked.commit)
    )
    query = query.where(_is_there(), ~_garbage(now, keep)).limit(limit)
    return [(number, commit) for number, commit in connection.execute(query)]


def acquit_commits(connection: Connection, found: Collection[tuple[int, str]]) -> None:
    """Take commits from the list: what is garbage nevertheless is condemned anew, and stays as much longer."""
    c = condemned_commits.c
    for number, ids in _grouped(found).items():
        connection.execute(condemned_commits.delete().where(c.repository == number, c.commit.in_(ids)))


def blobs_to_condemn(connection: Connection, limit: int) -> list[tuple[str, str]]:
    """At most so many blobs that no commit of their domain holds any more, and that are not condemned: (domain,
    sha256)."""
    marked = condemned_blobs.c
    seen = sa.select(marked.sha256).where(marked.domain == blobs.c.domain, marked.sha256 == blobs.c.sha256).exists()
    query = sa.select(blobs.c.domain, blobs.c.sha256).where(_unheld(), ~seen).limit(limit)
    return [(domain, sha256) for domain, sha256 in connection.execute(query)]


def condemn_blobs(connection: Connection, found: Collection[tuple[str, str]], now: float) -> None:
    """Condemn those of the blobs that no commit of their domain holds."""
    for domain, digests in _grouped(found).items():
        query = sa.select(blobs.c.sha256).where(blobs.c.domain == domain, blobs.c.sha256.in_(digests), _unheld())
        rows = [{"domain": domain, "sha256": sha256, "since": now} for sha256 in connection.scalars(query)]
        insert_new(connection, condemned_blobs, rows)


def blobs_to_acquit(connection: Connection, limit: int) -> list[tuple[str, str]]:
    """At most so many condemned blobs that a commit holds again: (domain, sha256)."""
    marked = condemned_blobs.c
    query = sa.select(marked.domain, marked.sha256).join(
        blobs, (blobs.c.domain == marked.domain) & (blobs.c.sha256 == marked.sha256)
    )
    query = query.where(~_unheld()).limit(limit)
    return [(domain, sha256) for domain, sha256 in connection.execute(query)]


def acquit_blobs(connection: Connection, found: Collection[tuple[str, str]]) -> None:
    """Take blobs from the list, as ``acquit_commits``."""
    c = condemned_blobs.c
    for domain, digests in _grouped(found).items():
        connection.execute(condemned_blobs.delete().where(c.domain == domain, c.sha256.in_(digests)))


def _grouped(found: Iterable[tuple[Owner, str]]) -> dict[Owner, list[str]]:
    out: dict[Owner, list[str]] = {}
    for owner, name in found:
        out.setdefault(owner, []).append(name)
    return out


def count_condemned(connection: Connection) -> tuple[int, int]:
    """How many commits and blobs are condemned."""
    commits_ = connection.scalar(sa.select(sa.func.count()).select_from(condemned_commits)) or 0
    return commits_, connection.scalar(sa.select(sa.func.count()).select_from(condemned_blobs)) or 0


# --- the sweep ---


def due_commits(connection: Connection, before: float, limit: int) -> tuple[Repository, dict[str, float]] | None:
    """Commits of one repository that were condemned before that time: commit -> since when; None where there are
    none."""
    c = condemned_commits.c
    there = c.repository.not_in(sa.select(removals.c.repository))
    number = connection.scalar(sa.select(c.repository).where(c.since <= before, there).order_by(c.repository).limit(1))
    if number is None:
        return None
    query = sa.select(c.commit, c.since).where(c.repository == number, c.since <= before).order_by(c.commit)
    return repository(connection, number), dict(connection.execute(query.limit(limit)).all())


def repository(connection: Connection, number: int) -> Repository:
    """A repository by its number."""
    r = repositories.c
    return Repository(*connection.execute(sa.select(r.id, r.name, r.domain, r.updated).where(r.id == number)).one())


def shown_by(connection: Connection, repository: Repository) -> list[str]:
    """The blobs that a repository shows."""
    return list(
        connection.scalars(sa.select(repository_blobs.c.sha256).where(repository_blobs.c.repository == repository.id))
    )


def shown_nowhere_besides(connection: Connection, domain: str, lost: Mapping[int, Collection[str]]) -> set[str]:
    """The blobs that no repository of the domain would show, if each lost these: number -> blobs."""
    holders: dict[str, set[int]] = {}
    for number, digests in lost.items():
        for sha256 in digests:
            holders.setdefault(sha256, set()).add(number)
    c = repository_blobs.c
    for batch in batches(sorted(holders)):
        query = sa.select(c.repository, c.sha256).join(repositories, repositories.c.id == c.repository)
        for number, sha256 in connection.execute(query.where(repositories.c.domain == domain, c.sha256.in_(batch))):
            if number not in holders[sha256] or sha256 not in lost[number]:
                holders[sha256].add(-1)
    return {sha256 for sha256, numbers in holders.items() if -1 not in numbers}


def manifests_besides(connection: Connection, repository: Repository, dying: Collection[str]) -> set[str]:
    """Digests of the manifests of the repository's commits other than these."""
    query = sa.select(commits.c.manifest).where(commits.c.repository == repository.id)
    return set(connection.scalars(query.where(commits.c.commit.not_in(sorted(dying))).distinct()))


def still_garbage(
    connection: Connection, repository: Repository, ids: Collection[str], now: float, keep: Keep
) -> dict[str, str]:
    """Those of the repository's commits that nothing keeps: commit -> manifest."""
    where = (commits.c.repository == repository.id) & commits.c.commit.in_(sorted(ids))
    query = sa.select(commits.c.commit, commits.c.manifest).where(where, _garbage(now, keep, repository.id))
    return dict(connection.execute(query).all())


def remove_commits(connection: Connection, repository: Repository, ids: Collection[str], since: float) -> None:
    """Remove commits. What the repository shows is recounted later: what it loses has been garbage since that time."""
    asked = (mirror_snapshots.c.repository == repository.name) & mirror_snapshots.c.commit.in_(sorted(ids))
    connection.execute(mirror_snapshots.update().where(asked).values(published=False))  # who asks gets it once more
    for table in (signatures, commits):  # what points at a commit goes with it
        where = (table.c.repository == repository.id) & table.c.commit.in_(sorted(ids))
        connection.execute(table.delete().where(where))
    insert_new(connection, recounts, [{"repository": repository.id, "since": since}])


def to_recount(connection: Connection, after: int) -> tuple[Repository, float] | None:
    """The first repository from the one that follows that may show more than its commits hold, and since when."""
    c = recounts.c
    there = c.repository.not_in(sa.select(removals.c.repository))
    query = sa.select(c.repository, c.since).where(c.repository > after, there).order_by(c.repository).limit(1)
    row = connection.execute(query).one_or_none()
    return None if row is None else (repository(connection, row[0]), row[1])


def all_to_recount(connection: Connection) -> list[int]:
    """The numbers of all such repositories."""
    there = recounts.c.repository.not_in(sa.select(removals.c.repository))
    return list(connection.scalars(sa.select(recounts.c.repository).where(there)))


def remove_shown(connection: Connection, repository: Repository, lost: Collection[str], since: float) -> None:
    """Remove blobs that no commit of the repository holds from what it shows.

    Those that no repository shows then are condemned, as having been garbage since that time.
    """
    for table in (quarantine, repository_blobs):
        where = (table.c.repository == repository.id) & table.c.sha256.in_(sorted(lost))
        connection.execute(table.delete().where(where))
    condemn_blobs(connection, [(repository.domain, sha256) for sha256 in sorted(lost)], since)


def recounted(connection: Connection, repository: Repository) -> None:
    """The repository shows what its commits hold."""
    connection.execute(recounts.delete().where(recounts.c.repository == repository.id))


def due_blobs(connection: Connection, domain: str, before: float, after: str, limit: int) -> list[tuple[str, int]]:
    """Blobs that were condemned before that time, with their sizes, from the one that follows ``after``."""
    c = condemned_blobs.c
    query = sa.select(blobs.c.sha256, blobs.c.size).join_from(
        condemned_blobs, blobs, (c.domain == blobs.c.domain) & (c.sha256 == blobs.c.sha256)
    )
    query = query.where(c.domain == domain, c.since <= before, c.sha256 > after).order_by(c.sha256).limit(limit)
    return [(sha256, size) for sha256, size in connection.execute(query)]


@dataclass(frozen=True, slots=True)
class Removed:
    """Blobs that were removed, those that a session needs, and what went with them: objects and their bytes."""

    blobs: list[str]
    claimed: list[str]
    objects: int
    bytes: int


def remove_blobs(connection: Connection, domain: str, digests: Collection[str], until: float) -> Removed:
    """Remove those of the condemned blobs that no commit holds and no session relies on, by name or by an object.

    Objects that nobody needs then are doomed, to be deleted after ``until``.
    """
    wanted = sorted(digests)
    where = (blobs.c.domain == domain) & blobs.c.sha256.in_(wanted)
    garbage = set(connection.scalars(sa.select(blobs.c.sha256).where(where, _unheld())))
    kept_ = condemned_blobs.c.domain == domain
    connection.execute(
        condemned_blobs.delete().where(kept_, condemned_blobs.c.sha256.in_(sorted(set(wanted) - garbage)))
    )
    taken = {key.partition(":")[2] for key in claimed(connection, {of_blob(domain, sha256) for sha256 in garbage})}
    query = sa.select(blob_objects.c.sha256).join(objects, blob_objects.c.object == objects.c.id)
    query = query.join(claims, claims.c.key == objects.c.key)
    query = query.where(blob_objects.c.domain == domain, blob_objects.c.sha256.in_(sorted(garbage)))
    taken |= set(connection.scalars(query))
    gone = sorted(garbage - taken)
    needed = sa.select(blob_objects.c.object).where(blob_objects.c.domain == domain, blob_objects.c.sha256.in_(gone))
    numbers = sorted(set(connection.scalars(needed)))
    for batch in batches(numbers):
        later = objects.c.id.in_(batch) & (objects.c.keep_until < until)
        connection.execute(objects.update().where(later).values(keep_until=until))
    for table in (blob_objects, blobs):
        connection.execute(table.delete().where(table.c.domain == domain, table.c.sha256.in_(gone)))
    unneeded: dict[int, str] = {}
    size = 0
    for batch in batches(numbers):
        rows = connection.execute(
            sa.select(objects.c.id, objects.c.key, objects.c.size).where(objects.c.id.in_(batch), ~is_needed())
        )
        for number, key, length in rows:
            unneeded[number] = key
            size += length
    drop_objects(connection, unneeded)
    return Removed(gone, sorted(taken), len(unneeded), size)


def count_waiting(connection: Connection) -> int:
    """Objects that will be deleted once nobody can know of them any more."""
    return connection.scalar(sa.select(sa.func.count()).select_from(doomed)) or 0


def objects_of(connection: Connection, domain: str, digests: Collection[str]) -> dict[int, tuple[str, int]]:
    """Objects that none but these blobs need: number -> (key, size)."""
    users: dict[int, int] = {}
    for batch in batches(sorted(digests)):
        query = sa.select(blob_objects.c.object, sa.func.count()).group_by(blob_objects.c.object)
        query = query.where(blob_objects.c.domain == domain, blob_objects.c.sha256.in_(batch))
        for number, count in connection.execute(query):
            users[number] = users.get(number, 0) + count
    out: dict[int, tuple[str, int]] = {}
    for batch in batches(sorted(users)):
        query = sa.select(objects.c.id, objects.c.key, objects.c.size, sa.func.count())
        query = query.join_from(objects, blob_objects, blob_objects.c.object == objects.c.id)
        query = query.where(objects.c.id.in_(batch)).group_by(objects.c.id, objects.c.key, objects.c.size)
        out.update({n: (key, size) for n, key, size, count in connection.execute(query) if count == users[n]})
    return out
