"""Ranges of objects whose right bytes are known, for objects of which no copy is right as a whole.

Each copy may have damage of its own: who reads finds out range by range, and the right ones make a whole copy together.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Final

ROOM: Final = 64 << 20
"""Most bytes that are remembered; objects that were found to be damaged first are forgotten first."""


class Patches:
    """Threads may share one."""

    def __init__(self, room: int = ROOM) -> None:
        self._room, self._used = room, 0
        self._lock = threading.Lock()
        self._known: OrderedDict[str, dict[int, bytes]] = OrderedDict()

    def add(self, key: str, offset: int, data: bytes) -> None:
        """The right bytes of an object from ``offset`` on."""
        with self._lock:
            ranges = self._known.setdefault(key, {})
            self._used += len(data) - len(ranges.get(offset, b""))
            ranges[offset] = data
            while self._used > self._room:
                _, dropped = self._known.popitem(last=False)
                self._used -= sum(map(len, dropped.values()))

    def read(self, key: str, offset: int, length: int) -> bytes | None:
        """Exactly this range, where it is known."""
        if key not in self._known:  # hardly ever is anything
            return None
        with self._lock:
            data = self._known.get(key, {}).get(offset, b"")
        return data if data and len(data) == length else None

    def apply(self, key: str, path: Path) -> bool:
        """Write what is known of an object over a copy of it; False where nothing is."""
        with self._lock:
            ranges = dict(self._known.get(key, {}))
        if not ranges:
            return False
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            for offset, data in ranges.items():
                os.pwrite(fd, data, offset)
        finally:
            os.close(fd)
        return True

    def forget(self, key: str) -> None:
        """The object is right again, or gone."""
        with self._lock:
            self._used -= sum(map(len, self._known.pop(key, {}).values()))
