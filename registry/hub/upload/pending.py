"""Blobs that were uploaded and wait for the commit that names them.

One session a repository claims them (registry/sessions.py), so that nothing cleans them up. It ends when the last of
them is committed, or when nothing was uploaded for ``IDLE_S``; what no commit holds is then forgotten. Which blobs were
uploaded *here* also says what a commit may name: somebody who knows no more than a sha256 must not get at the content
of a repository that he may not see.

State is touched on the event loop alone; what blocks runs in threads. Between finding a repository's entry and counting
oneself in there is no ``await``, so an entry in use never ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

from helios.errors import Unavailable
from helios.names import RepoId
from registry.sessions import Session, Sessions

log = logging.getLogger("helios.registry.hub")

IDLE_S: Final = 3600.0
"""How long an uploaded blob waits for its commit, in seconds, counted from the last call for its repository."""
MAX_REPOS: Final = 1024
MAX_BLOBS: Final = 200_000
"""Most blobs waiting, of all repositories together."""


@dataclass(slots=True)
class _Entry:
    """One repository's; ``session`` is opened by the first who needs it."""

    session: asyncio.Future[Session]
    used: float
    busy: int = 0
    uploaded: set[str] = field(default_factory=set)


class Uploading:
    """A repository's session, for as long as the context of ``Pending.of`` lasts."""

    def __init__(self, pending: Pending, entry: _Entry, session: Session) -> None:
        self._pending, self._entry, self.session = pending, entry, session

    def uploaded(self, sha256: str) -> bool:
        """Whether the blob was sent to this repository and waits for a commit."""
        return sha256 in self._entry.uploaded

    def add(self, sha256: str) -> None:
        """The session has stored the blob. Raises Unavailable when too many wait."""
        if self._pending.waiting() >= MAX_BLOBS:
            raise Unavailable(f"{MAX_BLOBS} uploaded files wait for their commits; try again later")
        self._entry.uploaded.add(sha256)

    def committed(self, digests: Iterable[str]) -> None:
        """A commit holds the blobs."""
        self._entry.uploaded.difference_update(digests)


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
        """How many blobs wait."""
        return sum(len(entry.uploaded) for entry in self._entries.values())

    @contextlib.asynccontextmanager
    async def of(self, repo: RepoId) -> AsyncIterator[Uploading]:
        """The repository's session, opened if there is none; nothing it claims goes while the context lasts."""
        entry = self._entries.get(repo)
        if entry is None:
            if len(self._entries) >= MAX_REPOS:
                raise Unavailable(f"uploads to {MAX_REPOS} repositories are under way; try again later")
            opening = asyncio.ensure_future(asyncio.to_thread(self._sessions.open))
            entry = self._entries[repo] = _Entry(opening, self._clock())
        entry.busy += 1
        try:
            session = await asyncio.shield(entry.session)
            yield Uploading(self, entry, session)
        finally:
            entry.busy -= 1
            entry.used = self._clock()
            if not entry.busy and not entry.uploaded and self._entries.get(repo) is entry:
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

    async def aclose(self) -> None:
        """End all sessions, at shutdown."""
        for repo, entry in list(self._entries.items()):
            self._end(repo, entry)
        while self._ending:
            await asyncio.wait(self._ending)

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
