"""What people should know before they use a repository or a commit, and what counts where two registries spoke.

Every function with a connection runs inside a transaction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from helios.errors import Conflict, InvalidInput, NotFound
from helios.names import is_commit
from registry.metadata.repositories import Repository
from registry.metadata.tables import notices

WHOLE: Final = ""
"""Stands for the repository as a whole where a commit stands for one."""
STATES: Final = ("deprecated", "retired")
MAX_TEXT: Final = 1000
"""Longest message, replacement and author, in characters."""
REPLICA: Final = "replica of "
"""How the author of what a replication did begins; the peer's address follows."""


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


def check(notice: Notice) -> None:
    """Raises InvalidInput for a notice that nobody should read."""
    texts = (notice.message, notice.replacement or "", notice.author)
    if not notice.message.strip() or max(map(len, texts)) > MAX_TEXT or any("\n" in text for text in texts):
        raise InvalidInput(f"a notice has a message, and each text one line of at most {MAX_TEXT} characters")
    if notice.state not in STATES:
        raise InvalidInput(f"a notice says {notice.state[:80]!r}; it says {' or '.join(STATES)}")
    if notice.commit != WHOLE and not is_commit(notice.commit):
        raise InvalidInput(f"{notice.commit[:80]!r} is not a commit: resolve a ref first")
    if not 0 <= notice.time < 1 << 53:
        raise InvalidInput(f"a notice's time is {notice.time}, which is no time in unix seconds")


@dataclass(frozen=True, slots=True)
class Heeded:
    """What follows from another registry's notices: notices to put up, and commits whose notice to take down.

    ``ignored`` are retirements that don't count here.
    """

    up: list[Notice] = field(default_factory=list)
    down: list[str] = field(default_factory=list)
    ignored: list[Notice] = field(default_factory=list)

    @property
    def changes(self) -> int:
        return len(self.up) + len(self.down)


def heed(here: Sequence[Notice], told: Sequence[Notice], source: str, *, complete: bool) -> Heeded:
    """What another registry's notices (``told``) change here; its own are those whose author is ``source``.

    Where nobody else said something it is followed; with ``complete`` also in what it took down. What somebody else put
    up stays, but that a later retirement takes the place of a deprecation.
    """
    out, by_commit, named = Heeded(), {notice.commit: notice for notice in here}, set()
    for notice in told:
        named.add(notice.commit)
        old, new = by_commit.get(notice.commit), replace(notice, author=source)
        if old is None or old.author == source:
            if old != new:
                out.up.append(new)
        elif new.state == "retired" and old.state != "retired":
            (out.up if new.time > old.time else out.ignored).append(new)
    if complete:
        out.down.extend(notice.commit for notice in here if notice.author == source and notice.commit not in named)
    return out


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
    """Take a notice down. Raises NotFound where there is none, and Conflict for one that a replication keeps up."""
    where = (notices.c.repository == repository.id) & (notices.c.commit == commit)
    author = connection.scalar(sa.select(notices.c.author).where(where)) or ""
    if author.startswith(REPLICA):
        raise Conflict(
            f"the notice on {repository.name} is there as a {author}: the next replication would put it up again",
            hint="Take it down there; or put one of your own up here, which stays whatever is said there.",
        )
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
