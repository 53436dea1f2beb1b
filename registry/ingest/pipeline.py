"""The threads of one ingest: a reader (the caller's own), a lane that hashes the whole file, one that hashes chunks,
and one that writes them.

    reader --+--> file hash ------------+--> the slab returns to the pool
             +--> chunk hash --> write -+

Each lane takes slabs in order from a queue of its own; the slabs bound what the queues hold. The first error is kept:
from then on the lanes only pass slabs on, the reader stops at its next slab, and the error comes out of the ``with``
block. No lane outlives the block.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from types import TracebackType
from typing import Final

from helios.errors import Unavailable
from registry.ingest.slabs import WAIT_S, Slab, SlabPool

Work = Callable[[Slab], None]

SHARE: Final = 8
"""Most slabs one ingest holds: half of the pool, so that a second one gets on beside it."""


class Pipeline:
    """Runs ``hash_file``, and ``hash_chunks`` then ``write``, over slabs in order.

    With ``threads`` false everything runs in the caller's thread: what a file of one slab deserves.
    """

    def __init__(self, pool: SlabPool, hash_file: Work, hash_chunks: Work, write: Work, *, threads: bool) -> None:
        self._pool = pool
        self._steps = (hash_file, hash_chunks, write)
        self._share = threading.Semaphore(SHARE)
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self._lanes: list[_Lane] = []
        if threads:
            writer = _Lane("ingest-write", write, self._done, self)
            chunker = _Lane("ingest-chunks", hash_chunks, writer.put, self)
            self._lanes = [_Lane("ingest-file", hash_file, self._done, self), chunker, writer]

    def __enter__(self) -> Pipeline:
        for lane in self._lanes:
            lane.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self.fail(error)
        for lane in self._lanes:  # in order: the writer must outlive the chunker, which feeds it
            lane.close()
        if error is None and self._error is not None:
            raise self._error

    @property
    def failed(self) -> bool:
        return self._error is not None

    def fail(self, error: BaseException) -> None:
        """Stop the work; the first error counts."""
        with self._lock:
            self._error = self._error or error

    def slab(self) -> Slab:
        """A slab to fill and ``put`` or ``drop``, once one is free. Raises what a lane failed with."""
        if not self._share.acquire(timeout=WAIT_S):
            raise Unavailable(f"the object store took no bytes for {WAIT_S:g} s; look at its disk")
        try:
            if self._error is not None:
                raise self._error
            return self._pool.acquire()
        except BaseException:
            self._share.release()
            raise

    def put(self, slab: Slab) -> None:
        """Hand a filled slab to the lanes."""
        if not self._lanes:
            try:
                for step in self._steps:
                    step(slab)
            finally:
                self.drop(slab)
            return
        slab.holders = 2
        self._lanes[0].put(slab)
        self._lanes[1].put(slab)

    def drop(self, slab: Slab) -> None:
        """Give a slab back."""
        self._pool.release(slab)
        self._share.release()

    def _done(self, slab: Slab) -> None:
        with self._lock:
            slab.holders -= 1
            last = slab.holders == 0
        if last:
            self.drop(slab)


class _Lane:
    """One thread that does one step."""

    def __init__(self, name: str, work: Work, then: Work, pipeline: Pipeline) -> None:
        self._queue: SimpleQueue[Slab | None] = SimpleQueue()
        self._work, self._then, self._pipeline = work, then, pipeline
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.put = self._queue.put
        self.start = self._thread.start

    def close(self) -> None:
        """Let the thread finish what is queued, and wait for it."""
        if self._thread.ident is not None:
            self._queue.put(None)
            self._thread.join()

    def _run(self) -> None:
        while (slab := self._queue.get()) is not None:
            if not self._pipeline.failed:
                try:
                    self._work(slab)
                except BaseException as error:  # handed to the reader, which raises it
                    self._pipeline.fail(error)
            self._then(slab)
