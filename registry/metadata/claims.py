"""Sessions, their claims, and which objects may be deleted. Every function runs inside a writing transaction.

An object goes by its key. It is *named* when a row says that it holds something, *claimed* when a session that is
under way is about to write it or relies on it, and *doomed* when it has been given up. The rules, which hold among all
processes because writers take turns:

1. Whoever writes an object has claimed it before.
2. Whoever makes rows rely on an object has a claim on it in that same transaction, or another row names it already.
3. An object is deleted after a writing transaction has seen that nobody names or claims it, and that the time is over
   for which readers were told where it lies, and has said that it is *leaving*. That is taken back when it has gone.
4. What is leaving is not claimed by who is about to write it: he waits (``burial.claim_unburied``).

So a deletion is over before a claim is made, and the object is written after that; or the claim is seen and the object
stays. An object that is leaving has no row, so nobody comes to rely on it but by writing it. A session whose process
has died is ended by the others, and what it claimed and nobody names is doomed.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from helios.errors import Unavailable
from helios.names import RepoId
from heliosfs.store.keys import commit_key, manifest_key
from registry.metadata.database import batches, insert_new
from registry.metadata.sharing_tables import uploads
from registry.metadata.tables import (
    claims,
    commits,
    doomed,
    is_there,
    objects,
    processes,
    pushes,
    repositories,
    unfinished,
)


def of_blob(domain: str, sha256: str) -> str:
    """What stands for a blob among claims: its row and all that it needs, wherever its chunks lie."""
    return f"{domain}:{sha256}"


def of_chunk(domain: str, id_: bytes) -> str:
    """What stands for a chunk that a session's owner has sent, wherever it lies: others may have stored it before."""
    return f"{domain}:chunk-{id_.hex()}"


def begin(connection: Connection, session: str, holder: str | None) -> None:
    """Start a session, held by a process or (None) by a push."""
    connection.execute(unfinished.insert().values(session=session, started=int(time.time()), holder=holder))


def is_under_way(connection: Connection, session: str) -> bool:
    """Whether nobody has ended the session yet."""
    return connection.scalar(sa.select(unfinished.c.session).where(unfinished.c.session == session)) is not None


def require(connection: Connection, session: str) -> None:
    """Raises Unavailable when the session has been ended, also by others, who took its process for dead."""
    if not is_under_way(connection, session):
        raise Unavailable("the push or pull was given up meanwhile", hint="Start it again.")


def claim(connection: Connection, session: str, keys: Iterable[str]) -> None:
    """Claim objects for a session, which must be under way."""
    require(connection, session)
    insert_new(connection, claims, [{"session": session, "key": key} for key in sorted(set(keys))])


def release(connection: Connection, session: str, keys: Iterable[str]) -> None:
    """Give claims back. What becomes of the objects is the caller's to say."""
    for batch in batches(sorted(set(keys))):
        connection.execute(claims.delete().where(claims.c.session == session, claims.c.key.in_(batch)))


def end(connection: Connection, sessions: Collection[str]) -> set[str]:
    """End sessions, and with them their pushes; returns what they had claimed.

    Objects among it that nobody names or claims are doomed.
    """
    held: set[str] = set()
    for batch in batches(sorted(sessions)):
        held |= set(connection.scalars(sa.select(claims.c.key).where(claims.c.session.in_(batch))))
        connection.execute(claims.delete().where(claims.c.session.in_(batch)))
        connection.execute(unfinished.delete().where(unfinished.c.session.in_(batch)))
    written = {key for key in held if "/" in key}
    doom(connection, written - needed(connection, written))
    return held


def needed(connection: Connection, keys: Collection[str], besides: str | None = None) -> set[str]:
    """Those of the objects that rows name or sessions claim, other than the session ``besides``."""
    return named(connection, keys) | claimed(connection, keys, besides)


def claims_of(connection: Connection, session: str) -> set[str]:
    """What a session claims."""
    return set(connection.scalars(sa.select(claims.c.key).where(claims.c.session == session)))


def claimed(connection: Connection, keys: Collection[str], besides: str | None = None) -> set[str]:
    """Those of the objects that sessions claim, other than the session ``besides``."""
    found: set[str] = set()
    for batch in batches(sorted(keys)):
        query = sa.select(claims.c.key).where(claims.c.key.in_(batch))
        if besides is not None:
            query = query.where(claims.c.session != besides)
        found |= set(connection.scalars(query))
    return found


def named(connection: Connection, keys: Collection[str]) -> set[str]:
    """Those of the objects that rows name: in the index, as manifests or as records of commits."""
    found: set[str] = set()
    for batch in batches(sorted(keys)):
        found |= set(connection.scalars(sa.select(objects.c.key).where(objects.c.key.in_(batch))))
    records = {key: key.rsplit("/", 1)[1] for key in keys if "/commits/" in key}
    manifests = {key: key.rsplit("/", 1)[1] for key in keys if "/manifests/" in key}
    for batch in batches(sorted(set(manifests.values()))):
        held = sa.select(repositories.c.domain, commits.c.manifest).distinct()
        held = held.join_from(commits, repositories, commits.c.repository == repositories.c.id)
        there = connection.execute(held.where(commits.c.manifest.in_(batch), is_there()))
        found |= manifests.keys() & {manifest_key(domain, digest) for domain, digest in there}
    for batch in batches(sorted(set(records.values()))):
        query = sa.select(repositories.c.domain, repositories.c.name, commits.c.commit).join_from(
            commits, repositories, commits.c.repository == repositories.c.id
        )
        rows = connection.execute(query.where(commits.c.commit.in_(batch), is_there()))
        found |= records.keys() & {commit_key(d, RepoId.from_canonical(name), commit) for d, name, commit in rows}
    return found


def doom(connection: Connection, keys: Iterable[str], not_before: float = 0.0) -> None:
    """Have objects deleted (registry/burial.py) unless somebody names or claims them before.

    ``not_before`` is a time of the database's clock; of two the later one counts.
    """
    wanted = sorted(set(keys))
    if not_before > 0:
        for batch in batches(wanted):
            where = doomed.c.key.in_(batch) & (doomed.c.not_before < not_before)
            connection.execute(doomed.update().where(where).values(not_before=not_before))
    insert_new(connection, doomed, [{"key": key, "not_before": not_before} for key in wanted])


def begin_removal(
    connection: Connection, keys: Collection[str], remover: str, now: sa.ColumnElement[float], seconds: float
) -> None:
    """Say that objects are leaving: ``remover`` deletes them from the store, within so many seconds."""
    until = sa.select(now + seconds).scalar_subquery()
    insert_new(connection, doomed, [{"key": key} for key in sorted(keys)])
    for batch in batches(sorted(keys)):
        where = doomed.c.key.in_(batch)
        connection.execute(doomed.update().where(where).values(remover=remover, not_before=until))


def end_removal(connection: Connection, remover: str, gone: Collection[str]) -> None:
    """Say which objects have gone; the others of this remover stay doomed, and may be claimed again."""
    for batch in batches(sorted(gone)):
        connection.execute(doomed.delete().where(doomed.c.remover == remover, doomed.c.key.in_(batch)))
    left = doomed.update().where(doomed.c.remover == remover)
    connection.execute(left.values(remover=None, not_before=0.0))


def leaving(connection: Connection, now: sa.ColumnElement[float], keys: Iterable[str]) -> bool:
    """Whether one of the objects is being deleted."""
    for batch in batches(sorted(set(keys))):
        c = doomed.c
        query = sa.select(c.key).where(c.key.in_(batch), c.remover.is_not(None), c.not_before > now)
        if connection.execute(query.limit(1)).first() is not None:
            return True
    return False


def forget_removers(connection: Connection) -> None:
    """Nobody is deleting anything: whoever did has ended, and with it his deletions."""
    connection.execute(doomed.update().where(doomed.c.remover.is_not(None)).values(remover=None, not_before=0.0))


def undoom(connection: Connection, keys: Iterable[str]) -> None:
    """Take objects from the list: they are deleted, or needed after all."""
    for batch in batches(sorted(set(keys))):
        connection.execute(doomed.delete().where(doomed.c.key.in_(batch)))


def some_doomed(connection: Connection, now: sa.ColumnElement[float], limit: int) -> list[str]:
    """At most so many objects to be deleted by now."""
    query = sa.select(doomed.c.key).where(doomed.c.not_before <= now).order_by(doomed.c.key)
    return list(connection.scalars(query.limit(limit)))


def spared(connection: Connection, now: sa.ColumnElement[float], keys: Collection[str]) -> set[str]:
    """Those of the objects that may not be deleted yet, although nobody needs them: readers know where they lie."""
    found: set[str] = set()
    for batch in batches(sorted(keys)):
        query = sa.select(doomed.c.key).where(doomed.c.key.in_(batch), doomed.c.not_before > now)
        found |= set(connection.scalars(query))
    return found


def lease(
    connection: Connection,
    process: str,
    name: str,
    url: str,
    now: sa.ColumnElement[float],
    seconds: float,
    guard: int | None = None,
) -> None:
    """Note a process, or that it still works: its sessions are left alone for so long."""
    values = {"expires": sa.select(now + seconds).scalar_subquery(), "url": url, "guard": guard}
    found = connection.execute(processes.update().where(processes.c.id == process).values(values))
    if not found.rowcount:
        connection.execute(processes.insert().values(id=process, name=name, **values))


def leave(connection: Connection, process: str) -> None:
    """Forget a process; its sessions are the others' to end."""
    connection.execute(processes.delete().where(processes.c.id == process))


def leave_all(connection: Connection, besides: str) -> None:
    """Forget every other process."""
    connection.execute(processes.delete().where(processes.c.id != besides))


def dead_processes(connection: Connection, now: sa.ColumnElement[float]) -> dict[str, str]:
    """Processes whose lease is over: id -> name."""
    query = sa.select(processes.c.id, processes.c.name).where(processes.c.expires < now)
    return dict(connection.execute(query).all())


def orphans(connection: Connection, alive: Collection[str] | None = None) -> list[str]:
    """Sessions whose process is not among those alive (None: those that are noted)."""
    living = sa.select(processes.c.id) if alive is None else sorted(alive)
    query = sa.select(unfinished.c.session).where(unfinished.c.holder.is_not(None), unfinished.c.holder.not_in(living))
    return list(connection.scalars(query))


def unheld(connection: Connection) -> list[str]:
    """Sessions that nobody holds: those of registries that did not note what they wrote."""
    query = sa.select(unfinished.c.session).where(
        unfinished.c.holder.is_(None),
        unfinished.c.session.not_in(sa.select(pushes.c.session)),
        unfinished.c.session.not_in(sa.select(uploads.c.session)),
    )
    return list(connection.scalars(query))
