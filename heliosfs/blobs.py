"""Blobs for whoever reads them: the mount now, loaders without a mount later.

``BlobStore`` puts the local tiers, the sources, the planner and the engine together. Its tasks live in ``run``; all
other methods are called from the same trio loop. What was verified is shared: any number of handles, one fetch a chunk.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final

import trio

from helios.config import MountSettings
from helios.errors import HeliosError, IntegrityError
from helios.metrics import MountMetrics
from heliosfs.blob_handle import BlobHandle
from heliosfs.blob_status import BlobStatus, BlobsUsage
from heliosfs.fetch.blob import Blob
from heliosfs.fetch.engine import Engine
from heliosfs.fetch.fill import Filler, group_of
from heliosfs.fetch.lanes import LIBRARY_SHARE, Lanes
from heliosfs.fetch.read import Reads
from heliosfs.fetch.registry import RegistrySource
from heliosfs.fetch.settle import Settler
from heliosfs.fetch.source import BlobRef, Source
from heliosfs.store.recipe import Recipe
from heliosfs.tiers.tiers import Tiers
from heliosfs.tree.snapshot import WEIGHTS

__all__ = ["BlobHandle", "BlobRef", "BlobStatus", "BlobStore", "BlobsUsage", "open_store"]

log = logging.getLogger("heliosfs.fetch")

DISK_THREADS: Final = 8
EMPTY: Final = hashlib.sha256().hexdigest()
"""The blob without bytes: always whole, never kept."""

EXIT_S: Final = 5.0
"""At exit, what was fetched is flushed for at most this long, in seconds."""


def open_store(
    cache: Path,
    urls: Sequence[str],
    settings: MountSettings,
    metrics: MountMetrics,
    revive: Callable[[], None] | None = None,
    beside: Path | None = None,
    l2: Path | None = None,
) -> BlobStore:
    """A store over the registries at ``urls``, in order of preference, with its local tiers in ``cache`` and ``l2``.

    ``revive`` is called, in a thread, when one can't be reached: it may start it again. ``beside`` is the directory of
    their object store where that is on this machine (see TierDirectory). Raises HeliosError when ``cache`` can't
    be used, or another process owns one of the directories.
    """
    timeout_s = settings.request_deadline_s * LIBRARY_SHARE
    sources = [
        RegistrySource(url, timeout_s=timeout_s, connections=settings.connections, revive=revive) for url in urls
    ]
    try:
        return BlobStore(cache, l2, sources, settings, metrics, beside=beside)
    except BaseException:
        for source in sources:
            source.close()
        raise


class BlobStore:
    """Opens blobs by reference. Owns the local tiers and the sources it was given: ``close`` closes them."""

    def __init__(
        self,
        cache: Path,
        l2: Path | None,
        sources: Sequence[Source],
        settings: MountSettings,
        metrics: MountMetrics,
        clock: Callable[[], float] = trio.current_time,
        beside: Path | None = None,
    ) -> None:
        self._clock = clock
        self._blobs: dict[str, Blob] = {}
        self._disk = trio.CapacityLimiter(DISK_THREADS)
        cap = settings.buffer_mib << 20
        self._lanes = Lanes(sources, settings.connections, settings.request_deadline_s, cap, metrics, clock)
        self.room = Tiers(
            cache,
            l2,
            settings,
            self._disk,
            metrics,
            clock,
            beside=beside,
            made_room=self._made_room,
            lost=self._lost_tier,
        )
        """The local tiers' room: what is kept, what goes."""
        self._engine = Engine(
            self._lanes,
            settings,
            metrics,
            clock,
            stored=self._stored,
            idle=self._idle,
            released=self._released,
            room=self.room,
        )
        self._settler = Settler(
            self._engine, self._disk, clock, became_whole=self._became_whole, released=self._released
        )
        self._filler = Filler(
            self._engine, self.room, metrics, blob_of=self._blob_of, prepare=self._prepare, released=self._released
        )
        self._reads = Reads(
            self._engine,
            self._filler,
            self._disk,
            metrics,
            clock,
            settings.request_deadline_s,
            len(sources),
            self._prepare,
            self._broke,
        )
        self._numbers = itertools.count(1)
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Fetch, fill and flush until cancelled; then flush what is here. Reads started before it wait for it."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._engine.run, nursery)
                nursery.start_soon(self._housekeeping, nursery)
                nursery.start_soon(self.room.run, nursery)
                task_status.started()
        finally:
            self._nursery = None
            with trio.CancelScope(shield=True, deadline=trio.current_time() + EXIT_S):
                for blob in list(self._blobs.values()):
                    if blob.unflushed and not blob.settling:
                        await self._settler.flush(blob)
                await self.room.save()

    def close(self) -> None:
        """Close files and connections and give the cache directories up; call it after ``run`` ended."""
        for blob in self._blobs.values():
            blob.local.close()
        self._blobs.clear()
        self._lanes.close()
        self.room.close()

    async def open(self, want: BlobRef) -> BlobHandle:
        """Open a blob. Nothing is fetched for it, but a weight file starts to be filled.

        Raises HeliosError.
        """
        blob = self._blob_of(want)
        blob.want = want
        blob.handles += 1
        try:
            await self._load(blob)
        except BaseException:
            self._drop_handle(blob)
            raise
        self.room.used(want.sha256, group_of(want))
        if want.path.endswith(WEIGHTS) and not blob.whole and self._nursery is not None:
            blob.users += 1
            self._filler.opening += 1
            self._nursery.start_soon(self._fill_opened, blob)
        return BlobHandle(self, self._reads, blob, next(self._numbers))

    def release(self, blob: Blob, number: int) -> None:
        """A handle is closed."""
        if blob.planned:
            self._engine.planner.reader_left(blob.key, number)
        self._drop_handle(blob)

    @property
    def patience_s(self) -> float:
        """The longest that a READ may take, in seconds."""
        return self._reads.patience_s

    def has(self, blob: Blob, offset: int, count: int) -> bool:
        """Whether these bytes of a partial blob are here. Any thread may ask while the blob is open."""
        return self._engine.planner.has(blob.key, offset, count)

    def progressed_soon(self, blob: Blob, number: int, offset: int) -> None:
        """A handle was read up to ``offset`` without the loop's help. Any thread."""
        self._engine.soon(self._reads.progressed, blob, number, offset)

    def prefetch(self, wants: Iterable[BlobRef]) -> None:
        """Fill these blobs, in this order, when nothing more urgent is left; known and whole ones cost nothing."""
        self._filler.enqueue(wants)
        self._engine.pump()

    def status(self, sha256: str) -> BlobStatus:
        """How much of a blob is here now."""
        blob = self._blobs.get(sha256)
        if blob is not None and blob.loaded:
            size: int | None = blob.want.size
            complete = blob.whole
            local = blob.want.size if complete else self._engine.planner.local_bytes(blob.key) if blob.planned else 0
            name = blob.local.places.name
        elif sha256 == EMPTY:
            name, local, size, complete = "l1", 0, 0, True
        else:
            name, local, size, complete = self.room.held(sha256)
        tier = name if complete else "partial" if local else "remote"
        return BlobStatus(tier, local, size, complete, complete)

    def usage(self) -> BlobsUsage:
        """What is held and under way now."""
        engine, filler = self._engine, self._filler
        return BlobsUsage(
            self.room.usage(), filler.filling, filler.queued, engine.planner.in_flight, engine.memory.used
        )

    # --- blobs come and go ---

    def _blob_of(self, want: BlobRef) -> Blob:
        blob = self._blobs.get(want.sha256)
        if blob is None:
            key = f"{next(self._numbers)}:{want.sha256}"
            blob = Blob(key, want, self.room.blob(want.sha256, want.size))
            blob.loaded = blob.whole = not want.size
            self._blobs[want.sha256] = blob
        elif blob.want.size != want.size:
            raise IntegrityError(
                f"{want.path}: two manifests give the blob {want.sha256} {want.size} and {blob.want.size} bytes"
            )
        return blob

    async def _load(self, blob: Blob) -> None:
        """Find out what the disk has of it."""
        async with blob.preparing:
            if blob.loaded:
                return
            await self.room.settled(blob.want.sha256)
            load, digest, places = blob.local.load, blob.want.recipe_digest, self.room.places()
            found = await trio.to_thread.run_sync(lambda: load(digest, *places), limiter=self._disk)
            for name, error in found.failed:
                fields = {"file": blob.want.path, "tier": name, "reason": error.strerror}
                log.warning("the cache can't be read; the file is looked for elsewhere", extra=fields)
            blob.loaded, blob.whole = True, found.whole
            self.room.loaded(blob.local)
            if found.recipe is not None:
                self._engine.add(blob, found.recipe, found.have)

    async def _prepare(self, blob: Blob) -> None:
        """Make chunks of the blob ready to be asked for: find the recipe. Raises HeliosError."""
        await self._load(blob)
        async with blob.preparing:
            if blob.whole or blob.planned:
                return
            recipe = await self._lanes.ask(f"the recipe of {blob.want.path}", _recipe_of(blob.want))
            if await trio.to_thread.run_sync(blob.local.adopt, recipe, limiter=self._disk):
                self.room.loaded(blob.local)
            self._engine.add(blob, recipe, None)

    async def _fill_opened(self, blob: Blob) -> None:
        try:
            await self._prepare(blob)
            if blob.handles:
                self._filler.opened(blob)
                if self._nursery is not None:
                    self._settler.look(blob, self._nursery)
        except HeliosError as error:
            fields = {"file": blob.want.path, "model": str(blob.want.repo), "reason": str(error)}
            log.warning("an opened file can't be filled yet; its first read tries again", extra=fields)
        finally:
            blob.users -= 1
            self._filler.opening -= 1
            self._released(blob)
        self._engine.pump()

    def _drop_handle(self, blob: Blob) -> None:
        blob.handles -= 1
        if not blob.handles:
            self._filler.closed(blob)
            self._released(blob)

    def _released(self, blob: Blob) -> None:
        """Somebody let go of the blob: close it when nobody is left."""
        if blob.handles or blob.users or self._filler.keeps(blob) or self._nursery is None:
            return
        if self._settler.look(blob, self._nursery, now=True):
            return  # it calls again
        if self._blobs.get(blob.want.sha256) is blob:
            del self._blobs[blob.want.sha256]
            self._engine.remove(blob)
            self.room.closed(blob.local)

    def _stored(self, blob: Blob, index: int) -> None:
        if self._nursery is not None:
            self._settler.stored(blob, index, self._nursery)

    def _idle(self) -> None:
        if self._nursery is not None:
            self._filler.advance(self._nursery, self._clock())

    def _made_room(self) -> None:
        self._filler.look()
        self._engine.pump()

    def _became_whole(self, blob: Blob) -> None:
        self.room.grew(blob.local, None)
        self._filler.stop(blob)

    def _broke(self, blob: Blob, error: OSError) -> None:
        """A whole file can't be read any more: the blob is fetched again. Who has the file open keeps it."""
        fields = {"file": blob.want.path, "tier": blob.local.places.name, "reason": error.strerror}
        log.warning("a cached file can't be read; it is fetched again", extra=fields)
        blob.local = self.room.instead(blob.local)
        blob.key = f"{next(self._numbers)}:{blob.want.sha256}"  # what late threads say of the old files is no news
        blob.recipe, blob.whole = None, False

    def _lost_tier(self) -> None:
        """Nothing can be written to a tier now: what is filled there stops, and asks for room again."""
        for blob in list(self._blobs.values()):
            if not blob.whole and not self.room.writable(blob.local):
                self._filler.refuse(blob)
                self._released(blob)

    async def _housekeeping(self, nursery: trio.Nursery) -> None:
        """Once a second: flushes that are due, fills that may fit now."""
        try:
            while True:
                await trio.sleep(1.0)
                for blob in list(self._blobs.values()):
                    self._settler.look(blob, nursery)
                self._filler.look()
                self._engine.pump()
        finally:
            self._nursery = None  # cancelled: nothing new is started


def _recipe_of(want: BlobRef) -> Callable[[Source, float], Recipe]:
    """What a thread does to get the blob's recipe, checked."""

    def ask(source: Source, timeout_s: float) -> Recipe:
        recipe = Recipe.decode(source.recipe(want, timeout_s), want.recipe_digest)
        if recipe.blob != want.sha256 or recipe.size != want.size:
            raise IntegrityError(f"the recipe of {want.path} is one of another blob, {recipe.blob}")
        return recipe

    return ask
