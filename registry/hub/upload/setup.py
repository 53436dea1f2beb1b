"""Puts the parts of uploading together for the daemon."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Final

from helios.errors import HeliosError
from registry.catalog import Catalog
from registry.hub.gate import Gate
from registry.hub.upload.commits import Commits
from registry.hub.upload.lfs import Lfs
from registry.hub.upload.parts import Parts
from registry.hub.upload.pending import Pending
from registry.hub.upload.repos import Repos
from registry.hub.upload.spools import Spools
from registry.hub.upload.xet import XetUploads
from registry.processes import Processes
from registry.receiver import Receiver
from registry.sessions import Sessions
from registry.threads import Threads

log = logging.getLogger("helios.registry.hub")

CHECK_S: Final = 10.0
"""How often uploads that were given up are looked for, in seconds."""


class Uploads:
    """The Hub's upload calls of one registry. ``keep_clean`` runs as a task as long as it serves."""

    def __init__(self, catalog: Catalog, sessions: Sessions, gate: Gate, processes: Processes, directory: Path) -> None:
        """``directory`` is for what arrives over Xet or in parts, until it is ingested."""
        signer = processes.signer
        self.receiver, self._pending, self._spools = Receiver(), Pending(sessions), Spools(directory, processes.named)
        self._xet = XetUploads(catalog, self._pending, self.receiver, self._spools, processes)
        parts = Parts(self._pending, self.receiver, self._spools, processes, catalog.quotas)
        lfs = Lfs(catalog, self._pending, self.receiver, signer, parts)
        commits = Commits(catalog, self._pending, self.receiver, self._spools.committed, gate)
        self.handlers = [h.handlers() for h in (lfs, commits, self._xet, Repos(catalog, sessions, gate))]
        self.routes = self._xet.routes()

    async def keep_clean(self, upkeep: Threads) -> None:
        """Forget what no commit came for, until cancelled."""
        while True:
            self._pending.drop_idle()
            try:
                await self._pending.look_after(upkeep)
            except HeliosError as error:  # the database is away, say
                log.warning("uploads could not be looked after", extra={"error": error.message})
            await self._xet.drop_idle(upkeep)
            await asyncio.sleep(CHECK_S)

    def interrupt(self) -> None:
        """End the uploads under way, at the start of a shutdown."""
        self.receiver.interrupt()

    async def aclose(self) -> None:
        """At shutdown, when the calls have ended: what was uploaded and not committed is forgotten."""
        await self.receiver.aclose()
        await self._pending.aclose()
        await asyncio.to_thread(self._spools.close)
