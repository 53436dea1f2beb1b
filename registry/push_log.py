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

from helios.errors import HeliosError, InvalidInput, NotFound, Unavailable
from helios.names import RepoId
from heliosfs.store.manifest import FileEntry
from registry.catalog import Catalog
from registry.metadata import claims, pushes, repositories
from registry.metadata.database import Changes
from registry.metadata.pushes import PushRow
from registry.metadata.quotas import Amount
from registry.quotas.quotas import Quotas
from registry.sessions import Sessions

log = logging.getLogger("helios.registry.pushes")

IDLE_S: Final = 3600.0
"""A push without a call for this long is dropped, in seconds."""

TOUCH_S: Final = 10.0
"""How exactly the time of a push's last call is kept, in seconds: not every call costs a transaction."""

PUSH: Final = "push:"
"""Key of what a push reserves (registry/quotas)."""

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


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of a push that is stored. ``new_bytes`` are those that the store had not, chunks sent before included."""

    path: str
    sha256: str
    size: int
    new_bytes: int
    deduplicated_bytes: int


@dataclass(frozen=True, slots=True)
class _Meter:
    """Follows a push's reservation. ``likely``: the file was taken for one that is here, and nothing is promised."""

    quotas: Quotas
    session: str
    repo: RepoId
    likely: bool

    def adjust(self, connection: Connection, change: int) -> None:
        self.quotas.adjust(connection, self.session, self.repo, PUSH, change)


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
        if self._catalog.quotas.concerning(repo):
            self._reserve(id_, session, repo, base, files)
        return id_

    def _reserve(self, id_: str, session: str, repo: RepoId, base: str | None, files: list[Announced]) -> None:
        """Promise the push what it may need, or give it up. A file that is where one of the same size is already is
        taken for the same one until it turns out to be new (``store``)."""
        try:
            logical = sum(file.size for file in files)
            likely = self._likely_known(repo, base)
            stored = sum(file.size for file in files if likely.get(file.path) != file.size)
            self._catalog.quotas.reserve(session, repo, {PUSH: Amount(logical, stored)})
        except HeliosError:
            self._sessions.end([session])
            raise

    def _likely_known(self, repo: RepoId, base: str | None) -> dict[str, int]:
        if base is None:
            return {}
        files = self._catalog.contents.manifest(repo, base).files
        return {path: entry.size for path, entry in files.items()}

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

    def store(self, id_: str, path: str, entry: FileEntry, new_bytes: int) -> StoredFile:
        """Note that a file is stored. Raises NotFound when the push has ended meanwhile, QuotaExceeded."""
        rows: list[pushes.FileRow] = []

        def store(connection: Connection) -> None:
            before = pushes.files(connection, id_, path)
            if not pushes.store(connection, id_, path, entry, new_bytes):
                raise no_push(id_)
            pushes.touch(connection, [id_], self._time(connection))
            rows[:] = pushes.files(connection, id_, path)
            if meter is not None and before[0].entry is None:  # sent again, it counts once
                promised = before[0].new_bytes if meter.likely else entry.size
                meter.adjust(connection, rows[0].new_bytes - promised)

        meter = self._meter(id_, path, entry.size)
        self._write(meter, store)
        (row,) = rows
        return StoredFile(path, entry.sha256, row.size, row.new_bytes, row.size - row.new_bytes)

    def add_new(self, id_: str, path: str, new_bytes: int) -> None:
        """Count bytes of a file that were stored before the file is. Raises NotFound when the push has ended,
        QuotaExceeded."""

        def add(connection: Connection) -> None:
            if not pushes.add_new(connection, id_, path, new_bytes):
                raise no_push(id_)
            pushes.touch(connection, [id_], self._time(connection))
            if meter is not None and meter.likely:  # no room was promised for it
                meter.adjust(connection, new_bytes)

        meter = self._meter(id_, path)
        self._write(meter, add)

    def _meter(self, id_: str, path: str, size: int | None = None) -> _Meter | None:
        """What follows a push's reservation while a file comes; None where no quota concerns it."""
        quotas = self._catalog.quotas
        if not quotas.rules:
            return None
        push = self.find(id_)
        repo = RepoId.from_canonical(push.repository)
        if not quotas.concerning(repo):
            return None
        size = self.announced(id_, path).size if size is None else size
        return _Meter(quotas, push.session, repo, self._likely_known(repo, push.base).get(path) == size)

    def _write(self, meter: _Meter | None, work: Callable[[Connection], None]) -> None:
        if meter is not None:
            meter.quotas.within(meter.repo, work)
            return
        with self._database.write(lazy=True, changes=Changes.NOTHING) as connection:
            work(connection)

    def sent(self, id_: str) -> dict[str, str]:
        """The blobs of the push's files that are stored: sha256 -> recipe."""
        with self._database.read(single=True) as connection:
            return pushes.sent(connection, id_)

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

        published = self._catalog.publisher.publish(
            RepoId.from_canonical(push.repository),
            push.ref,
            {row.path: row.entry for row in rows if row.entry is not None},
            author=push.author,
            message=push.message,
            parent=push.base,
            expect=push.base,
            payer=push.session,
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
