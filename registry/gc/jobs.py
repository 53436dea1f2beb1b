"""Collections, verifications and compressions under way: one of each at a time, each in a thread of its own, watched by
anybody."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from helios.config import PeerSettings
from helios.errors import Conflict, HeliosError, InvalidInput, Unavailable
from helios.names import RepoId
from registry.burial import bury
from registry.catalog import Catalog
from registry.gc.collect import Collector, Times
from registry.gc.compress import Compressor, Limits
from registry.gc.domains import DomainRemover, listing
from registry.gc.repair import Repairer
from registry.gc.verify import Pace, Verifier
from registry.metadata.domains import DomainUsage
from registry.pull.progress import Progress
from registry.pull.upstream import Upstream
from registry.removal import finish_removals
from registry.stopping import stop_all
from registry.threads import Threads
from registry.transfer.peer import Peer

log = logging.getLogger("helios.registry.gc")

CLOSE_S: Final = 5.0
"""Longest wait at shutdown for a job to notice, in seconds."""
LOOK_S: Final = 1.0
"""How often it is looked whether something is due, in seconds."""
BURY_S: Final = 600.0
"""How often it is looked whether the time of objects is over that nothing needs, in seconds."""


COLD_S: Final = 30 * 86400.0
"""What nobody has read for so long is cold, where nothing else is set or asked for, in seconds."""
LONGEST_S: Final = 100 * 365 * 86400.0
"""No longer time is asked for, in seconds."""
COMPRESS_S: Final = 3600.0
"""How often it is looked for chunks that have become cold, in seconds."""
NOTE_S: Final = 60.0
"""How often reads are noted in the metadata, in seconds."""


@dataclass(eq=False)
class Job:
    """One run. ``outcome`` or ``error`` is set once ``finished`` is. ``what`` is what was asked for."""

    what: tuple[object, ...]
    progress: Progress = field(default_factory=Progress)
    stop: threading.Event = field(default_factory=threading.Event)
    finished: threading.Event = field(default_factory=threading.Event)
    outcome: dict[str, Any] = field(default_factory=dict)
    error: HeliosError | None = None

    def result(self) -> dict[str, Any]:
        """What the last event of its stream says."""
        return self.outcome


@dataclass(frozen=True, slots=True)
class Settings:
    """How often to collect, in seconds (0: never), when things are garbage, and how fast to verify, in MB/s.

    What nobody has read for ``compress_after_s`` seconds (0: nothing) is compressed at ``compress_mb_s``, where it
    saves the share ``compress_gain``.
    """

    every_s: float
    times: Times
    verify_mb_s: float
    compress_after_s: float
    compress_gain: float
    compress_mb_s: float


class Jobs:
    """Of one registry. Close it at shutdown."""

    def __init__(
        self,
        catalog: Catalog,
        settings: Settings,
        peers: Sequence[PeerSettings],
        upstream: Upstream | None,
        forget: Callable[[], None] = lambda: None,
    ) -> None:
        """``forget`` gives up downloads that nobody goes on with; called before each collection."""
        self._forget = forget
        self._catalog, self._settings = catalog, settings
        self._peers, self._upstream = peers, upstream
        self._lock = threading.Lock()
        self._running: dict[str, Job] = {}
        self._closed = False

    def collect(self, *, dry_run: bool) -> Job:
        """Collect garbage, or say what would be collected. Raises Conflict while another collection runs."""

        def run(job: Job) -> dict[str, Any]:
            if not dry_run:
                self._forget()
            collector = Collector(self._catalog, self._settings.times)
            report = collector.run(dry_run=dry_run, say=job.progress.log, stopped=job.stop.is_set)
            return report.result()

        return self._start("collection", ("gc", dry_run), run)

    def verify(self, repo: RepoId | None, sample: float, *, repair: bool) -> Job:
        """Look at what is stored, all of it or what a repository needs, and repair it if wanted."""
        if not 0 < sample <= 1:
            raise InvalidInput(f"sample={sample} is not a share: more than 0, at most 1")

        def run(job: Job) -> dict[str, Any]:
            pace = Pace(self._settings.verify_mb_s * 1e6, job.stop.is_set)
            with contextlib.ExitStack() as stack:
                peers = [stack.enter_context(contextlib.closing(Peer.of(peer))) for peer in self._peers]
                times = self._settings.times
                repairer = Repairer(self._catalog, times.lease_s + times.grace_s, peers, self._upstream, job.stop)
                verifier, say = Verifier(self._catalog), job.progress.log
                if repair:
                    found = verifier.run(
                        pace, repo=repo, sample=sample, say=say,
                        damaged=repairer.repair, damaged_record=repairer.repair_record,
                    )  # fmt: skip
                else:
                    found = verifier.run(pace, repo=repo, sample=sample, say=say)
            return found.result() | {"repaired": repairer.done.result() if repair else None}

        return self._start("verification", ("verify", repo, sample, repair), run)

    def domains(self) -> list[tuple[DomainUsage, list[str]]]:
        """Every domain with what it holds and the tenants that have it. Blocks."""
        return listing(self._catalog)

    def remove_domain(self, domain: str) -> Job:
        """Remove a domain that no tenant has any more, with all that is stored in it. Raises Conflict meanwhile."""

        def run(job: Job) -> dict[str, Any]:
            remover = DomainRemover(self._catalog, self._settings.times)
            return remover.run(domain, say=job.progress.log, stopped=job.stop.is_set).result()

        return self._start("collection", ("domain", domain), run)

    def compress(self, repo: RepoId | None, unread_s: float | None, *, dry_run: bool) -> Job:
        """Store again, compressed, what nobody has read for so long (None: as is set), of all or of a repository."""
        settings = self._settings
        if unread_s is None:
            unread_s = settings.compress_after_s or COLD_S
        if not 0 <= unread_s <= LONGEST_S:
            raise InvalidInput(f"unread_s={unread_s} is no time: 0 to {LONGEST_S:.0f} seconds")
        keep_s = settings.times.lease_s + settings.times.grace_s
        limits = Limits(unread_s, settings.compress_gain, keep_s)

        def run(job: Job) -> dict[str, Any]:
            pace = Pace(settings.compress_mb_s * 1e6, job.stop.is_set)
            found = Compressor(self._catalog, limits).run(pace, repo=repo, dry_run=dry_run, say=job.progress.log)
            return found.result()

        return self._start("compression", ("compress", repo, unread_s, dry_run), run)

    async def keep_clean(self, upkeep: Threads) -> None:
        """Start what is due, until cancelled. Run by the daemon as a task of its own."""
        every_s = self._settings.every_s
        collect_at = time.monotonic() + min(every_s, 60.0)
        bury_at = time.monotonic() + BURY_S
        note_at = time.monotonic() + NOTE_S
        compress_at = time.monotonic() + min(COMPRESS_S, 600.0)
        while True:
            await asyncio.sleep(LOOK_S)
            now = time.monotonic()
            try:
                if every_s > 0 and now >= collect_at:
                    collect_at = now + every_s
                    self.collect(dry_run=False)
                if now >= bury_at:
                    bury_at = now + BURY_S
                    catalog = self._catalog
                    await upkeep(finish_removals, catalog.database, catalog.lease_s, lambda: self._closed)
                    await upkeep(bury, self._catalog.database, self._catalog.store)
                if now >= note_at:
                    note_at = now + NOTE_S
                    await upkeep(self._catalog.contents.reads.write)
                if self._settings.compress_after_s > 0 and now >= compress_at:
                    compress_at = now + COMPRESS_S
                    self.compress(None, None, dry_run=False)
            except Conflict:  # somebody has asked for one, and it runs
                continue
            except HeliosError as error:  # the database is away, or its disk is full
                log.warning("could not clean up; trying again later", extra={"error": error.message})

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """Stop all and wait for them, within bounds. What was done stays done."""
        with self._lock:
            self._closed = True
            left = list(self._running.values())
        for job in stop_all(left, timeout_s):
            log.warning("a job did not end in time", extra={"what": str(job.what[0])})
        self._catalog.contents.reads.write()

    def _start(self, name: str, what: tuple[object, ...], run: Callable[[Job], dict[str, Any]]) -> Job:
        with self._lock:
            if self._closed:
                raise Unavailable("the registry is stopping")
            found = self._running.get(name)
            if found is not None:
                if found.what == what:
                    return found
                raise Conflict(f"another {name} is under way", hint="Wait until it is done.")
            job = self._running[name] = Job(what)
            threading.Thread(target=self._run, args=(name, job, run), name=name, daemon=True).start()
            return job

    def _run(self, name: str, job: Job, run: Callable[[Job], dict[str, Any]]) -> None:
        try:
            job.outcome = run(job)
        except HeliosError as error:
            job.error = error
            log.warning("a job failed", extra={"what": name, "error": error.message})
        except Exception as error:
            job.error = HeliosError(f"the {name} broke: {error!r}", hint="The registry's log says more.")
            log.exception("a job broke", extra={"what": name})
        finally:
            with self._lock:
                del self._running[name]
            job.finished.set()
            job.progress.changed()
