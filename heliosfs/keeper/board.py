"""The board: a page of shared memory on which a worker says how it does, and leaves what its successor must know.

A memfd that the keeper makes and holds and every worker maps; numbers are little endian (every machine that we run on):

    0      magic "HBRD", u32 version
    8      u64 generation   counts workers
    16     u64 loop_ns      CLOCK_MONOTONIC: when the worker's trio loop was last alive
    24     u64 channel_ns   the same for the threads of its channel
    32     u64 oldest_ns    when the oldest request that it took and did not answer came; 0: none
    40     u64 limit_ns     how old that may become before the worker counts as hanging; 0: not known yet
    48     u64 crashes      deaths of workers that count against the requests that were pending then
    56     u32 init_len, u32 0, then 256 bytes at 64: the kernel's INIT request, for later workers to replay
    320    u64 mounted_ns   CLOCK_REALTIME: when the mount was made
    328    4 x u64          the worker's own (fuse/ledger.py)
    4096   1024 x (u64 unique, u64 count)             deliveries of requests that survived a crash
    20480  16384 x (u64 ino, u32 backing, u32 opens)  regular files that are open in the kernel

Each number is written with one aligned store, so a reader in the other process sees the old or the new one. The tables
belong to one process at a time: the worker, or the keeper while there is none. A row's key is written last and removed
first, so that a process killed in between leaves a whole row or none.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

VERSION: Final = 1
SIZE: Final = 20480 + 16384 * 16
INIT_MAX: Final = 256

_MAGIC = b"HBRD" + struct.pack("<I", VERSION)
_INIT = 64
_DELIVERIES, _DELIVERY_ROWS = 4096, 1024
_FILES, _FILE_ROWS = 20480, 16384


class BoardFullError(OSError):
    """A table of the board has no free row."""


class OpenFile(NamedTuple):
    """A file that is open in the kernel. ``backing``: its passthrough id, 0 for none; ``opens``: its handles."""

    ino: int
    backing: int
    opens: int


class _Word:
    """A u64 of the board."""

    def __init__(self, offset: int) -> None:
        self._index = offset // 8

    def __get__(self, board: Board, owner: type[Board]) -> int:
        value: int = board.words[self._index]
        return value

    def __set__(self, board: Board, value: int) -> None:
        board.words[self._index] = value


class Board:
    """A mapped board. Its descriptor, which it owns, is what another process gets."""

    generation = _Word(8)
    loop_ns = _Word(16)
    channel_ns = _Word(24)
    oldest_ns = _Word(32)
    limit_ns = _Word(40)
    crashes = _Word(48)
    mounted_ns = _Word(320)
    _init_len = _Word(56)

    def __init__(self, fd: int) -> None:
        """Map a board; takes the descriptor. Raises ValueError when it is none, or one of another version."""
        self.fd = fd
        size = os.fstat(fd).st_size
        if size < SIZE:
            raise ValueError(f"the board has {size} bytes, not {SIZE}")
        self._map = mmap.mmap(fd, SIZE)
        if self._map[:8] != _MAGIC:
            raise ValueError(f"not a board of version {VERSION}: it begins with {self._map[:8]!r}")
        self.words = memoryview(self._map).cast("Q")

    @classmethod
    def create(cls) -> Board:
        """An empty board, which can neither grow nor shrink."""
        fd = os.memfd_create("helios-board", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, SIZE)
        os.pwrite(fd, _MAGIC, 0)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        return cls(fd)

    def close(self) -> None:
        """Unmap it and close the descriptor. Tables that were made from it must not be used any more."""
        self.words.release()
        self._map.close()
        os.close(self.fd)

    @property
    def init(self) -> bytes:
        """The kernel's INIT request with its header; empty before it came."""
        return self._map[_INIT : _INIT + self._init_len]

    @init.setter
    def init(self, request: bytes) -> None:
        if len(request) > INIT_MAX:
            raise ValueError(f"an INIT request of {len(request)} bytes is longer than {INIT_MAX}")
        self._map[_INIT : _INIT + len(request)] = request
        self._init_len = len(request)

    def deliveries(self) -> Table:
        """The table of deliveries, read now: ``unique`` of a request without the resend bit -> how often it came."""
        return Table(self.words, _DELIVERIES // 8, _DELIVERY_ROWS)

    def open_files(self) -> OpenFiles:
        """The table of open files, read now."""
        return OpenFiles(Table(self.words, _FILES // 8, _FILE_ROWS))


class Table:
    """Rows of a key, never 0, and a value, both u64. An index in this process finds them."""

    def __init__(self, words: memoryview, first: int, rows: int) -> None:
        self._words = words
        keys = words[first : first + 2 * rows : 2].tolist()
        self._at = {key: first + 2 * row for row, key in enumerate(keys) if key}
        self._free = [first + 2 * row for row in reversed(range(rows)) if not keys[row]]

    def __len__(self) -> int:
        return len(self._at)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((key, self._words[at + 1]) for key, at in list(self._at.items()))

    def get(self, key: int) -> int | None:
        at = self._at.get(key)
        return None if at is None else self._words[at + 1]

    def put(self, key: int, value: int) -> None:
        """Add the row or change its value. Raises BoardFullError."""
        at = self._at.get(key)
        if at is not None:
            self._words[at + 1] = value
            return
        if not key:
            raise ValueError("0 marks a free row")
        if not self._free:
            raise BoardFullError(f"all {len(self._at)} rows are taken")
        at = self._free.pop()
        self._words[at + 1] = value
        self._words[at] = key
        self._at[key] = at

    def remove(self, key: int) -> None:
        """Remove the row if there is one."""
        at = self._at.pop(key, None)
        if at is not None:
            self._words[at] = 0
            self._free.append(at)


class OpenFiles:
    """Which regular files the kernel has open, by inode number."""

    def __init__(self, table: Table) -> None:
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    def __iter__(self) -> Iterator[OpenFile]:
        return (_open_file(ino, value) for ino, value in self._table)

    def get(self, ino: int) -> OpenFile | None:
        value = self._table.get(ino)
        return None if value is None else _open_file(ino, value)

    def put(self, ino: int, backing: int, opens: int) -> None:
        """Add the file or change what is said of it. Raises BoardFullError."""
        self._table.put(ino, opens << 32 | backing)

    def remove(self, ino: int) -> None:
        """Forget the file if it is known."""
        self._table.remove(ino)


def _open_file(ino: int, value: int) -> OpenFile:
    return OpenFile(ino, value & 0xFFFFFFFF, value >> 32)
