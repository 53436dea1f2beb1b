"""Repositories that were removed: gone for everybody in one step, and their rows in as many as it takes.

A removed repository keeps its number, by which its rows go, and nothing else: it has a name that nobody can ask for,
and lies in no domain, so it holds none of its commits and blobs any more. Every function runs inside a transaction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from helios.names import RepoId
from heliosfs.store.keys import commit_key, manifest_key
from registry.metadata.claims import doom
from registry.metadata.gc_tables import removals
from registry.metadata.repositories import Repository
from registry.metadata.tables import (
    GONE,
    commits,
    notices,
    quarantine,
    ref_moves,
    refs,
    repositories,
    repository_blobs,
    signatures,
)

ROWS: Final = 500
"""Most rows of a repository that go in one transaction, besides the leases on commits."""

_PARTS: Final = (
    (repository_blobs, repository_blobs.c.sha256),
    (quarantine, quarantine.c.sha256),
    (signatures, signatures.c.commit),
    (notices, notices.c.commit),
    (refs, refs.c.name),
)


@dataclass(frozen=True, slots=True)
class Removal:
    """A repository that was removed, by its number, with the name and the domain that it had."""

    number: int
    name: str
    domain: str


def begin(connection: Connection, repository: Repository, *, author: str, now: int) -> None:
    """Remove a repository with its commits and refs: from here on there is none of that name."""
    moved = sa.select(
        sa.literal(repository.name), refs.c.name, refs.c.commit, sa.null(), sa.literal(author), sa.literal(now)
    )
    moved = moved.where(refs.c.repository == repository.id).order_by(refs.c.name)
    audit = ref_moves.insert().from_select(["repository", "ref", "old", "new", "author", "time"], moved)
    connection.execute(audit)
    connection.execute(
        removals.insert().values(repository=repository.id, name=repository.name, domain=repository.domain)
    )
    where = repositories.c.id == repository.id
    connection.execute(repositories.update().where(where).values(name=f"-{repository.id}", domain=GONE))


def under_way(connection: Connection) -> Removal | None:
    """One of the repositories that were removed and have rows still."""
    c = removals.c
    row = connection.execute(sa.select(c.repository, c.name, c.domain).order_by(c.repository).limit(1)).one_or_none()
    return None if row is None else Removal(*row)


def go_on(connection: Connection, removal: Removal, until: float) -> None:
    """Remove some of the rows of a removed repository, in the end its own.

    Records in the store are deleted after ``until``, of the database's clock, unless another commit has them.
    """
    if _remove_commits(connection, removal, until):
        return
    for table, key in _PARTS:
        some = sa.select(key).where(table.c.repository == removal.number).order_by(key).limit(ROWS)
        if connection.execute(table.delete().where(table.c.repository == removal.number, key.in_(some))).rowcount:
            return
    connection.execute(repositories.delete().where(repositories.c.id == removal.number))


def _remove_commits(connection: Connection, removal: Removal, until: float) -> bool:
    query = sa.select(commits.c.commit, commits.c.manifest).where(commits.c.repository == removal.number)
    found = dict(connection.execute(query.order_by(commits.c.commit).limit(ROWS)).all())
    repo = RepoId.from_canonical(removal.name)
    records = {commit_key(removal.domain, repo, commit) for commit in found}
    records |= {manifest_key(removal.domain, digest) for digest in found.values()}
    doom(connection, records, until)
    where = (commits.c.repository == removal.number) & commits.c.commit.in_(sorted(found))
    connection.execute(commits.delete().where(where))
    return bool(found)
