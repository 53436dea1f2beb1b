"""The chunks of one file that is read or filled: where each is, who waits, who reads. No I/O in here.

The states are one byte a chunk, so "the next missing chunk" is a search in C.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

MISSING: Final = 0
IN_FLIGHT: Final = 1
HAVE: Final = 2
HELD: Final = 3
"""Missing, and left alone for a while because fetching it failed."""
POOLED: Final = 4
"""Not on the disk, but in memory until a reader has gone past it (readahead.py)."""

AHEAD: Final = 64 << 20
"""Every reader gets this many bytes ahead of it before any gets more."""

READERS: Final = 8
"""Readers of one file that count, the latest ones."""

Rank = tuple[int, int]
"""Order among files to be filled: a class (0 is the first), then a number within it, the lower the earlier."""


@dataclass(slots=True, eq=False)
class Job:
    """Consecutive chunks to be fetched in order; ``next`` is the first that has not arrived, ``left`` bytes to come.

    ``demand``: a READ waits for some of it. ``ahead``: a reader is about to come to it, and it goes to memory where the
    disk has no room.
    """

    key: str
    first: int
    stop: int
    demand: bool
    left: int
    ahead: bool = False
    next: int = field(init=False)
    open: bool = True

    def __post_init__(self) -> None:
        self.next = self.first


@dataclass(slots=True)
class Chunks:
    """``ends`` are where the chunks end in the file, in bytes."""

    ends: array[int]
    states: bytearray
    todo: int = 0
    """Chunks that are MISSING or HELD."""
    local: int = 0
    """Bytes of the chunks that are HAVE."""
    pooled: int = 0
    """Bytes of the chunks that are POOLED."""
    wanted: set[int] = field(default_factory=set)
    held: dict[int, float] = field(default_factory=dict)
    readers: OrderedDict[int, int] = field(default_factory=OrderedDict)
    rank: Rank | None = None
    jobs: list[Job] = field(default_factory=list)

    @property
    def size(self) -> int:
        return self.ends[-1] if self.ends else 0

    def bytes_of(self, first: int, stop: int) -> int:
        """Bytes of the chunks from ``first`` to before ``stop``."""
        return self.ends[stop - 1] - self.start_of(first)

    def start_of(self, index: int) -> int:
        """Where a chunk starts in the file."""
        return self.ends[index - 1] if index else 0

    def at(self, offset: int) -> int:
        """The chunk that holds the byte at ``offset``; at the end of the file the number of chunks."""
        return bisect_right(self.ends, offset)

    def set(self, index: int, state: int) -> None:
        before = self.states[index]
        self.todo += (state in (MISSING, HELD)) - (before in (MISSING, HELD))
        if before == HELD:
            del self.held[index]
        size = self.bytes_of(index, index + 1)
        self.local += size * ((state == HAVE) - (before == HAVE))
        self.pooled += size * ((state == POOLED) - (before == POOLED))
        self.states[index] = state

    def read_up_to(self, reader: int, after: int) -> None:
        """A reader has read up to chunk ``after`` (not including it)."""
        self.readers[reader] = after
        self.readers.move_to_end(reader)
        if len(self.readers) > READERS:
            self.readers.popitem(last=False)

    def next_missing(self) -> int:
        """The next missing chunk in the order of filling, or -1: what is ahead of readers, then the rest."""
        positions = list(reversed(self.readers.values()))
        for position in positions:
            if position < len(self.states):
                stop = bisect_left(self.ends, self.start_of(position) + AHEAD) + 1
                found = self.states.find(MISSING, position, stop)
                if found >= 0:
                    return found
        if positions:
            found = self.states.find(MISSING, positions[0])
            if found >= 0:
                return found
        return self.states.find(MISSING)

    def pooled_chunks(self, stop: int) -> Iterator[int]:
        """The chunks before ``stop`` that are POOLED; who iterates may change their states."""
        index = self.states.find(POOLED, 0, stop)
        while index >= 0:
            yield index
            index = self.states.find(POOLED, index + 1, stop)
