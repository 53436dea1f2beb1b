"""Garbage in SQL: which commits are kept and why, what is condemned, and removing it. Every function runs inside a
transaction; times are seconds of the database's clock.

Removing asks again, in the writing transaction that removes, whether what was condemned is garbage still. So a mark is
never believed; it only says since when something has been garbage.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from registry.metadata.claims import claimed, of_blob
from registry.metadata.content import drop_objects, is_needed
from registry.metadata.database import batches, insert_new
from registry.metadata.gc_tables import condemned_blobs, condemned_commits, pins
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

# --- which commits stay, and why ---


@dataclass(frozen=True, slots=True)
class Keep:
    """How long a commit stays that was in use, in seconds, and whether the parents of those that refs name stay."""

    seconds: float
    history: bool = False


def _ancestors() -> sa.CTE:
    """(repository, commit) of every commit that a ref points at, and of its parents as far as they are held."""
    found = sa.select(refs.c.repository, refs.c.commit).cte("ancestors", recursive=True)
    parents = sa.select(commits.c.repository, commits.c.parent).join(
        found, (commits.c.repository == found.c.repository) & (commits.c.commit == found.c.commit)
    )
    return found.union(parents.where(commits.c.parent.is_not(None)))


def roots(now: float, keep: Keep) -> dict[str, sa.ColumnElement[bool]]:
    """Conditions on a row of ``commits``, any of which keeps it: why -> condition."""
    c = commits.c
    followed = sa.select(mirror_refs.c.ref).join(repositories, repositories.c.name == mirror_refs.c.repository)
    followed = followed.where(
        repositories.c.id == c.repository,
        sa.or_(mirror_refs.c.commit == c.commit, mirror_refs.c.pending == c.commit),
    )
    named = sa.select(refs.c.name).where(refs.c.repository == c.repository, refs.c.commit == c.commit)
    history = _ancestors().c
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
    out = {"all": connection.scalar(sa.select(sa.func.count()).select_from(commits)) or 0}
    before: list[sa.ColumnElement[bool]] = []
    for why, holds in roots(now, keep).items():
        query = sa.select(sa.func.count()).select_from(commits).where(holds, *(~other for other in before))
        out[why] = connection.scalar(query) or 0
        before.append(holds)
    return out


def _garbage(now: float, keep: Keep) -> sa.ColumnElement[bool]:
    return ~sa.or_(*roots(now, keep).values())


def unreachable(connection: Connection, now: float, keep: Keep) -> list[tuple[int, str, str]]:
    """Every commit that nothing keeps: (repository, commit, manifest)."""
    query = sa.select(commits.c.repository, commits.c.commit, commits.c.manifest).where(_garbage(now, keep))
    return [(number, commit, manifest) for number, commit, manifest in connection.execute(query)]


def _unheld() -> sa.ColumnElement[bool]:
    """Whether no repository holds the row of ``blobs``, which one held once."""
    held = sa.select(repository_blobs.c.sha256).join(repositories, repository_blobs.c.repository == repositories.c.id)
    held = held.where(repository_blobs.c.sha256 == blobs.c.sha256, repositories.c.domain == blobs.c.domain)
    return ~held.exists() & blobs.c.pending.is_(False)


def unheld_blobs(connection: Connection, domain: str) -> list[str]:
    """Every blob that a commit held once and none does now."""
    return list(connection.scalars(sa.select(blobs.c.sha256).where(blobs.c.domain == domain, _unheld())))


# --- the mark ---


def condemn_commits(connection: Connection, now: float, keep: Keep, limit: int) -> int:
    """Condemn at most so many commits that nothing keeps; returns how many."""
    c, marked = commits.c, condemned_commits.c
    seen = sa.select(marked.commit).where(marked.repository == c.repository, marked.commit == c.commit).exists()
    query = sa.select(c.repository, c.commit).where(_garbage(now, keep), ~seen).limit(limit)
    found = [{"repository": number, "commit": commit, "since": now} for number, commit in connection.execute(query)]
    insert_new(connection, condemned_commits, found)
    return len(found)


def acquit_commits(connection: Connection, now: float, keep: Keep) -> int:
    """Take commits that something keeps again from the list; returns how many."""
    marked = condemned_commits.c
    kept_ = sa.select(commits.c.commit).where(
        commits.c.repository == marked.repository, commits.c.commit == marked.commit, ~_garbage(now, keep)
    )
    return connection.execute(condemned_commits.delete().where(kept_.exists())).rowcount


def condemn_blobs(connection: Connection, domain: str, now: float, limit: int) -> int:
    """Condemn at most so many blobs that no commit holds any more; returns how many."""
    marked = condemned_blobs.c
    seen = sa.select(marked.sha256).where(marked.domain == blobs.c.domain, marked.sha256 == blobs.c.sha256).exists()
    query = sa.select(blobs.c.sha256).where(blobs.c.domain == domain, _unheld(), ~seen).limit(limit)
    found = [{"domain": domain, "sha256": sha256, "since": now} for sha256 in connection.scalars(query)]
    insert_new(connection, condemned_blobs, found)
    return len(found)


def acquit_blobs(connection: Connection, domain: str) -> int:
    """Take blobs that a commit holds again from the list; returns how many."""
    marked = condemned_blobs.c
    kept_ = sa.select(blobs.c.sha256).where(
        blobs.c.domain == marked.domain, blobs.c.sha256 == marked.sha256, ~_unheld()
    )
    return connection.execute(condemned_blobs.delete().where(marked.domain == domain, kept_.exists())).rowcount


def count_condemned(connection: Connection) -> tuple[int, int]:
    """How many commits and blobs are condemned."""
    commits_ = connection.scalar(sa.select(sa.func.count()).select_from(condemned_commits)) or 0
    return commits_, connection.scalar(sa.select(sa.func.count()).select_from(condemned_blobs)) or 0


# --- the sweep ---


def due_commits(connection: Connection, before: float, limit: int) -> tuple[Repository, dict[str, float]] | None:
    """Commits of one repository that were condemned before that time: commit -> since when; None where there are
    none."""
    c = condemned_commits.c
    number = connection.scalar(sa.select(c.repository).where(c.since <= before).order_by(c.repository).limit(1))
    if number is None:
        return None
    query = sa.select(c.commit, c.since).where(c.repository == number, c.since <= before).order_by(c.commit)
    return repository(connection, number), dict(connection.execute(query.limit(limit)).all())


def acquit(connection: Connection, repository: Repository, ids: Collection[str]) -> None:
    """Take these commits of the repository from the list."""
    where = condemned_commits.c.repository == repository.id
    connection.execute(condemned_commits.delete().where(where, condemned_commits.c.commit.in_(sorted(ids))))


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
    query = sa.select(commits.c.commit, commits.c.manifest).where(where, _garbage(now, keep))
    return dict(connection.execute(query).all())


def remove_commits(
    connection: Connection, repository: Repository, ids: Collection[str], lost: Iterable[str], since: float
) -> None:
    """Remove commits, and the blobs that no other commit of the repository holds from what it shows.

    Blobs that no repository shows then are condemned, as having been so since that time.
    """
    asked = (mirror_snapshots.c.repository == repository.name) & mirror_snapshots.c.commit.in_(sorted(ids))
    connection.execute(mirror_snapshots.update().where(asked).values(published=False))  # who asks gets it once more
    for table in (signatures, commits):  # what points at a commit goes with it
        where = (table.c.repository == repository.id) & table.c.commit.in_(sorted(ids))
        connection.execute(table.delete().where(where))
    for batch in batches(sorted(lost)):
        for table in (quarantine, repository_blobs):
            where = (table.c.repository == repository.id) & table.c.sha256.in_(batch)
            connection.execute(table.delete().where(where))
        query = sa.select(blobs.c.sha256).where(blobs.c.domain == repository.domain, blobs.c.sha256.in_(batch))
        found = list(connection.scalars(query.where(_unheld())))
        rows = [{"domain": repository.domain, "sha256": sha256, "since": since} for sha256 in found]
        insert_new(connection, condemned_blobs, rows)


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
