"""Verified chunks that could not be stored on disk, a few of them, in memory.

While the disk is full a READ of 128 KiB would otherwise fetch its 4 MiB chunk, and the next READ would fetch it again.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

Key = tuple[str, int]
"""A blob's sha256 and a chunk's number in it."""

DEFAULT_LIMIT: Final = 32 << 20


class ChunkLru:
    """Chunks by key, the least recently used dropped first; ``limit`` bounds their bytes."""

    def __init__(self, limit: int = DEFAULT_LIMIT) -> None:
        self.limit = limit
        self.used = 0
        self._chunks: OrderedDict[Key, bytes] = OrderedDict()

    def __len__(self) -> int:
        return len(self._chunks)

    def put(self, key: Key, data: bytes) -> None:
        """Keep a chunk, dropping others for it; one larger than the limit is not kept."""
        self.drop(key)
        if len(data) > self.limit:
            return
        self._chunks[key] = data
        self.used += len(data)
        while self.used > self.limit:
            _, old = self._chunks.popitem(last=False)
            self.used -= len(old)

    def get(self, key: Key) -> bytes | None:
        """The chunk, now the most recently used, or None."""
        data = self._chunks.get(key)
        if data is not None:
            self._chunks.move_to_end(key)
        return data

    def drop(self, key: Key) -> None:
        """Forget a chunk, if it is here."""
        data = self._chunks.pop(key, None)
        if data is not None:
            self.used -= len(data)
