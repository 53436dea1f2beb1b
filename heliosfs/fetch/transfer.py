"""One range of chunks on its way: what a worker thread does. Fetch, verify, store, tell; chunk by chunk.

The thread owns the buffer from the moment it starts until it returns, also when the event loop has given the transfer
up: a thread can't be cancelled, so an abandoned one keeps its buffer (and its place in the source's limiter) until its
own time-out.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from blake3 import blake3

from helios.errors import IntegrityError, NotFound
from helios.http.response import Watch
from heliosfs.fetch.source import BlobRef, CorruptChunk, Source
from heliosfs.store.recipe import Recipe
from heliosfs.tiers.local import LocalBlob
from heliosfs.tiers.pool import Pool, owned

log = logging.getLogger("heliosfs.fetch")

Post = Callable[[int, memoryview | None, OSError | None], None]
"""Tells the event loop that a chunk arrived: its number; its bytes where they were not stored; why not."""


class Pointless(Exception):
    """The rest of a transfer has no purpose: it was given up, or was for a disk that refuses what comes."""


class Transfer:
    """Fetch chunks ``first`` to ``stop`` from one source. Made on the event loop, ``run`` in a worker thread, once.

    ``urgent``: a READ waits. ``ahead``: a reader is about to come there. For both a chunk counts that is not stored.
    """

    def __init__(
        self,
        source: Source,
        want: BlobRef,
        recipe: Recipe,
        chunks: range,
        local: LocalBlob,
        pool: Pool,
        buffer: memoryview,
        *,
        store: bool,
        urgent: bool,
        ahead: bool,
        timeout_s: float,
        post: Post,
        give_back: Callable[[memoryview], None],
    ) -> None:
        self._source, self._want, self._recipe, self._local = source, want, recipe, local
        self._next, self._stop = chunks.start, chunks.stop
        self._pool, self._buffer, self._give_back = pool, buffer, give_back
        self._store, self._urgent, self._ahead = store, urgent, ahead
        self._timeout_s, self._post = timeout_s, post
        self._lock = threading.Lock()
        self._claimed = False
        self._given_up = False
        self.watch = Watch()
        self.busy = False
        """The thread is at work on this machine: hashing, or at the disk. Any thread may look."""

    def run(self) -> None:
        """Blocks until every chunk was posted. Raises HeliosError, or Pointless; chunks posted before stay."""
        if not self._claim():
            return
        try:
            asked_again = -1
            while True:
                try:
                    self._fetch()
                    break
                except (NotFound, IntegrityError) as error:
                    if self._next == asked_again:
                        raise
                    # The placement may have changed under us; ask for it once a chunk before this counts as a failure.
                    asked_again = self._next
                    log.info(
                        "a chunk is not where its placement says; asking again",
                        extra={"blob": self._want.sha256, "source": self._source.name, "reason": str(error)},
                    )
                    wrong = error.chunk if isinstance(error, CorruptChunk) else None
                    self._source.refresh(self._want, self._recipe, self._timeout_s, wrong)
        finally:
            self._give_back(self._buffer)

    def give_up(self) -> None:
        """Called on the event loop: keep the thread from starting, or let it end after the chunk it is at."""
        self._given_up = True
        if self._claim():
            self._give_back(self._buffer)

    def _claim(self) -> bool:
        with self._lock:
            claimed, self._claimed = self._claimed, True
            return not claimed

    def _fetch(self) -> None:
        if self._local.sealed:
            self._verify()
            return
        self._read(range(self._next, self._stop))

    def _read(self, chunks: range) -> None:
        self.busy = False
        source, want = self._source, self._want
        source.fetch(
            want,
            self._recipe,
            chunks,
            self._buffer,
            self._deliver,
            self._timeout_s,
            urgent=self._urgent,
            watch=self.watch,
        )

    def _verify(self) -> None:
        """Every chunk is on disk already, unverified; one that is wrong there comes from the source, for a READ."""
        for index in range(self._next, self._stop):
            start, end = self._recipe.span(index)
            data = self._buffer[: end - start]
            self.busy = True
            self._local.read_into(data, start)
            if blake3(data).digest() == self._recipe.id(index):
                self._local.verified(index, data)
                self._next = index + 1
                self.watch.received += end - start
                self._pool.offer(self._want.path, self._recipe, index, data, stored=True)
                self._post(index, None, None)
                if self._given_up:
                    raise Pointless
                continue
            self._local.damaged = True
            if not (self._urgent or self._ahead):
                raise CorruptChunk(index, f"chunk {index} of {self._want.path} is corrupt in the store's file")
            self._store = False
            self._read(range(index, index + 1))

    def _deliver(self, index: int, data: memoryview) -> None:
        self.busy = True
        if blake3(data).digest() != self._recipe.id(index):
            raise CorruptChunk(index, f"chunk {index} of {self._want.path} from {self._source.name} is corrupt")
        trouble = None
        if self._store:
            try:
                self._local.write(self._recipe, index, data)
            except OSError as error:
                trouble, self._store = error, False
        self._next = index + 1
        kept = self._pool.offer(self._want.path, self._recipe, index, data, stored=self._store, ahead=self._ahead)
        if not self._store and kept is None:
            kept = owned(data)  # for those who wait
        self._post(index, None if self._store else kept, trouble)
        if self._given_up or (trouble is not None and not (self._urgent or self._ahead)):
            raise Pointless
        self.busy = False
