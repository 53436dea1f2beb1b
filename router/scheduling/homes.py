"""Where beginnings of prompts were sent: a table of a fixed size that all processes of a router write and read.

Set-associative, as a processor's cache is: a mark stands in one of ``WAYS`` entries, and the one that was used longest
ago goes when another mark needs it. An entry is six words of 8 bytes in the machine's byte order:

    mark, moment, the workers that got it: eight numbers of 4 bytes, the last one first, zeroes where there are fewer

Nobody locks anything. A word is written as a whole, but an entry is not: two processes that write one at the same
moment may leave a mark with the other's workers. What is read here is a guess (``prefix_cache``), and a wrong one costs
a request its guess, as one does whose worker has dropped the prompt since.
"""

from __future__ import annotations

import mmap
import os
from array import array
from typing import Final

WAYS: Final = 4
HOMES: Final = 8
"""Workers that are remembered for one mark."""
WORDS: Final = 2 + HOMES // 2
ENTRY: Final = 8 * WORDS
"""Bytes of an entry."""
MOST: Final = 1 << 24
"""Most entries of a table."""


def size(entries: int) -> int:
    """Bytes of a table."""
    return entries // WAYS * WAYS * ENTRY


def shared() -> mmap.mmap:
    """Memory for ``MOST`` entries, for this process and those it forks; pages that nobody touched cost nothing."""
    fd = os.memfd_create("helios-homes", os.MFD_CLOEXEC)
    try:
        os.truncate(fd, size(MOST))
        return mmap.mmap(fd, size(MOST))
    finally:
        os.close(fd)


def local(entries: int) -> Homes:
    """A table of this process alone."""
    return Homes(bytearray(size(entries)), entries)


class Homes:
    """The table in ``memory``, which has ``size(entries)`` bytes or more: zeroes, or what a table left there."""

    __slots__ = ("_homes", "_span", "_words")

    def __init__(self, memory: bytearray | mmap.mmap, entries: int) -> None:
        view = memoryview(memory)[: size(entries)]
        self._words, self._homes = view.cast("q"), view.cast("I")
        self._span = entries // WAYS
        """Sets."""

    def of(self, mark: int) -> list[int]:
        """The workers that got the mark, the last one first."""
        found: list[int] = []
        at = self._find(mark or 1)
        if at >= 0:
            homes = self._homes
            for index in range(2 * at + 4, 2 * at + 4 + HOMES):
                home = homes[index]
                if not home:
                    break
                found.append(home)
        return found

    def add(self, mark: int, home: int, moment: int) -> None:
        """A worker got it. ``mark`` has 64 bits and a sign; ``home`` is the worker's number, above 0 and of 32 bits;
        ``moment``, above 0, says how late it is."""
        key, words = mark or 1, self._words
        at = self._find(key)
        begin = 2 * at + 4
        if at < 0:
            at = self._oldest(key)
            begin = 2 * at + 4
            words[at] = 0  # who reads it meanwhile finds no mark
            self._homes[begin : begin + HOMES] = memoryview(array("I", (home,) + (0,) * (HOMES - 1)))
            words[at] = key
        elif self._homes[begin] != home:
            others = [one for one in self._homes[begin : begin + HOMES].tolist() if one != home]
            self._homes[begin : begin + HOMES] = memoryview(array("I", [home, *others, 0][:HOMES]))
        words[at + 1] = moment

    def _find(self, key: int) -> int:
        """The entry's first word; -1: there is none."""
        words, at = self._words, key % self._span * (WAYS * WORDS)
        if words[at] == key:
            return at
        for entry in range(at + WORDS, at + WAYS * WORDS, WORDS):
            if words[entry] == key:
                return entry
        return -1

    def _oldest(self, key: int) -> int:
        words, at = self._words, key % self._span * (WAYS * WORDS)
        return min(range(at, at + WAYS * WORDS, WORDS), key=lambda entry: words[entry + 1])
