"""What all processes know of the pushes under way: transactions on the rows of registry/metadata/pushes.py.

Every method blocks.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from helios.errors import InvalidInput, NotFound, Unavailable
from helios.names import RepoId
from registry.catalog import Catalog
from registry.ingest import IngestedBlob
from registry.metadata import claims, pushes, repositories
from registry.metadata.database import Changes
from registry.metadata.pushes import PushRow
from registry.sessions import Sessions

log = logging.getLogger("helios.registry.pushes")

IDLE_S: Final = 3600.0
"""A push without a call for this long is dropped, in seconds."""

TOUCH_S: Final = 10.0
"""How exactly the time of a push's last call is kept, in seconds: not every call costs a transaction."""

MAX_PUSHES: Final = 256
"""Most pushes under way, by all processes."""


@dataclass(frozen=True, slots=True)
class Announced:
    """A file that the client is going to send; ``size`` in bytes."""

    path: str
    size: int
    executable: bool


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a commit answers."""

    commit: str
    manifest: str
    logical_bytes: int
    new_bytes: int
    deduplicated_bytes: int
    unchanged: bool


class PushLog:
    """The pushes of one registry."""

    def __init__(
        self, catalog: Catalog, sessions: Sessions, *, idle_s: float, now: Callable[[], float] | None = None
    ) -> None:
        self._catalog, self._sessions, self._database = catalog, sessions, catalog.database
        self._idle_s, self._now = idle_s, now

    def start(self, repo: RepoId, ref: str, message: str, author: str, files: list[Announced]) -> str:
        """Start a push of files that were checked; returns its id. Raises Unavailable when there are too many."""
        id_, session = secrets.token_hex(16), secrets.token_hex(16)
        rows = ((file.path, file.size, file.executable) for file in files)
        with self._database.write(lazy=True, changes=Changes.NOTHING) as connection:
            if pushes.count(connection) >= MAX_PUSHES:
                raise Unavailable(f"{MAX_PUSHES} pushes are under way; try again later")
            found = repositories.find(connection, repo)
            base = None if found is None else repositories.ref_target(connection, found, ref)
            claims.begin(connection, session, None)
            row = PushRow(id_, session, str(repo), ref, message, author, base, self._time(connection))
            pushes.add(connection, row, rows)
        return id_

    def find(self, id_: str) -> PushRow:
        """A push that is under way, which is in use from here on. Raises NotFound."""
        with self._database.read() as connection:
            push, now = pushes.find(connection, id_), self._time(connection)
        if push is None:
            raise no_push(id_)
        if now - push.used > TOUCH_S:
            with self._database.write(lazy=True, changes=Changes.NOTHING) as connection:
                pushes.touch(connection, [id_], now)
        return push

    def announced(self, id_: str, path: str) -> Announced:
        """A file that the push lists. Raises InvalidInput."""
        with self._database.read(single=True) as connection:
            found = pushes.files(connection, id_, path)
        if not found:
            raise InvalidInput(f"the push does not list the path {path[:200]!r}")
        return Announced(path, found[0].size, found[0].executable)

    def store(self, id_: str, path: str, blob: IngestedBlob) -> IngestedBlob:
        """Note that a file is stored. Raises NotFound when the push has ended meanwhile."""
        with self._database.write(lazy=True, changes=Changes.NOTHING) as connection:
            if not pushes.store(connection, id_, path, blob):
                raise no_push(id_)
            pushes.touch(connection, [id_], self._time(connection))
        return blob

    def progress(self, id_: str) -> tuple[int, int]:
        """How many files are stored, and their bytes. Raises NotFound."""
        with self._database.read() as connection:
            if pushes.find(connection, id_) is None:
                raise no_push(id_)
            return pushes.progress(connection, id_)

    def look_after(self, active: list[str]) -> set[str]:
        """Keep the pushes that this process works on, drop those that nobody does; returns which of ours there are."""
        with self._database.read() as connection:
            now = self._time(connection)
            left = pushes.under_way(connection, active)
            old = [push.id for push in pushes.idle(connection, now - TOUCH_S) if push.id in left]
            idle = bool(pushes.idle(connection, now - self._idle_s))
        if old:
            with self._database.write(lazy=True, changes=Changes.NOTHING) as connection:
                pushes.touch(connection, old, now)
        if idle:
            self._sessions.end_those(self._idle)
        return left

    def _idle(self, connection: Connection) -> list[str]:
        """The sessions of pushes that nobody uses, as seen by the transaction that ends them."""
        found = pushes.idle(connection, self._time(connection) - self._idle_s)
        for push in found:
            log.warning("dropped an idle push", extra={"repo": push.repository, "push": push.id})
        return [push.session for push in found]

    def end(self, ids: list[str] | None) -> None:
        """End pushes (None: all) that come to nothing."""
        with self._database.read() as connection:
            found = pushes.under_way(connection) if ids is None else ids
            rows = [pushes.find(connection, id_) for id_ in found]
        self._sessions.end([row.session for row in rows if row is not None])

    def commit(self, push: PushRow) -> Outcome:
        """Make a push visible and end it, in one transaction. Raises InvalidInput, Conflict, NotFound."""
        with self._database.read() as connection:
            rows = pushes.files(connection, push.id)
        if not rows:
            raise no_push(push.id)
        if missing := [row.path for row in rows if row.entry is None]:
            raise InvalidInput(f"{len(missing)} files were not sent yet, for example {min(missing)!r}")

        def finish(connection: Connection) -> None:
            if pushes.find(connection, push.id) is None:  # given up meanwhile, or committed by another process
                raise no_push(push.id)
            claims.end(connection, [push.session])

        published = self._catalog.publish(
            RepoId.from_canonical(push.repository),
            push.ref,
            {row.path: row.entry for row in rows if row.entry is not None},
            author=push.author,
            message=push.message,
            parent=push.base,
            expect=push.base,
            also=finish,
        )
        size, new = sum(row.size for row in rows), sum(row.new_bytes for row in rows)
        return Outcome(
            commit=published.record.commit,
            manifest=published.record.manifest,
            logical_bytes=size,
            new_bytes=new,
            deduplicated_bytes=size - new,
            unchanged=not published.moved,
        )

    def _time(self, connection: Connection) -> float:
        """The database's clock, which all processes share."""
        return self._now() if self._now else float(connection.scalar(sa.select(self._database.kind.now)) or 0)


def no_push(id_: str) -> NotFound:
    """The error for a push that isn't under way."""
    return NotFound(
        f"there is no push {id_[:64]!r}", hint="It was committed, given up or dropped; start the push again."
    )
