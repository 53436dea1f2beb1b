"""Blobs for whoever reads them: the mount now, loaders without a mount later.

``BlobStore`` puts the local tiers, the sources, the planner and the engine together. Its tasks live in ``run``; all
other methods are called from the same trio loop. What was verified is shared: any number of handles, one fetch a chunk.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Final

import trio

from helios.config import MountSettings
from helios.errors import HeliosError, IntegrityError
from helios.metrics import MountMetrics
from helios.names import RepoId
from helios.tokens import Token, no_token
from heliosfs.blob_handle import BlobHandle
from heliosfs.blob_status import BlobStatus, BlobsUsage, Pending, Tier
from heliosfs.fetch.ahead import Ahead
from heliosfs.fetch.blob import Blob, Blobs
from heliosfs.fetch.engine import Engine
from heliosfs.fetch.fill import Filler, group_of
from heliosfs.fetch.heal import Healer
from heliosfs.fetch.lanes import LIBRARY_SHARE, Lanes, SourceStatus
from heliosfs.fetch.prepare import Preparer
from heliosfs.fetch.read import Reads
from heliosfs.fetch.registry import RegistrySource
from heliosfs.fetch.settle import Settler
from heliosfs.fetch.source import BlobRef, Source
from heliosfs.tiers.pool import Pool
from heliosfs.tiers.tiers import Tiers
from heliosfs.tree.snapshot import WEIGHTS

__all__ = ["BlobHandle", "BlobRef", "BlobStatus", "BlobStore", "BlobsUsage", "open_store"]

log = logging.getLogger("heliosfs.fetch")

EMPTY: Final = hashlib.sha256().hexdigest()
"""The blob without bytes: always whole, never kept."""

FIRST_READ_S: Final = 0.005
"""The fill of an opened file waits for so many seconds: the first READ says where to begin."""

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
    token: Token = no_token,
) -> BlobStore:
    """A store over the registries at ``urls``, in order of preference, with its local tiers in ``cache`` and ``l2``.

    ``revive`` is called, in a thread, when one can't be reached: it may start it again. ``beside`` is the directory of
    their object store where that is on this machine (see TierDirectory). ``token`` is sent to the registries.

    Raises HeliosError when ``cache`` can't be used, or another process owns one of the directories.
    """
    timeout_s = settings.request_deadline_s * LIBRARY_SHARE
    most = max(settings.connections, settings.max_connections)
    sources = [RegistrySource(url, timeout_s=timeout_s, connections=most, revive=revive, token=token) for url in urls]
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
        self._blobs = Blobs()
        connections = (settings.connections, settings.max_connections)
        self._lanes = Lanes(sources, connections, settings.request_deadline_s, metrics, clock)
        self._ahead = Ahead(self._lanes, clock)
        self.room = Tiers(
            cache,
            l2,
            settings,
            metrics,
            clock,
            beside=beside,
            made_room=self._made_room,
            lost=self._lost_tier,
        )
        """The local tiers' room: what is kept, what goes."""
        self.pool = Pool(settings.pool_mib << 20, metrics, time.monotonic)
        """Verified bytes in memory."""
        self._engine = Engine(
            self._lanes,
            settings,
            metrics,
            clock,
            stored=self._stored,
            idle=self._idle,
            released=self._released,
            room=self.room,
            pool=self.pool,
        )
        self._settler = Settler(self._engine, clock, became_whole=self._became_whole, released=self._released)
        self._preparer = Preparer(self._blobs, self._engine, self.room, self.pool, self._lanes, self._ahead)
        self.healer = Healer(
            self._blobs, self._engine, self._settler, self.room, new_key=self._new_key, begin_fill=self._begin_fill
        )
        """What is wrong on the disk."""
        prepare, deadline_s = self._preparer.prepare, settings.request_deadline_s
        self._filler = Filler(
            self._engine, self.room, metrics, blob_of=self._blob_of, prepare=prepare, released=self._released
        )
        self._reads = Reads(
            self._engine, self._filler, metrics, clock, deadline_s, len(sources), prepare, self.healer.broke
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
                for blob in self._blobs:
                    if blob.unflushed and not blob.settling:
                        await self._settler.flush(blob)
                await self.room.save()

    def close(self) -> None:
        """Close files and connections and give the cache directories up; call it after ``run`` ended."""
        for blob in self._blobs:
            for local in (blob.local, *blob.retired):
                local.let_go()
        self._blobs.clear()
        self._lanes.close()
        self.room.close()

    async def open(self, want: BlobRef) -> BlobHandle:
        """Open a blob. Nothing is fetched for it, but a weight file starts to be filled.

        Raises HeliosError.
        """
        blob = self._blob_of(want)
        blob.want = want.beside(blob.want)
        blob.handles += 1
        try:
            await self._preparer.load(blob)
            if not blob.whole and not blob.planned and self._preparer.remembered(want) is not None:
                await self._preparer.prepare(blob)  # so that even its first READ needs nobody
        except BaseException:
            self._drop_handle(blob)
            raise
        self.room.used(want.sha256, group_of(want))
        if want.path.endswith(WEIGHTS) and not blob.whole:
            self._begin_fill(blob)
        return BlobHandle(self, self._reads, blob, next(self._numbers))

    def release(self, blob: Blob, number: int) -> None:
        """A handle is closed."""
        if blob.planned:
            self._engine.reader_left(blob, number)
        self._drop_handle(blob)

    def in_use(self) -> set[tuple[str, str]]:
        """The commits, each with its repository's canonical name, of which files are open that are not whole here."""
        return {(str(b.want.repo), b.want.commit) for b in self._blobs if b.handles and not b.whole}

    @property
    def tiers(self) -> list[Tier]:
        """The directories that hold blobs, those that are there now."""
        tiers = self.room.all()
        return [Tier(tier.name, tier.directory, tier) for tier in tiers if tier.directory is not None]

    @property
    def patience_s(self) -> float:
        """The longest that a READ may take, in seconds."""
        return self._reads.patience_s

    def has(self, blob: Blob, offset: int, count: int) -> bool:
        """Whether these bytes of a partial blob are here. Any thread may ask while the blob is open."""
        return self._engine.planner.has(blob.key, offset, count)

    def held(self, blob: Blob, offset: int, count: int) -> list[memoryview] | None:
        """These bytes from the memory pool, in pieces; None when it lacks some. Any thread."""
        recipe = blob.recipe or self._preparer.remembered(blob.want)
        return None if recipe is None else self.pool.read(recipe, offset, count)

    def progressed_soon(self, blob: Blob, number: int, offset: int, end: int) -> None:
        """A handle was read from ``offset`` to ``end`` without the loop's help. Any thread."""
        self._engine.soon(self._reads.progressed, blob, number, offset, end)

    def expect(self, repo: RepoId, commit: str) -> None:
        """Files of this commit may be opened soon: what that takes is asked for now. No content is fetched."""
        if self._nursery is not None:
            self._ahead.expect(repo, commit, self._nursery)

    def warm(self) -> None:
        """Some file may be opened soon: connections are made ready."""
        if self._nursery is not None:
            self._ahead.warm(self._nursery)

    def soon(self, task: Callable[[], Awaitable[None]]) -> None:
        """Run a task that raises nothing in the background, for as long as the store runs."""
        if self._nursery is not None:
            self._nursery.start_soon(task)

    def prefetch(self, wants: Iterable[BlobRef]) -> None:
        """Fill these blobs, in this order, when nothing more urgent is left; known and whole ones cost nothing."""
        self._filler.enqueue(wants)
        self._engine.pump()

    async def fill(self, want: BlobRef, note: Callable[[int], None] = lambda count: None) -> None:
        """Fill a blob behind everything that is read, and return when it is whole; see ``Filler.fill``."""
        if want.size:
            await self._filler.fill(want, note)

    def drop_queued(self, wants: Iterable[BlobRef]) -> None:
        """Take blobs back that ``prefetch`` queued and that have not begun."""
        self._filler.drop(wants)

    def halt(self) -> None:
        """Fetch only for READs from now on, until ``resume``; what is here of blobs being filled is made durable."""
        self._filler.halt()
        self.room.halt(True)
        for blob in self._blobs:
            self._flush(blob)

    def resume(self) -> None:
        """The opposite of ``halt``."""
        self._filler.resume()
        self.room.halt(False)
        self._engine.pump()

    def _flush(self, blob: Blob) -> None:
        if self._nursery is not None:
            self._settler.look(blob, self._nursery, now=True)

    def pending(self) -> Pending:
        """What is under way."""
        blobs = list(self._blobs)
        return Pending(
            fills=self._filler.filling,
            jobs=self._engine.planner.background_jobs,
            unflushed=sum(blob.unflushed_bytes for blob in blobs),
            settling=sum(blob.settling for blob in blobs),
            copying=self.room.copying,
        )

    def status(self, sha256: str) -> BlobStatus:
        """How much of a blob is here now."""
        blob = self._blobs.proved(sha256)
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

    def fills(self) -> list[tuple[BlobRef, int]]:
        """The blobs being filled, in order, each with its local bytes."""
        planner = self._engine.planner
        return [(blob.want, planner.local_bytes(blob.key)) for blob in self._filler.blobs() if blob.planned]

    def sources(self) -> list[SourceStatus]:
        """How each source does."""
        return self._lanes.status()

    def usage(self) -> BlobsUsage:
        """What is held and under way now."""
        engine, filler = self._engine, self._filler
        held = self.room.usage()
        return BlobsUsage(held, filler.filling, filler.queued, engine.planner.in_flight, self.pool.used)

    # --- blobs come and go ---

    def _blob_of(self, want: BlobRef) -> Blob:
        if (want.sha256 == EMPTY) != (want.size == 0):
            raise IntegrityError(f"{want.path}: a manifest gives the blob {want.sha256} {want.size} bytes")
        blob = self._blobs.get(want)
        if blob is None:
            blob = Blob(self._new_key(want), want, self.room.blob(want.sha256, want.size))
            blob.loaded = blob.whole = blob.proved = not want.size
            self._blobs.add(blob)
        return blob

    def _new_key(self, want: BlobRef) -> str:
        return f"{next(self._numbers)}:{want.sha256}"

    def _begin_fill(self, blob: Blob) -> None:
        if self._nursery is not None:
            blob.users += 1
            self._filler.opening += 1
            self._nursery.start_soon(self._fill_opened, blob)

    async def _fill_opened(self, blob: Blob) -> None:
        try:
            await self._preparer.prepare(blob)
            await trio.sleep(FIRST_READ_S)
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
        """Somebody let go of the blob: close it when nobody is left. It may be closed already."""
        if blob.handles or blob.users or self._filler.keeps(blob) or self._nursery is None or blob not in self._blobs:
            return
        if self._settler.look(blob, self._nursery, now=True):
            return  # it calls again
        self._blobs.remove(blob)
        self._engine.remove(blob)
        for local in blob.retired:
            local.let_go()
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

    def _lost_tier(self) -> None:
        """Nothing can be written to a tier now: what is filled there stops, and asks for room again.

        What lies on a disk that hangs is looked for elsewhere.
        """
        for blob in self._blobs:
            if blob.loaded and blob.local.places.silent:
                self._filler.stop(blob)
                self.healer.elsewhere(blob)
                self._released(blob)
            elif not blob.whole and not self.room.writable(blob.local):
                self._filler.refuse(blob)
                self._released(blob)

    async def _housekeeping(self, nursery: trio.Nursery) -> None:
        """Once a second: flushes that are due, fills that may fit now."""
        try:
            while True:
                await trio.sleep(1.0)
                for blob in self._blobs:
                    self._settler.look(blob, nursery)
                self._filler.look()
                self._engine.pump()
        finally:
            self._nursery = None  # cancelled: nothing new is started
