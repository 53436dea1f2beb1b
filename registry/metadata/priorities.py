"""Priority classes in SQL. Every function runs inside a transaction."""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from helios.errors import Conflict, NotFound
from helios.names import RepoId
from registry.metadata.quota_tables import priorities

MOST = 10_000
"""Classes that may be given: all are kept in memory."""


@dataclass(frozen=True, slots=True)
class Given:
    """A class that somebody gave a repository (canonical name), or one of its refs (empty: all); ``time`` in unix s."""

    repo: str
    ref: str
    priority: str
    author: str
    time: int


def listing(connection: Connection) -> list[Given]:
    """All that were given, by repository and ref."""
    c = priorities.c
    query = sa.select(c.repository, c.ref, c.priority, c.author, c.time).order_by(c.repository, c.ref)
    return [Given(*row) for row in connection.execute(query)]


def put(connection: Connection, given: Given) -> None:
    """Give a class; an earlier one is replaced. Raises Conflict when there are too many."""
    c = priorities.c
    connection.execute(priorities.delete().where(c.repository == given.repo, c.ref == given.ref))
    if (connection.scalar(sa.select(sa.func.count()).select_from(priorities)) or 0) >= MOST:
        raise Conflict(f"{MOST} classes are given already; take some back (helios priority … --clear)")
    values = {"repository": given.repo, "ref": given.ref, "priority": given.priority}
    connection.execute(priorities.insert().values(values | {"author": given.author, "time": given.time}))


def remove(connection: Connection, repo: RepoId, ref: str) -> None:
    """Take a class back. Raises NotFound where none was given."""
    where = (priorities.c.repository == str(repo)) & (priorities.c.ref == ref)
    if not connection.execute(priorities.delete().where(where)).rowcount:
        raise NotFound(f"no class was given to {repo.id}{'@' + ref if ref else ''}")
