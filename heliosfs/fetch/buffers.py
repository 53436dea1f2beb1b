"""A bounded pool of reused buffers, one chunk each.

Anonymous private memory that is touched when it is first used: the bound costs nothing until it is needed, and a
buffer that was used stays warm for the next fetch (last in, first out).
"""

from __future__ import annotations

import mmap
import threading
from typing import Final

from heliosfs.store.recipe import MAX_CHUNK

_FLAGS: Final = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


class BufferPool:
    """At most ``count`` buffers of ``MAX_CHUNK`` bytes. Threads may share it; nothing here blocks."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._lock = threading.Lock()
        self._idle: list[memoryview] = []
        self._made = 0
        self._out: set[int] = set()
        self._lost: set[int] = set()

    @classmethod
    def of_mib(cls, mib: int) -> BufferPool:
        """As many buffers as fit into ``mib`` MiB, at least two: one for demand, one for the background."""
        return cls(max(2, (mib << 20) // MAX_CHUNK))

    @property
    def free(self) -> int:
        """Buffers that ``take`` would give now."""
        with self._lock:
            return self.count - self._made + len(self._idle)

    def take(self) -> memoryview | None:
        """A buffer, or None where all are in use; whoever takes one gives it back exactly once."""
        with self._lock:
            if not self._idle:
                if self._made == self.count:
                    return None
                self._made += 1
                self._idle.append(memoryview(mmap.mmap(-1, MAX_CHUNK, _FLAGS)))
            buffer = self._idle.pop()
            self._out.add(id(buffer))
            return buffer

    def give(self, buffer: memoryview) -> None:
        """Return a buffer; nobody may use it any more."""
        with self._lock:
            if id(buffer) in self._lost:
                self._lost.discard(id(buffer))
            else:
                self._out.discard(id(buffer))
                self._idle.append(buffer)

    def lose(self, buffer: memoryview) -> None:
        """Whoever has the buffer may not give it back for long: another one may take its place, and it is let go then.

        Nothing happens where it is back already.
        """
        with self._lock:
            if id(buffer) in self._out:
                self._out.discard(id(buffer))
                self._lost.add(id(buffer))
                self._made -= 1
