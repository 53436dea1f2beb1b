"""A bounded pool of reused buffers, shared by all ingests of one process.

An ingest holds a slab while it fills it and until every lane is done with it, and needs no second slab to get on: so
slabs always come back, and a source that stalls keeps one, not a share of the pool.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from helios.errors import Unavailable
from heliosfs.store.recipe import MAX_CHUNK

if TYPE_CHECKING:
    from registry.ingest.staged import Block

SLAB: Final = MAX_CHUNK
"""Bytes of chunks a slab holds: the largest chunk fits."""
ALIGN: Final = 4096
"""Alignment of direct writes, in bytes: a multiple of every common disk's block."""
WAIT_S: Final = 120.0
"""Longest wait for a slab, in seconds; sources have shorter deadlines of their own."""


class Slab:
    """A buffer with whole chunks in it, up to 4 MiB.

    ``lengths`` are the chunks' lengths in bytes, ``ids`` their BLAKE3 digests once computed, ``offset`` where the
    first one starts in the blob; ``holders`` counts the lanes that still need it. The chunks start at ``head`` in
    ``memory``, as far from a multiple of 4096 as they do in the blob, so that whole blocks can go to disk from where
    they lie (O_DIRECT); the bytes before are the writer's, for the part of the first block that came earlier.
    ``block`` is what the writer leaves to be written so.
    """

    __slots__ = ("block", "head", "holders", "ids", "lengths", "memory", "offset")

    def __init__(self) -> None:
        self.memory = memoryview(mmap.mmap(-1, ALIGN + SLAB))
        self.offset = self.head = 0
        self.lengths: list[int] = []
        self.ids: list[bytes] = []
        self.holders = 0
        self.block: Block | None = None

    def assign(self, offset: int, lengths: list[int]) -> memoryview:
        """Take the chunks to fill it with; returns the part of the buffer they need."""
        self.offset, self.head, self.lengths, self.ids, self.block = offset, offset % ALIGN, lengths, [], None
        return self.data

    @property
    def data(self) -> memoryview:
        return self.memory[self.head : self.head + sum(self.lengths)]

    def chunks(self) -> Iterator[memoryview]:
        """The chunks' bytes, in order."""
        start = self.head
        for length in self.lengths:
            yield self.memory[start : start + length]
            start += length


class SlabPool:
    """At most ``count`` slabs; their memory goes back to the system when no ingest runs."""

    def __init__(self, count: int = 16) -> None:
        self._free_count = count
        self._spare: list[Slab] = []
        self._users = 0
        self._changed = threading.Condition()

    @contextmanager
    def user(self) -> Iterator[None]:
        """Held by a running ingest."""
        with self._changed:
            self._users += 1
        try:
            yield
        finally:
            with self._changed:
                self._users -= 1
                if not self._users:
                    self._spare.clear()

    def acquire(self) -> Slab:
        """A slab, once one is free. Raises Unavailable after two minutes."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._free_count, WAIT_S):
                raise Unavailable(f"too many files are being published: no buffer came free in {WAIT_S:g} s; try again")
            self._free_count -= 1
            return self._spare.pop() if self._spare else Slab()

    def release(self, slab: Slab) -> None:
        """Take a slab back."""
        slab.block = None
        with self._changed:
            self._spare.append(slab)
            self._free_count += 1
            self._changed.notify()
