"""The parts of a mount that work in the background, put together."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import trio

from helios.errors import HeliosError, UsageError
from helios.metrics import MountMetrics
from helios.names import RepoId
from heliosfs.blobs import BlobStore
from heliosfs.care import Care
from heliosfs.catalog import Catalog
from heliosfs.control import api, models
from heliosfs.control.activity import Activity
from heliosfs.control.drain import Drain
from heliosfs.control.jobs import Jobs, Wish, Work
from heliosfs.control.models import Seen
from heliosfs.control.remembered import Remembered
from heliosfs.control.verify import VerifyWork
from heliosfs.control.warm import WarmWork, wants_of
from heliosfs.routing import Route
from heliosfs.scrub import Scrubber
from heliosfs.tree.source import Source
from heliosfs.volumes.service import Volumes, find

log = logging.getLogger("heliosfs.control")


@dataclass(frozen=True, slots=True)
class Control:
    """Jobs, scrubber, drain, and what tells of them."""

    store: BlobStore
    care: Care
    jobs: Jobs
    scrubber: Scrubber
    drain: Drain
    remembered: Remembered
    activity: Activity
    seen: Seen

    @classmethod
    def of(
        cls,
        store: BlobStore,
        catalog: Catalog,
        volumes: Volumes,
        scrub_mb_s: float,
        metrics: MountMetrics,
        memory: tuple[Path | None, int],
    ) -> Control:
        """``memory``: what is asked for is remembered there, for the mount made then (ns; see Remembered).

        Raises UsageError for a rate that is none.
        """
        if not 0 <= scrub_mb_s < float("inf"):
            raise UsageError(f"mount.scrub_mb_s is {scrub_mb_s:g}", hint="0 for no scrubbing, or megabytes a second.")

        async def wanted(sha256: str) -> None:
            await _fetch_pinned(store, catalog, sha256)

        care = Care(store, metrics, wanted)
        jobs = Jobs()
        scrubber = Scrubber(store, care, scrub_mb_s * 1e6, metrics)
        drain = Drain(store, jobs, scrubber)

        async def make(wish: Wish) -> Work:
            if wish.repo is None or wish.commit is None:
                return VerifyWork(store, care, None)
            snapshot = await find(RepoId.from_canonical(wish.repo), wish.commit, catalog)
            if wish.kind == VerifyWork.kind:
                return VerifyWork(store, care, snapshot)
            return WarmWork(store, snapshot, wish.revision, wish.patterns)

        remembered = Remembered(*memory, jobs, drain, make)
        metrics.quarantined.set_function(lambda: sum(tier.files.quarantine.usage()[0] for tier in store.tiers))
        seen = Seen(catalog)
        activity = Activity(store, catalog, volumes, jobs, scrubber, drain, metrics, seen)
        return cls(store, care, jobs, scrubber, drain, remembered, activity, seen)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Work until cancelled."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self.jobs.run)
            await nursery.start(self.remembered.run)
            nursery.start_soon(self.scrubber.run)
            nursery.start_soon(self.activity.run)
            task_status.started()

    def routes(self, source: Source) -> list[Route]:
        """What is served on the control socket; ``source`` is where revisions are looked up."""
        background = api.routes(self.store, self.care, self.jobs, self.drain, self.remembered, self.activity, source)
        return [*background, *models.routes(self.seen, self.store.room)]


async def _fetch_pinned(store: BlobStore, catalog: Catalog, sha256: str) -> None:
    """A blob was taken away: where somebody pinned it, it is fetched again at once, not when it is next read."""
    for pin in store.room.pins.all():
        if sha256 not in pin.blobs:
            continue
        try:
            snapshot = (await catalog.snapshot(RepoId.from_canonical(pin.repo), pin.commit)).value
        except HeliosError as error:
            log.info("a pinned blob is fetched when it is read", extra={"blob": sha256, "reason": str(error)})
            continue
        paths = [] if snapshot is None else [p for p, entry in snapshot.files.items() if entry.sha256 == sha256]
        if snapshot is not None and paths:
            store.prefetch(wants_of(snapshot, paths[:1]))
            return
