"""Making what was fetched last: flushing partial blobs in batches, turning complete ones into whole files.

A chunk is readable the moment it was written; it survives a crash once its batch was flushed and recorded. Batches are
large, because a flush per chunk would be most of the work of a cold fill.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import trio

from heliosfs.fetch.blob import Blob
from heliosfs.fetch.engine import Engine
from heliosfs.tiers.local import LocalBlob

log = logging.getLogger("heliosfs.fetch")

FLUSH_BYTES: Final = 256 << 20
"""A blob is flushed when this much was written since the last time..."""

FLUSH_AGE_S: Final = 2.0
"""...or when a chunk has waited this long, in seconds."""


@dataclass(frozen=True, slots=True)
class _Flushed:
    """How a flush ended: ``synced`` is whether the data is on disk, ``error`` what went wrong, if anything."""

    synced: bool
    error: OSError | None = None


class Settler:
    """Flushes and finishes blobs of an engine. All methods run on the trio loop."""

    def __init__(
        self,
        engine: Engine,
        clock: Callable[[], float],
        *,
        became_whole: Callable[[Blob], None],
        released: Callable[[Blob], None],
    ) -> None:
        self._engine, self._clock = engine, clock
        self._became_whole, self._released = became_whole, released

    def stored(self, blob: Blob, index: int, nursery: trio.Nursery) -> None:
        """A chunk reached the disk's cache."""
        assert blob.recipe is not None
        if not blob.unflushed:
            blob.unflushed_since = self._clock()
        start, end = blob.recipe.span(index)
        blob.unflushed.append(index)
        blob.unflushed_bytes += end - start
        self.look(blob, nursery)

    def look(self, blob: Blob, nursery: trio.Nursery, *, now: bool = False) -> bool:
        """Start what is due for the blob: the finish, or a flush (``now``: also one that is not due yet).

        Returns whether something is under way.
        """
        if blob.settling or not blob.planned or not blob.proved or not self._engine.can_store(blob):
            return blob.settling
        if self._engine.planner.complete(blob.key):
            self._begin(blob)
            nursery.start_soon(self._finish, blob)
        elif blob.unflushed:
            aged = self._clock() - blob.unflushed_since >= FLUSH_AGE_S
            if now or aged or blob.unflushed_bytes >= FLUSH_BYTES:
                self._begin(blob)
                nursery.start_soon(self.flush, blob)
        return blob.settling

    def _begin(self, blob: Blob) -> None:
        blob.settling = True
        blob.users += 1

    def _end(self, blob: Blob, local: LocalBlob) -> None:
        if blob.local is local:  # else its disk hung meanwhile, and others took its place
            blob.settling = False
        blob.users -= 1
        self._released(blob)

    async def flush(self, blob: Blob) -> None:
        """Flush and record what was written up to now.

        A cancelled one leaves the blob marked as settling: its thread may still be at it.
        """
        batch, size, local = blob.unflushed, blob.unflushed_bytes, blob.local
        blob.unflushed, blob.unflushed_bytes = [], 0
        result = await trio.to_thread.run_sync(
            _flush, local, batch, abandon_on_cancel=True, limiter=local.places.threads
        )
        if result.error is not None and blob.local is local:
            self._engine.disk_failed(blob, result.error)
            if result.synced:  # only the journal could not be written: next time
                blob.unflushed, blob.unflushed_bytes = batch + blob.unflushed, size + blob.unflushed_bytes
                blob.unflushed_since = self._clock()
            else:
                self._lost(blob, batch, result.error)
        self._end(blob, local)

    async def forget(self, blob: Blob, chunks: Sequence[int]) -> bool:
        """Chunks that are on the disk turned out to be wrong: fetch them again. False: it is not a partial blob now."""
        blob.users += 1  # its last handle may go while this waits
        try:
            while blob.settling:  # noqa: ASYNC110 - it ends with a flush
                await trio.sleep(0.02)
            if not blob.planned:
                return False
            self._begin(blob)
            blob.unflushed = [index for index in blob.unflushed if index not in chunks]
            self._engine.planner.lost(blob.key, chunks)
            local = blob.local
            error = await trio.to_thread.run_sync(_forget, local, chunks, limiter=local.places.threads)
            if error is not None and blob.local is local:
                self._engine.disk_failed(blob, error)
            self._end(blob, local)
            return error is None
        finally:
            blob.users -= 1
            self._released(blob)

    async def _finish(self, blob: Blob) -> None:
        local = blob.local
        result = await trio.to_thread.run_sync(_finish, local, abandon_on_cancel=True, limiter=local.places.threads)
        if result.error is None and blob.local is local:
            blob.whole = True
            blob.unflushed, blob.unflushed_bytes = [], 0
            self._engine.remove(blob)
            self._became_whole(blob)
        elif result.error is not None and blob.local is local:
            self._engine.disk_failed(blob, result.error)
            if not result.synced:
                self._lost(blob, [], result.error)
        self._end(blob, local)

    def _lost(self, blob: Blob, batch: list[int], error: OSError) -> None:
        """fdatasync failed: the kernel may have dropped any page written since the last one, so none counts."""
        chunks = batch + blob.unflushed
        blob.unflushed, blob.unflushed_bytes = [], 0
        self._engine.planner.lost(blob.key, chunks)
        log.error(
            "the cache could not be flushed; chunks are fetched again",
            extra={"file": blob.want.path, "chunks": len(chunks), "reason": error.strerror},
        )


def _flush(local: LocalBlob, batch: Sequence[int]) -> _Flushed:
    """In a thread: data first, then the journal that speaks of it."""
    try:
        local.sync()
    except OSError as error:
        return _Flushed(False, error)
    try:
        local.record(batch)
    except OSError as error:
        return _Flushed(True, error)
    return _Flushed(True)


def _forget(local: LocalBlob, chunks: Sequence[int]) -> OSError | None:
    try:
        local.forget(chunks)
    except OSError as error:
        return error
    return None


def _finish(local: LocalBlob) -> _Flushed:
    """In a thread. The data is flushed apart: when that fails, trying again would succeed and say nothing of it."""
    try:
        if not local.whole:
            local.sync()
    except OSError as error:
        return _Flushed(False, error)
    try:
        local.finish()
    except OSError as error:
        return _Flushed(True, error)
    return _Flushed(True)
