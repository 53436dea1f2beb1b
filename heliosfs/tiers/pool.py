"""The pool: verified bytes in memory, bounded exactly; what stays, memory.py decides.

Entries are named by their content: a chunk by its BLAKE3, a recipe by its sha256. So what two revisions share is here
once, and nobody can be given another file's bytes. It serves READs of what the disk has no room for or gives back no
more, and small files without asking anybody. Any thread may call; nothing here waits longer than for a few assignments.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

from helios.errors import UsageError
from helios.metrics import MountMetrics
from heliosfs.store.chunking import chunks_read_first
from heliosfs.store.recipe import Recipe
from heliosfs.tiers.memory import Kind, MemoryPolicy
from heliosfs.tree.snapshot import WEIGHTS

ENTRY_BYTES: Final = 1024
"""More than the tables take for one entry."""

DATA: Final = 0.95
"""The data's share of what entries take, about: the rest are tables, and ends of pages."""

MAPPED: Final = 64 << 10
"""Data of this many bytes or more has pages of its own, which the system gets back the moment it goes: freed blocks of
malloc's may not be, and the bound would be one in name only."""

SMALL_BYTES: Final = 16 << 20
"""A file of at most this size that holds no weights is small: configurations, tokenizers, indexes..."""

TINY_BYTES: Final = 1 << 20
"""...and whatever it holds, one of at most this size."""

RECIPE_BYTES: Final = 64 << 10
"""A longer recipe is not kept: it belongs to a file of 6 GB or more."""

HEADED: Final = (".safetensors", ".gguf")
"""Endings of the files that start with a header, which every loader reads first."""

_PAGE: Final = mmap.PAGESIZE
_PRIVATE: Final = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


@dataclass(frozen=True, slots=True)
class PoolReport:
    """What the pool holds: ``limit`` and ``used`` in bytes; ``bytes`` and ``hits`` by kind, hits since the start."""

    limit: int
    used: int
    entries: int
    bytes: dict[str, int]
    hits: dict[str, int]


class Pool:
    """At most ``limit`` bytes, tables included. ``clock`` is asked from any thread."""

    def __init__(self, limit: int, metrics: MountMetrics, clock: Callable[[], float]) -> None:
        if limit < 0:
            raise UsageError("mount.pool_mib is negative", hint="0 switches the pool off.")
        self._policy, self._clock = MemoryPolicy(limit), clock
        self._small = min(SMALL_BYTES, limit // 4)
        self._lock = threading.Lock()
        self._data: dict[bytes, memoryview] = {}
        self._hits = dict.fromkeys(Kind, 0)
        self._counters = {kind: metrics.pool_hits.labels(kind.value) for kind in Kind}
        metrics.pool_limit.set(limit)
        for kind in Kind:
            metrics.pool_used.labels(kind.value).set_function(partial(self._policy.bytes_of.__getitem__, kind))

    @property
    def used(self) -> int:
        """Bytes held, tables included."""
        with self._lock:
            return self._policy.used

    def offer(
        self, path: str, recipe: Recipe, index: int, data: memoryview, *, stored: bool, ahead: bool = False
    ) -> memoryview | None:
        """A verified chunk of a file came; ``stored``: the disk has it too; ``ahead``: it stays until it is let go.

        Returns the copy that is kept, if any.
        """
        key, kind = recipe.id(index), self._kind(path, recipe, index)
        if stored and kind is Kind.CHUNK:
            with self._lock:
                if self._policy.drop(key):
                    del self._data[key]
            return None
        return self._put(key, Kind.READAHEAD if ahead and kind is Kind.CHUNK else kind, data)

    def let_go(self, recipe: Recipe, index: int) -> None:
        """A chunk that came ahead is needed no more. One that is kept for other reasons stays."""
        key = recipe.id(index)
        with self._lock:
            if self._policy.kind(key) is Kind.READAHEAD:
                self._policy.drop(key)
                del self._data[key]

    @property
    def readahead_room(self) -> int:
        """Bytes of chunks that may be here, or on their way, because readers are about to come to them."""
        with self._lock:
            return int(self._policy.readahead_room * DATA)

    def offer_recipe(self, digest: str, record: bytes) -> None:
        """A recipe's record that has this digest."""
        if len(record) <= RECIPE_BYTES:
            self._put(bytes.fromhex(digest), Kind.RECIPE, memoryview(record))

    def recipe(self, digest: str, sha256: str, size: int) -> Recipe | None:
        """The recipe with this digest, if it is here and is one of the blob with this sha256 and size."""
        record = self._get(bytes.fromhex(digest))
        recipe = None if record is None else Recipe.decode(bytes(record))
        return recipe if recipe is not None and (recipe.blob, recipe.size) == (sha256, size) else None

    def get(self, recipe: Recipe, index: int) -> memoryview | None:
        """A chunk, if it is here; read-only, and valid as long as it is held."""
        return self._get(recipe.id(index))

    def has(self, recipe: Recipe, index: int) -> bool:
        """Whether a chunk is here."""
        return recipe.id(index) in self._data

    def read(self, recipe: Recipe, offset: int, count: int) -> list[memoryview] | None:
        """``count`` bytes of a blob from ``offset`` in pieces, in order; None when some are not here."""
        chunks = recipe.covering(offset, count)
        if any(recipe.id(index) not in self._data for index in chunks):
            return None
        parts = []
        for index in chunks:
            data = self._get(recipe.id(index))
            if data is None:
                return None
            start = recipe.span(index)[0]
            parts.append(data[max(0, offset - start) : offset + count - start])
        return parts

    def report(self) -> PoolReport:
        """What it holds now."""
        with self._lock:
            policy = self._policy
            held = {kind.value: policy.bytes_of[kind] for kind in Kind}
            hits = {kind.value: self._hits[kind] for kind in Kind}
            return PoolReport(policy.limit, policy.used, len(policy), held, hits)

    def _kind(self, path: str, recipe: Recipe, index: int) -> Kind:
        size = recipe.size
        if size <= min(TINY_BYTES, self._small) or (size <= self._small and not path.endswith(WEIGHTS)):
            return Kind.SMALL
        return Kind.HEADER if path.endswith(HEADED) and index < chunks_read_first(recipe) else Kind.CHUNK

    def _get(self, key: bytes) -> memoryview | None:
        with self._lock:
            kind = self._policy.use(key, self._clock())
            if kind is None:
                return None
            self._hits[kind] += 1
            data = self._data[key]
        self._counters[kind].inc()
        return data

    def _put(self, key: bytes, kind: Kind, data: memoryview) -> memoryview | None:
        cost = charge(len(data))
        if cost > self._policy.limit:
            return None
        with self._lock:
            copy = self._data.get(key)
        if copy is None:
            copy = owned(data)
        with self._lock:
            gone = self._policy.put(key, cost, kind, self._clock())
            if gone is not None:
                self._data[key] = copy
                for other in gone:
                    del self._data[other]
            elif key not in self._policy:
                self._data.pop(key, None)
            return self._data.get(key)


def owned(data: memoryview) -> memoryview:
    """A read-only copy whose memory goes back to the system with its last user."""
    if len(data) < MAPPED:
        return memoryview(bytes(data))
    pages = mmap.mmap(-1, len(data), _PRIVATE)
    pages[:] = data
    return memoryview(pages).toreadonly()


def charge(size: int) -> int:
    """Bytes of memory that an entry with so much data takes."""
    return (-(-size // _PAGE) * _PAGE if size >= MAPPED else size) + ENTRY_BYTES
