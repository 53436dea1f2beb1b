"""Puts the parts of uploading together for the daemon."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from registry.catalog import Catalog
from registry.hub.asked import Handlers
from registry.hub.upload.commits import Commits
from registry.hub.upload.lfs import Lfs
from registry.hub.upload.pending import Pending
from registry.hub.upload.repos import Repos
from registry.hub.upload.tickets import Tickets
from registry.receiver import Receiver
from registry.sessions import Sessions


class Uploads:
    """The Hub's upload calls of one registry. ``keep_clean`` runs as a task as long as it serves."""

    def __init__(self, catalog: Catalog, sessions: Sessions) -> None:
        self._receiver, self._pending = Receiver(), Pending(sessions)
        lfs = Lfs(catalog, self._pending, self._receiver, Tickets(secrets.token_bytes(32)))
        commits = Commits(catalog, self._pending, self._receiver)
        self.handlers: Sequence[Handlers] = [h.handlers() for h in (lfs, commits, Repos(catalog, sessions))]

    async def keep_clean(self) -> None:
        """Forget what no commit came for, until cancelled."""
        await self._pending.keep_clean()

    def interrupt(self) -> None:
        """End the uploads under way, at the start of a shutdown."""
        self._receiver.interrupt()

    async def aclose(self) -> None:
        """At shutdown, when the calls have ended: what was uploaded and not committed is forgotten."""
        await self._receiver.aclose()
        await self._pending.aclose()
