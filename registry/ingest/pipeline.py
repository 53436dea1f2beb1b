"""The threads of one ingest: a reader (the caller's own), and lanes that hash the file, hash its chunks, decide where
they go, and write blocks to disk.

    reader --+--> file hash ------------------------+--> the slab returns to the pool
             +--> chunk hash --> write --> flush x2 -+

Each lane takes slabs in order from a queue of its own; the slabs bound what the queues hold. Two threads flush, because
one that waits for the disk and then for a core leaves the disk idle. The first error is kept: from then on the lanes
only pass slabs on, the reader stops at its next slab, and the error comes out of the ``with`` block. Only ``flush``
goes on: the writer may be waiting for it. No lane outlives the block.
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
    """Runs ``hash_file``, and ``hash_chunks``, ``write`` and ``flush``, over slabs in order.

    With ``threads`` false everything runs in the caller's thread: what a file of one slab deserves.
    """

    def __init__(
        self, pool: SlabPool, hash_file: Work, hash_chunks: Work, write: Work, flush: Work, *, threads: bool
    ) -> None:
        self._pool = pool
        self._steps = (hash_file, hash_chunks, write, flush)
        self._share = threading.Semaphore(SHARE)
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self._lanes: list[_Lane] = []
        if threads:
            flusher = _Lane("ingest-flush", flush, self._done, self, threads=2, always=True)
            writer = _Lane("ingest-write", write, flusher.put, self)
            chunker = _Lane("ingest-chunks", hash_chunks, writer.put, self)
            self._lanes = [_Lane("ingest-file", hash_file, self._done, self), chunker, writer, flusher]

    def __enter__(self) -> Pipeline:
        for lane in self._lanes:
            lane.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self.fail(error)
        for lane in self._lanes:  # in order: a lane must outlive the one that feeds it
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
    """Threads that do one step; with ``always`` even when the pipeline has failed."""

    def __init__(
        self, name: str, work: Work, then: Work, pipeline: Pipeline, *, threads: int = 1, always: bool = False
    ) -> None:
        self._queue: SimpleQueue[Slab | None] = SimpleQueue()
        self._work, self._then, self._pipeline, self._always = work, then, pipeline, always
        self._threads = [threading.Thread(target=self._run, name=name, daemon=True) for _ in range(threads)]
        self.put = self._queue.put

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Let the threads finish what is queued, and wait for them."""
        started = [thread for thread in self._threads if thread.ident is not None]
        for _ in started:
            self._queue.put(None)
        for thread in started:
            thread.join()

    def _run(self) -> None:
        while (slab := self._queue.get()) is not None:
            if self._always or not self._pipeline.failed:
                try:
                    self._work(slab)
                except BaseException as error:  # handed to the reader, which raises it
                    self._pipeline.fail(error)
            self._then(slab)
