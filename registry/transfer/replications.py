"""The replications under way: one for each peer, however many ask for it, each in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from helios.config import PeerSettings
from helios.errors import HeliosError, NotFound, Unavailable
from registry.catalog import Catalog
from registry.pull.progress import Progress
from registry.sessions import Sessions
from registry.stopping import stop_all
from registry.transfer.peer import Peer
from registry.transfer.replicate import Outcome, Replicator

log = logging.getLogger("helios.registry.transfer")

CLOSE_S: Final = 5.0
"""Longest wait at shutdown for replications to notice, in seconds."""
LOOK_S: Final = 1.0
"""How often it is looked whether a peer is due."""


@dataclass(eq=False)
class Replication:
    """One run. ``outcome`` or ``error`` is set once ``finished`` is."""

    peer: str
    progress: Progress = field(default_factory=Progress)
    stop: threading.Event = field(default_factory=threading.Event)
    finished: threading.Event = field(default_factory=threading.Event)
    outcome: Outcome | None = None
    error: HeliosError | None = None

    def result(self) -> dict[str, Any]:
        """What the last event of its stream says."""
        found = self.outcome or Outcome()
        return {
            "commits": found.commits,
            "refs": found.refs,
            "notices": found.notices,
            "logical_bytes": found.logical_bytes,
            "travelled_bytes": found.travelled_bytes,
            "problems": found.problems,
        }


class Replications:
    """Of one registry. Close it at shutdown."""

    def __init__(self, catalog: Catalog, sessions: Sessions, peers: Sequence[PeerSettings]) -> None:
        self._replicator = Replicator(catalog, sessions)
        self._peers = {peer.name: peer for peer in peers}
        self._lock = threading.Lock()
        self._running: dict[str, Replication] = {}
        self._closed = False

    def start(self, name: str, patterns: Sequence[str] | None = None) -> Replication:
        """The replication from this peer: the one that runs, or a new one, of the peer's repositories or of some.

        Raises NotFound for a peer that the configuration does not name.
        """
        peer = self._peers.get(name)
        if peer is None:
            known = ", ".join(self._peers) or "none"
            raise NotFound(f"the configuration names no peer {name[:100]!r} (registry.peers); it names: {known}")
        with self._lock:
            if self._closed:
                raise Unavailable("the registry is stopping")
            found = self._running.get(name)
            if found is not None:
                return found
            job = self._running[name] = Replication(name)
            thread = threading.Thread(
                target=self._run,
                args=(job, peer, patterns or peer.repos or ["*"]),
                name=f"replicate {name}",
                daemon=True,
            )
            thread.start()
            return job

    async def keep_current(self) -> None:
        """Start what is due, until cancelled. Run by the daemon as a task of its own."""
        due = {peer.name: time.monotonic() for peer in self._peers.values() if peer.every_s > 0}
        while True:
            now = time.monotonic()
            for name, at in due.items():
                if now >= at:
                    due[name] = now + self._peers[name].every_s
                    try:
                        self.start(name)
                    except Unavailable:
                        return
            await asyncio.sleep(LOOK_S)

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """Stop all and wait for them, within bounds. What has arrived stays."""
        with self._lock:
            self._closed = True
            left = list(self._running.values())
        for job in stop_all(left, timeout_s):
            log.warning("a replication did not end in time", extra={"peer": job.peer})

    def _run(self, job: Replication, settings: PeerSettings, patterns: Sequence[str]) -> None:
        try:
            with contextlib.closing(Peer.of(settings)) as peer:
                job.outcome = self._replicator.run(
                    peer, patterns, history=settings.history, say=job.progress.log, stopped=job.stop.is_set
                )
            log.info("replicated", extra={"peer": job.peer, **job.result()})
        except HeliosError as error:
            job.error = error
            log.warning("a replication failed", extra={"peer": job.peer, "error": error.message})
        except Exception as error:
            job.error = HeliosError(
                f"the replication from {job.peer} broke: {error!r}", hint="The registry's log says more."
            )
            log.exception("a replication broke", extra={"peer": job.peer})
        finally:
            with self._lock:
                del self._running[job.peer]
            job.finished.set()
            job.progress.changed()
