"""Puts the parts of uploading together for the daemon."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final

from registry.catalog import Catalog
from registry.hub.upload.commits import Commits
from registry.hub.upload.lfs import Lfs
from registry.hub.upload.parts import Parts
from registry.hub.upload.pending import Pending
from registry.hub.upload.repos import Repos
from registry.hub.upload.spools import Spools
from registry.hub.upload.xet import XetUploads
from registry.receiver import Receiver
from registry.sessions import Sessions
from registry.xet.tokens import Signer

CHECK_S: Final = 10.0
"""How often uploads that were given up are looked for, in seconds."""


class Uploads:
    """The Hub's upload calls of one registry. ``keep_clean`` runs as a task as long as it serves."""

    def __init__(self, catalog: Catalog, sessions: Sessions, signer: Signer, directory: Path) -> None:
        """``directory`` is for what arrives over Xet, until it is ingested."""
        self.receiver, self._pending, self._spools = Receiver(), Pending(sessions), Spools(directory)
        self._xet = XetUploads(catalog, self._pending, self.receiver, self._spools, signer)
        parts = Parts(self._pending, self.receiver, self._spools, signer)
        lfs = Lfs(catalog, self._pending, self.receiver, signer, parts)
        commits = Commits(catalog, self._pending, self.receiver, self._spools.committed)
        self.handlers = [h.handlers() for h in (lfs, commits, self._xet, Repos(catalog, sessions))]
        self.routes = self._xet.routes()

    async def keep_clean(self) -> None:
        """Forget what no commit came for, until cancelled."""
        while True:
            self._pending.drop_idle()
            await self._xet.drop_idle()
            await asyncio.sleep(CHECK_S)

    def interrupt(self) -> None:
        """End the uploads under way, at the start of a shutdown."""
        self.receiver.interrupt()

    async def aclose(self) -> None:
        """At shutdown, when the calls have ended: what was uploaded and not committed is forgotten."""
        await self.receiver.aclose()
        await self._pending.aclose()
        await asyncio.to_thread(self._spools.close)
