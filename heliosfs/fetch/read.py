"""A READ, from its offset and its buffer to verified bytes."""

from __future__ import annotations

import errno
import logging
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from helios.errors import DeadlineExceeded, Forbidden, HeliosError, IntegrityError, Unavailable
from helios.metrics import MountMetrics
from heliosfs.fetch.blob import Blob, Waiter
from heliosfs.fetch.engine import Engine
from heliosfs.fetch.fill import Filler
from heliosfs.tiers.reading import MAX_READ

log = logging.getLogger("heliosfs.fetch")

RETRY_S: Final = 0.2
LONGEST_RETRY_S: Final = 5.0
"""Pauses before a recipe is asked for again: the first, and the longest as it doubles."""

LOCAL_TRIES: Final = 3
"""A chunk that can't be read back from the disk is fetched again, this often at most."""


class Reads:
    """Answers READs. All methods run on the trio loop."""

    def __init__(
        self,
        engine: Engine,
        filler: Filler,
        metrics: MountMetrics,
        clock: Callable[[], float],
        deadline_s: float,
        sources: int,
        prepare: Callable[[Blob], Awaitable[None]],
        broke: Callable[[Blob, OSError], None],
    ) -> None:
        self._broke = broke
        self._engine, self._filler, self._clock = engine, filler, clock
        self._deadline_s, self._sources, self._prepare = deadline_s, sources, prepare
        self.patience_s = 2 * deadline_s * (sources + 1)
        self._bytes = {tier: metrics.read_bytes.labels(tier) for tier in ("l1", "l2", "memory", "remote")}

    async def read(self, blob: Blob, reader: int, view: memoryview, offset: int) -> None:
        """Fill the view, which lies within the blob.

        Raises IntegrityError, Unavailable or DeadlineExceeded. Failures end a READ soon after the deadline for one
        remote read; twice that for each source, and once more, is the last resort against whatever else may stall.
        """
        try:
            if blob.whole and await self._read_whole(blob, view, offset):
                self._bytes[blob.local.places.name].inc(len(view))
                return
            with trio.move_on_after(self.patience_s) as scope:
                tier = await self._read_partial(blob, reader, view, offset)
                self._bytes[tier].inc(len(view))
            if scope.cancelled_caught:
                raise DeadlineExceeded(f"no answer within {self.patience_s:g} s")
        except HeliosError as error:
            raise _retold(error, blob, offset) from error
        except OSError as error:
            raise Unavailable(f"{blob.want.path}: the cached copy can't be read: {error.strerror}") from error

    def progressed(self, blob: Blob, reader: int, offset: int, end: int) -> None:
        """A reader got the bytes from ``offset`` to ``end`` without us: what follows comes first."""
        if blob.planned and blob.handles:
            self._engine.read_at(blob, reader, offset, end)
            self._filler.read(blob)
            self._engine.pump()

    async def _read_partial(self, blob: Blob, reader: int, view: memoryview, offset: int) -> str:
        """Returns where the bytes came from: ``l1``, ``l2``, ``memory`` or ``remote``."""
        waiter = Waiter(view, offset, self._clock())
        tier = disk = blob.local.places.name
        tries = 0
        while True:
            if not blob.planned and not blob.whole:
                await self._prepare_patiently(blob)
            local = blob.local
            missing: list[int] = []
            if not blob.whole:
                missing = self._missing(blob, reader, waiter)
            if missing:
                tier = "remote"
                await self._wait(blob, waiter, missing)
                continue
            if waiter.copied and tier == disk:
                tier = "memory"
            try:
                await self._read_stored(blob, waiter)
            except OSError as error:
                tries += 1
                if tries == LOCAL_TRIES:
                    raise
                if blob.local is not local:
                    continue  # its disk hangs, or somebody else found out: it has other files now
                if not blob.whole:
                    self._lost(blob, waiter, error)
                else:
                    self._broke(blob, error)
                continue
            return tier

    def _missing(self, blob: Blob, reader: int, waiter: Waiter) -> list[int]:
        """The READ's chunks that are not here, after taking from memory what is there."""
        assert blob.recipe is not None
        engine = self._engine
        chunks = blob.recipe.covering(waiter.offset, len(waiter.view))
        engine.read_at(blob, reader, waiter.offset, waiter.offset + len(waiter.view))
        self._filler.read(blob)
        missing = []
        for index in chunks:
            if index in waiter.copied or engine.have(blob, index):
                continue
            data = engine.pool.get(blob.recipe, index)
            if data is None:
                missing.append(index)
            else:
                waiter.copy(index, blob.recipe.span(index)[0], data)
        if not missing and engine.from_memory(blob):
            engine.pump()
        return missing

    async def _wait(self, blob: Blob, waiter: Waiter, missing: list[int]) -> None:
        waiter.event = trio.Event()
        try:
            self._engine.wait(blob, waiter, missing)
            await waiter.event.wait()
        finally:
            self._engine.leave(blob, waiter)
        if waiter.error is not None:
            raise waiter.error

    async def _read_stored(self, blob: Blob, waiter: Waiter) -> None:
        """Read what was not copied on arrival from the disk."""
        if not waiter.copied:
            await self._read_local(blob, waiter.view, waiter.offset)
            return
        assert blob.recipe is not None
        end = waiter.offset + len(waiter.view)
        for index in blob.recipe.covering(waiter.offset, len(waiter.view)):
            if index not in waiter.copied:
                start, stop = blob.recipe.span(index)
                first, last = max(start, waiter.offset), min(stop, end)
                await self._read_local(blob, waiter.view[first - waiter.offset : last - waiter.offset], first)

    async def _read_whole(self, blob: Blob, view: memoryview, offset: int) -> bool:
        """Read from the whole file. One that can't be read is given up: False, and the blob is fetched again."""
        local = blob.local
        try:
            await self._read_local(blob, view, offset)
        except OSError as error:
            if blob.local is local:
                self._broke(blob, error)
            return False
        return True

    async def _read_local(self, blob: Blob, view: memoryview, offset: int) -> None:
        """On the spot when the pages are in the page cache, else in threads. Raises OSError; a file that became shorter
        is EIO."""
        fd, disk = blob.local.fd, blob.local.places.reads
        done = disk.at_once(fd, view, offset)
        while done < len(view):  # by way of buffers of the disk's own: one that hangs may keep those, not the caller's
            part = await disk.read(fd, offset + done, min(MAX_READ, len(view) - done))
            if not part:
                raise OSError(errno.EIO, f"the cached blob is shorter than {blob.want.size} bytes")
            view[done : done + len(part)] = part
            done += len(part)
        await trio.lowlevel.checkpoint_if_cancelled()

    def _lost(self, blob: Blob, waiter: Waiter, error: OSError) -> None:
        """The disk can't give back what was written: fetch those chunks again."""
        assert blob.recipe is not None
        chunks = [i for i in blob.recipe.covering(waiter.offset, len(waiter.view)) if i not in waiter.copied]
        fields = {"file": blob.want.path, "chunks": chunks, "reason": error.strerror}
        log.warning("the cache can't give back what was stored; fetching it again", extra=fields)
        if blob.planned:
            self._engine.planner.lost(blob.key, chunks)

    async def _prepare_patiently(self, blob: Blob) -> None:
        """Get the recipe, trying again while a failure may pass, up to the request deadline."""
        give_up = self._clock() + self._deadline_s
        pause = RETRY_S
        while True:
            try:
                return await self._prepare(blob)
            except Unavailable:
                if not self._sources or self._clock() >= give_up:
                    raise
            await trio.sleep(pause)
            pause = min(2 * pause, LONGEST_RETRY_S)


def _retold(error: HeliosError, blob: Blob, offset: int) -> HeliosError:
    """The error for the reader: which file, and what was wrong. A file that is open is never "not found"."""
    kinds = (IntegrityError, DeadlineExceeded, Forbidden)
    kind = next((kind for kind in kinds if isinstance(error, kind)), Unavailable)
    return kind(f"{blob.want.repo} {blob.want.path} at byte {offset}: {error.message}")
