"""Draining: a mount that is to be stopped begins nothing new, and makes what it has durable. Reads go on."""

from __future__ import annotations

from typing import Any

from heliosfs.blobs import BlobStore
from heliosfs.control.jobs import Jobs
from heliosfs.scrub import Scrubber


class Drain:
    """Whether the mount drains; what serves it next drains, too (remembered.py)."""

    def __init__(self, store: BlobStore, jobs: Jobs, scrubber: Scrubber) -> None:
        self._store, self._jobs, self._scrubber = store, jobs, scrubber
        self.draining = False

    async def begin(self) -> None:
        """End jobs, fills and scrubbing, and begin none; returns when the jobs have let go. Asked again, it goes on."""
        self.draining = True
        self._scrubber.pause()
        self._store.halt()
        await self._jobs.close()

    def undo(self) -> None:
        """Go on as before: what is open is filled again; jobs that were ended are not begun again."""
        self.draining = False
        self._jobs.reopen()
        self._scrubber.resume()
        self._store.resume()

    def document(self) -> dict[str, Any]:
        """Whether nothing is left that stopping would lose, and what is."""
        pending = self._store.pending()
        return {
            "draining": self.draining,
            "drained": self.draining and pending.nothing and not self._jobs.active,
            "pending": {
                "fills": pending.fills,
                "fetches": pending.jobs,
                "unflushed_bytes": pending.unflushed,
                "flushes": pending.settling,
                "copies": pending.copying,
                "jobs": self._jobs.active,
            },
        }
