"""What people should know before they use a repository or a commit. Every function runs inside a transaction."""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from helios.errors import NotFound
from registry.metadata.repositories import Repository
from registry.metadata.tables import notices

WHOLE = ""
"""Stands for the repository as a whole where a commit stands for one."""


@dataclass(frozen=True, slots=True)
class Notice:
    """``commit`` is empty for the whole repository; ``state`` is ``deprecated`` or ``retired``; ``time`` in unix s."""

    commit: str
    state: str
    message: str
    replacement: str | None
    author: str
    time: int

    def text(self, what: str) -> str:
        """In one line, for people."""
        instead = "" if self.replacement is None else f"; use {self.replacement}"
        return f"{what} is {self.state}: {self.message}{instead}"


def put(connection: Connection, repository: Repository, notice: Notice) -> None:
    """Put a notice up, in place of the one that is there."""
    remove(connection, repository, notice.commit)
    values = {name: getattr(notice, name) for name in Notice.__slots__}
    connection.execute(notices.insert().values(repository=repository.id, **values))


def remove(connection: Connection, repository: Repository, commit: str) -> bool:
    """Take a notice down; whether there was one."""
    where = (notices.c.repository == repository.id) & (notices.c.commit == commit)
    return bool(connection.execute(notices.delete().where(where)).rowcount)


def take_down(connection: Connection, repository: Repository, commit: str) -> None:
    """Take a notice down. Raises NotFound where there is none."""
    if not remove(connection, repository, commit):
        raise NotFound(f"{repository.name} has no such notice")


def of(connection: Connection, repository: Repository, commit: str | None = None) -> list[Notice]:
    """A repository's notices, its own first; with ``commit`` only its own and those of this commit."""
    c = notices.c
    query = sa.select(c.commit, c.state, c.message, c.replacement, c.author, c.time)
    query = query.where(c.repository == repository.id).order_by(c.commit)
    if commit is not None:
        query = query.where(c.commit.in_([WHOLE, commit]))
    return [Notice(*row) for row in connection.execute(query)]
