"""What processes do for each other, in SQL: who brings a content, and what was uploaded at any of them.

Where one process uses the database these rows are its own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from registry.metadata.database import Kind, batches, insert_new
from registry.metadata.sharing_tables import flights, uploaded, uploads
from registry.metadata.tables import processes

# --- who brings a content ---


@dataclass(frozen=True, slots=True)
class Owner:
    """A process at work, and where others reach it ("": nowhere)."""

    process: str
    url: str


def owner(connection: Connection, content: str, kind: Kind) -> Owner | None:
    """Who brings the content; None where nobody does, or who did is dead: its lease is over, or it is connected no more
    and said that it would be. Then it may live, and two bring the same."""
    p = processes.c
    alive = (p.expires >= kind.now) & (p.guard.is_(None) | kind.held(p.guard))
    query = (
        sa.select(processes.c.id, processes.c.url)
        .join_from(flights, processes, flights.c.process == processes.c.id)
        .where(flights.c.content == content, alive)
    )
    row = connection.execute(query).one_or_none()
    return None if row is None else Owner(*row)


def take(connection: Connection, content: str, process: str, kind: Kind, gone: str | None) -> Owner | None:
    """Have the process bring the content, unless another one does that is alive and is not ``gone``: then that one."""
    found = owner(connection, content, kind)
    if found is not None and found.process not in (process, gone):
        return found
    connection.execute(flights.delete().where(flights.c.content == content))
    connection.execute(flights.insert().values(content=content, process=process))
    return None


def leave(connection: Connection, content: str, process: str) -> None:
    """The process does not bring the content any more."""
    connection.execute(flights.delete().where(flights.c.content == content, flights.c.process == process))


def url_of(connection: Connection, process: str, now: sa.ColumnElement[float]) -> str | None:
    """Where a process is reached ("": nowhere); None for one that is not at work."""
    query = sa.select(processes.c.url).where(processes.c.id == process, processes.c.expires >= now)
    return connection.scalar(query)


# --- what was uploaded ---


def begin_upload(connection: Connection, session: str, repository: str, process: str, now: float) -> None:
    """Note the session of a process' uploads to a repository."""
    connection.execute(uploads.insert().values(session=session, repository=repository, process=process, used=now))


def add_uploaded(connection: Connection, session: str, sha256: str) -> None:
    """The session has stored a blob."""
    insert_new(connection, uploaded, [{"session": session, "sha256": sha256}])


def was_uploaded(connection: Connection, repository: str, sha256: str) -> bool:
    """Whether a blob waits for a commit of the repository, at whatever process it arrived."""
    query = (
        sa.select(uploaded.c.sha256)
        .join_from(uploaded, uploads, uploaded.c.session == uploads.c.session)
        .where(uploads.c.repository == repository, uploaded.c.sha256 == sha256)
    )
    return connection.execute(query.limit(1)).first() is not None


def take_uploaded(connection: Connection, repository: str, digests: Iterable[str]) -> None:
    """A commit of the repository holds these blobs: they do not wait any more."""
    mine = sa.select(uploads.c.session).where(uploads.c.repository == repository)
    for batch in batches(sorted(set(digests))):
        connection.execute(uploaded.delete().where(uploaded.c.session.in_(mine), uploaded.c.sha256.in_(batch)))


def count_uploaded(connection: Connection) -> int:
    """How many blobs wait."""
    return connection.scalar(sa.select(sa.func.count()).select_from(uploaded)) or 0


def with_uploaded(connection: Connection, sessions: Collection[str]) -> set[str]:
    """Those of the sessions for whose blobs a commit may come."""
    found: set[str] = set()
    for batch in batches(sorted(sessions)):
        query = sa.select(uploaded.c.session).where(uploaded.c.session.in_(batch)).distinct()
        found |= set(connection.scalars(query))
    return found


def touch_uploads(connection: Connection, sessions: Collection[str], now: float) -> None:
    """The sessions are in use."""
    for batch in batches(sorted(sessions)):
        connection.execute(uploads.update().where(uploads.c.session.in_(batch)).values(used=now))


def upload_sessions(connection: Connection) -> list[str]:
    """All sessions of uploads."""
    return list(connection.scalars(sa.select(uploads.c.session)))


def dead_uploads(connection: Connection, idle_before: float, now: sa.ColumnElement[float]) -> list[str]:
    """Sessions of processes that are dead which nobody has used for long, or whose blobs have all been committed."""
    alive = sa.select(processes.c.id).where(processes.c.expires >= now)
    waiting = sa.select(uploaded.c.session)
    idle = (uploads.c.used < idle_before) | uploads.c.session.not_in(waiting)
    return list(connection.scalars(sa.select(uploads.c.session).where(uploads.c.process.not_in(alive), idle)))
