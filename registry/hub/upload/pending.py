"""Blobs that were uploaded and wait for the commit that names them.

One session a repository claims them (registry/sessions.py), so that nothing cleans them up. It ends when the last of
them is committed, or when nothing was uploaded for ``IDLE_S``; what no commit holds is then forgotten. Which blobs were
uploaded also says what a commit may name: somebody who knows no more than a sha256 must not get at the content of a
repository that he may not see.

Sessions and what was uploaded are in SQL, so the commit may come to another process than the blobs did, also when that
one has died: its sessions stay, and the others end them. Each process opens sessions of its own.

State is touched on the event loop alone; what blocks runs in threads. Between finding a repository's entry and counting
oneself in there is no ``await``, so an entry in use never ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from sqlalchemy.engine import Connection

from helios.errors import Unavailable
from helios.names import RepoId
from registry.metadata import claims, pins, sharing
from registry.metadata.database import Changes
from registry.metadata.quotas import Amount
from registry.quotas.quotas import Quotas
from registry.sessions import Session, Sessions
from registry.threads import Threads, heard

log = logging.getLogger("helios.registry.hub")

IDLE_S: Final = 3600.0
"""How long an uploaded blob waits for its commit, in seconds, counted from the last call for its repository."""
MAX_REPOS: Final = 1024
MAX_BLOBS: Final = 200_000
"""Most blobs waiting, of all repositories together."""


@dataclass(slots=True)
class _Entry:
    """One repository's; ``session`` is opened by the first who needs it."""

    repo: RepoId
    session: asyncio.Future[Session]
    used: float
    busy: int = 0
    waiting: set[str] = field(default_factory=set)
    """Blobs that arrived here, and were not committed here."""
    promised: set[str] = field(default_factory=set)
    """What room is reserved for: it may be sent soon."""


class Uploading:
    """A repository's session, for as long as the context of ``Pending.of`` lasts."""

    def __init__(self, pending: Pending, repo: RepoId, entry: _Entry, session: Session) -> None:
        self._pending, self._repo, self._entry, self.session = pending, str(repo), entry, session
        self._database = session.database

    def uploaded(self, sha256: str) -> bool:
        """Whether the blob was sent to this repository, at any process, and waits for a commit. Blocks."""
        with self._database.read() as connection:
            return sharing.was_uploaded(connection, self._repo, sha256)

    async def reserve(self, quotas: Quotas, sizes: Mapping[str, int]) -> None:
        """Have room for contents, by sha256, under the repository's quotas until a commit names them, or until nothing
        was heard for long. Raises QuotaExceeded, or Unavailable when too many wait."""
        if not sizes or not quotas.concerning(self._entry.repo):
            return
        self._check_waiting()
        wants = {key: Amount(0, size) for key, size in sizes.items()}
        await asyncio.to_thread(quotas.reserve, self.session.name, self._entry.repo, wants)
        self._entry.promised |= sizes.keys() - self._entry.waiting

    def add(self, sha256: str) -> None:
        """The session has stored the blob. Raises Unavailable when too many wait, or the session was ended. Blocks."""
        self._check_waiting()
        with self._database.write(lazy=True, changes=Changes.NOTHING) as connection:
            claims.require(connection, self.session.name)
            sharing.add_uploaded(connection, self.session.name, sha256)
        self._entry.waiting.add(sha256)
        self._entry.promised.discard(sha256)

    def _check_waiting(self) -> None:
        if self._pending.waiting() >= MAX_BLOBS:
            raise Unavailable(f"{MAX_BLOBS} uploaded files wait for their commits; try again later")

    def take(self, digests: Iterable[str], connection: Connection) -> None:
        """A commit holds the blobs, as the transaction says that makes it."""
        sharing.take_uploaded(connection, self._repo, digests)

    def committed(self, digests: Iterable[str]) -> None:
        """That has come about."""
        for waiting in (self._entry.waiting, self._entry.promised):
            waiting.difference_update(digests)


class Pending:
    """What waits, by repository."""

    def __init__(
        self, sessions: Sessions, *, idle_s: float = IDLE_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._sessions, self._idle_s, self._clock = sessions, idle_s, clock
        self._entries: dict[RepoId, _Entry] = {}
        self._ending: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._entries)

    def waiting(self) -> int:
        """How many blobs wait that arrived here, or are waited for."""
        return sum(len(entry.waiting) + len(entry.promised) for entry in self._entries.values())

    @contextlib.asynccontextmanager
    async def of(self, repo: RepoId) -> AsyncIterator[Uploading]:
        """The repository's session, opened if there is none; nothing it claims goes while the context lasts."""
        entry = self._entries.get(repo)
        if entry is None:
            if len(self._entries) >= MAX_REPOS:
                raise Unavailable(f"uploads to {MAX_REPOS} repositories are under way; try again later")
            opening = asyncio.ensure_future(asyncio.to_thread(self._sessions.open, repo, uploads=True))
            opening.add_done_callback(heard)
            entry = self._entries[repo] = _Entry(repo, opening, self._clock())
        entry.busy += 1
        try:
            session = await asyncio.shield(entry.session)
            yield Uploading(self, repo, entry, session)
        finally:
            entry.busy -= 1
            entry.used = self._clock()
            waits = entry.waiting or entry.promised
            if not entry.busy and not waits and self._entries.get(repo) is entry:
                await asyncio.shield(self._end(repo, entry))

    def drop_idle(self) -> None:
        """End the sessions of uploads that were given up."""
        idle = [
            (repo, entry)
            for repo, entry in self._entries.items()
            if not entry.busy and self._clock() - entry.used > self._idle_s
        ]
        for repo, entry in idle:  # all taken out before the first is waited for: nobody comes back to one of them
            log.warning("uploads that no commit came for are forgotten", extra={"repo": str(repo)})
            self._end(repo, entry)

    async def look_after(self, upkeep: Threads) -> None:
        """Say which sessions are in use here, and end those of which nothing waits any more, as others see it."""
        looked_at = {entry.session.result().name: (repo, entry, entry.used) for repo, entry in self._open().items()}
        for name in await upkeep(self._look_after, list(looked_at)):
            repo, entry, used = looked_at[name]
            idle = not entry.busy and not entry.promised and entry.used == used
            if idle and self._entries.get(repo) is entry:
                self._end(repo, entry)

    def _look_after(self, names: list[str]) -> list[str]:
        """Those of our sessions of which nothing waits."""
        database = self._sessions.catalog.database
        if not database.kind.shared:
            return []
        with database.write(lazy=True, changes=Changes.NOTHING) as connection:
            now = pins.clock(connection, database.kind.now)
            sharing.touch_uploads(connection, names, now)
            waiting = sharing.with_uploaded(connection, names)
            dead = sharing.dead_uploads(connection, now - self._idle_s, database.kind.now)
        if dead:
            self._sessions.end(dead)
        return [name for name in names if name not in waiting]

    def _open(self) -> dict[RepoId, _Entry]:
        """The entries whose sessions are open."""
        return {
            repo: entry
            for repo, entry in self._entries.items()
            if entry.session.done() and not entry.session.cancelled() and entry.session.exception() is None
        }

    async def aclose(self) -> None:
        """At shutdown: end all sessions; where other processes go on, only those of which nothing waits."""
        opened = {entry.session.result().name: repo for repo, entry in self._open().items()}
        left = await asyncio.to_thread(self._left, list(opened))
        for name in left:
            self._entries.pop(opened[name], None)
        for repo, entry in list(self._entries.items()):
            self._end(repo, entry)
        while self._ending:
            await asyncio.wait(self._ending)

    def _left(self, names: list[str]) -> set[str]:
        """Our sessions that others take over."""
        database = self._sessions.catalog.database
        if not database.kind.shared:
            return set()
        with database.read() as connection:
            return sharing.with_uploaded(connection, names)

    def _end(self, repo: RepoId, entry: _Entry) -> asyncio.Task[None]:
        """Whoever comes for the repository from here on opens a session of his own."""
        del self._entries[repo]
        ending = asyncio.create_task(_close(entry))
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)
        return ending


async def _close(entry: _Entry) -> None:
    await asyncio.wait([entry.session])
    if not entry.session.cancelled() and entry.session.exception() is None:
        await asyncio.to_thread(entry.session.result().close)
