"""The memory that the processes of a router share: a row for each name, in it a slot for each process.

Everything is a word of 8 bytes, aligned, in the machine's byte order; a store or a load of one is a single access of
the processor, so nobody sees half of a number.

    header      8 words: magic, version, slots, most rows, rows ever used, columns, moment, 1 free
    directory   a row's key, 16 bytes: BLAKE2b-128 of its name; zeroes where the row is free
    rows        columns[columns][slots], words[8]

A column has a word for each slot, which is written by the one process that has the slot; the supervisor clears those of
a process that died before it gives the slot to another. ``words`` belong to all: the last writer wins, so what is
computed from an old value may lose another process's step that fell in the microsecond between. A circuit breaker's
state bears that; a count that has to come out even does not, so it is a column, and summed over the slots.

There are two such memories. In that of the workers a row has what is under way (``router.load``), and what
``router.resilience`` keeps. In that of the limits it has the columns of ``router.admission.sums``; nothing is cleared
there, since what a process has used stays used when it dies.

``moment`` is another number after each change that others have to look for (``Row.note``).

A name finds its row in the directory, which is changed under a lock of the file that a killed process lets go of. So
all processes agree on the rows, and none needs to ask for one. A row is given up only by the supervisor, which knows
that no process uses the name any more (``Board.release``); the next name to get it finds nothing but zeroes in it.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Final

from helios.errors import HeliosError

MAGIC: Final = int.from_bytes(b"HLSBOARD", "little")
VERSION: Final = 3
WORD: Final = 8
HEADER: Final = 8
"""Words of the header."""
KEY: Final = 16
"""Bytes of a key."""
WORDS: Final = 8
"""Words of a row that belong to all processes."""
LOADS: Final = 3
"""Columns of a worker's row for its load: requests, tokens, those of prompts to be computed. What is kept of its
standing comes after them."""
ROWS: Final = 1 << 14
LOCK_S: Final = 1.0
"""Longest wait for the directory's lock, which is held for microseconds."""
_USED: Final = 4
"""The word of the header that says how many rows were ever used."""
_COLUMNS: Final = 5
_MOMENT: Final = 6
_FREE: Final = bytes(KEY)


class BoardError(HeliosError):
    """The memory can't be used as it is asked to."""


class Row:
    """One name's cells as one process sees them; a ``router.load.Load`` and a ``router.resilience.cells.Cells``.

    ``ints`` and ``floats`` are the same eight words, which all processes write.
    """

    __slots__ = ("_cells", "_note", "_prefill", "_requests", "_slot", "_slots", "_tokens", "at", "floats", "ints")

    def __init__(
        self, at: int, cells: memoryview, words: memoryview, slots: int, slot: int, note: Callable[[int], None]
    ) -> None:
        self.at = at
        """Its place in the directory."""
        self._cells, self._slots, self._slot, self._note = cells, slots, slot, note
        self._requests, self._tokens, self._prefill = (cells[n * slots : (n + 1) * slots] for n in range(LOADS))
        self.ints, self.floats = words, words.cast("B").cast("d")

    @property
    def requests(self) -> int:
        return sum(self._requests)

    @property
    def tokens(self) -> int:
        return sum(self._tokens)

    @property
    def prefill(self) -> int:
        return sum(self._prefill)

    def begin(self, tokens: int) -> None:
        self._requests[self._slot] += 1
        self._tokens[self._slot] += tokens

    def end(self, tokens: int) -> None:
        self._requests[self._slot] -= 1
        self._tokens[self._slot] -= tokens

    def wait(self, prefill: int) -> None:
        self._prefill[self._slot] += prefill

    def mine(self, column: int) -> int:
        """This process's word of a column of the worker's standing."""
        word: int = self._cells[(LOADS + column) * self._slots + self._slot]
        return word

    def put(self, column: int, value: int) -> None:
        self._cells[(LOADS + column) * self._slots + self._slot] = value

    def every(self, column: int) -> Iterable[int]:
        """The words of all processes."""
        begin = (LOADS + column) * self._slots
        return self._cells[begin : begin + self._slots]

    def note(self) -> None:
        """Something changed that other processes have to look at."""
        self._note(self._slot)

    def doubles(self, column: int) -> memoryview[float]:
        """A column as floats, a place for each slot; of all columns, those of the load included."""
        begin = column * self._slots
        return self._cells[begin : begin + self._slots].cast("B").cast("d")


class Board:
    """The memory of one router. ``slots``: how many processes there can be at once."""

    def __init__(self, fd: int) -> None:
        """Use the memory behind a descriptor, which stays the caller's; raises BoardError when it is none of ours."""
        self.fd = fd
        self._memory = mmap.mmap(fd, os.fstat(fd).st_size)
        view = memoryview(self._memory)
        self._head = view[: HEADER * WORD].cast("Q")
        if (self._head[0], self._head[1]) != (MAGIC, VERSION):
            raise BoardError("the shared memory is not a router's, or of another version")
        self.slots, self._most = self._head[2], self._head[3]
        self._cells = view[HEADER * WORD + self._most * KEY :].cast("Q")
        self._own = self._head[_COLUMNS] * self.slots
        """Words of a row that belong to one process each."""
        self._stride = self._own + WORDS
        nothing = memoryview(bytes(self._stride * WORD)).cast("Q")
        self.nobody = Row(-1, nothing[: self._own], nothing[self._own :], self.slots, 0, self.note)
        """What a name without a row looks like; nobody can write to it."""

    @classmethod
    def make(cls, slots: int, columns: int = LOADS, rows: int = ROWS) -> Board:
        """New memory, which lives as long as a process that has it; pages that nobody touched cost nothing."""
        fd = os.memfd_create("helios-router", os.MFD_CLOEXEC)
        os.truncate(fd, HEADER * WORD + rows * (KEY + (columns * slots + WORDS) * WORD))
        os.pwrite(fd, struct.pack("6Q", MAGIC, VERSION, slots, rows, 0, columns), 0)
        return cls(fd)

    @property
    def moment(self) -> int:
        """Another number than before when something was noted since, by whichever process."""
        moment: int = self._head[_MOMENT]
        return moment

    def note(self, slot: int) -> None:
        """Something changed that others have to look at. ``slot`` makes the number one that no other process writes."""
        self._head[_MOMENT] = (time.monotonic_ns() * self.slots + slot) % (1 << 64)

    def row(self, name: str, slot: int) -> Row:
        """The row of a name, which gets one if it has none, for the process that has the slot.

        Raises BoardError when all rows are taken.
        """
        key = _key(name)
        with self._locked():
            at = self._find(key)
            if at is None:
                at = self._take(key)
        return self._row(at, slot)

    def find(self, name: str) -> Row | None:
        """The row of a name, if it has one, to be read at once: by the next time it may be another's."""
        with self._locked():
            at = self._find(_key(name))
        return None if at is None else self._row(at, 0)

    def holds(self, row: Row, name: str) -> bool:
        """Whether the row is still the name's."""
        begin = HEADER * WORD + row.at * KEY
        return self._memory[begin : begin + KEY] == _key(name)

    def clear(self, slot: int) -> None:
        """Nothing is under way any more in the process that had the slot."""
        cells, slots = self._cells, self.slots
        nothing = memoryview(bytes(self._own // slots * WORD)).cast("Q")
        for at in range(self._head[_USED]):
            begin = at * self._stride
            cells[begin + slot : begin + self._own : slots] = nothing
        self.note(slot)  # it may have died before it could

    def release(self, name: str) -> bool:
        """Give up the row of a name, once nothing is counted in it; says whether the name has none now.

        Only for the supervisor, and only when no process that lives will begin anything under the name or use its
        words: it is of a later configuration, or has said that it heard of this one.
        """
        with self._locked():
            at = self._find(_key(name))
            if at is None:
                return True
            begin = at * self._stride
            if any(self._cells[begin : begin + LOADS * self.slots]):
                return False
            for index in range(begin + LOADS * self.slots, begin + self._stride):
                self._cells[index] = 0
            self._write(at, _FREE)
            return True

    def _row(self, at: int, slot: int) -> Row:
        begin = at * self._stride
        words = begin + self._own
        return Row(at, self._cells[begin:words], self._cells[words : words + WORDS], self.slots, slot, self.note)

    def _find(self, key: bytes) -> int | None:
        first = at = HEADER * WORD
        end = first + self._head[_USED] * KEY
        while (at := self._memory.find(key, at, end)) >= 0:
            if (at - first) % KEY == 0:
                return (at - first) // KEY
            at += 1
        return None

    def _take(self, key: bytes) -> int:
        at = self._find(_FREE)
        if at is None:
            at = self._head[_USED]
            if at == self._most:
                raise BoardError(f"the shared memory has no more than {self._most} rows")
        self._write(at, key)
        self._head[_USED] = max(at + 1, self._head[_USED])  # after the key: who dies in between has taken nothing
        return at

    def _write(self, at: int, key: bytes) -> None:
        begin = HEADER * WORD + at * KEY
        self._memory[begin : begin + KEY] = key

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Have the directory alone. Raises BoardError when another process has it for too long."""
        end = time.monotonic() + LOCK_S
        while True:
            try:
                fcntl.lockf(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except (BlockingIOError, PermissionError):
                if time.monotonic() > end:
                    raise BoardError(f"the shared memory was locked for {LOCK_S:g} s") from None
                time.sleep(0.0005)
        try:
            yield
        finally:
            fcntl.lockf(self.fd, fcntl.LOCK_UN)


def _key(name: str) -> bytes:
    return hashlib.blake2b(name.encode(), digest_size=KEY).digest()
