"""Memory that the workers share with who commands them: a mode for each, and counts that each writes for itself."""

from __future__ import annotations

import mmap
import struct
from enum import IntEnum
from pathlib import Path
from typing import Final

SLOTS: Final = 40
_SIZE: Final = 64
_COUNT: Final = struct.Struct("<Q")


class Mode(IntEnum):
    """How a worker behaves that is alive."""

    WELL = 0
    SLOW = 1
    """It takes its time before the first byte."""
    HANGS = 2
    """It answers /health, and nothing else until the mode is another."""
    NOT_TAKEN = 3
    """503."""
    GARBAGE = 4
    """Bytes that are no HTTP, instead of an answer."""
    LATE_GARBAGE = 5
    """A stream breaks its framing, a whole answer ends too soon, both after the first byte."""
    RESETS = 6
    """The connection is reset instead of an answer."""
    REFUSES = 7
    """Nobody listens; what is under way goes on."""


class Count(IntEnum):
    """What a worker counts, by its place in the slot."""

    TAKEN = 8
    """Requests that came, whole."""
    BUSY = 16
    """Requests that are being answered."""
    OPEN = 24
    """Connections that brought a request."""


class Board:
    def __init__(self, path: Path, *, create: bool = False) -> None:
        if create:
            path.write_bytes(bytes(SLOTS * _SIZE))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), SLOTS * _SIZE)

    def mode(self, slot: int) -> Mode:
        return Mode(self._map[slot * _SIZE])

    def set_mode(self, slot: int, mode: Mode) -> None:
        self._map[slot * _SIZE] = mode

    def get(self, slot: int, count: Count) -> int:
        return int(_COUNT.unpack_from(self._map, slot * _SIZE + count)[0])

    def add(self, slot: int, count: Count, number: int) -> None:
        """For the worker of the slot alone."""
        _COUNT.pack_into(self._map, slot * _SIZE + count, self.get(slot, count) + number)

    def begin(self, slot: int) -> None:
        """Another process has the slot: it has nothing open yet."""
        for count in (Count.BUSY, Count.OPEN):
            _COUNT.pack_into(self._map, slot * _SIZE + count, 0)

    def close(self) -> None:
        self._map.close()
