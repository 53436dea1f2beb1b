"""The board: a page of shared memory on which a worker says how it does, and leaves what its successor must know.

A memfd that the keeper makes and holds and every worker maps; numbers are little endian (every machine that we run on):

    0      magic "HBRD", u32 version
    8      u64 generation   counts workers; one that finds another number than its own is dropped
    16     u64 loop_ns      CLOCK_MONOTONIC: when the worker's trio loop was last alive
    24     u64 channel_ns   the same for the threads of its channel
    32     u64 oldest_ns    when the oldest request that it took and did not answer came; 0: none
    40     u64 limit_ns     how old that may become before the worker counts as hanging; 0: not known yet
    48     u64 crashes      deaths of workers that count against the requests that were pending then
    56     u32 init_len, u32 0, then 256 bytes at 64: the kernel's INIT request, for later workers to replay
    320    u64 mounted_ns   CLOCK_REALTIME: when the mount was made
    328    u64 unique, ino, state                     the change of an open file that is under way: what was before
    352    2 x u64          the worker's own (fuse/ledger.py)
    4096   1024 x (u64 unique, u64 count)             deliveries of requests that survived a crash
    20480  16384 x (u64 ino, u64 state)               regular files that are open in the kernel

``state`` is backing id | open handles << 32. Each number is written with one aligned store, so a reader in the other
process sees the old or the new one. The tables belong to one process at a time: the worker, which knows them by
fuse/tables.py, or while there is none the keeper (refuse.py). A row's key is written last and removed first, so that a
process killed in between leaves a whole row or none.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from typing import Final

VERSION: Final = 1
INIT_LEN, INIT, INIT_MAX = 56, 64, 256
CHANGE: Final = 328 // 8
"""The word where the change that is under way begins."""
DELIVERIES, DELIVERY_ROWS = 4096, 1024
FILES, FILE_ROWS = 20480, 16384
SIZE: Final = FILES + FILE_ROWS * 16

_MAGIC = b"HBRD" + struct.pack("<I", VERSION)


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
    init_len = _Word(INIT_LEN)
    mounted_ns = _Word(320)
    oldest = _Word(368)
    late = _Word(376)

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
    def create(cls, content: bytes = _MAGIC) -> Board:
        """An empty board, or one that says the same as another; it can neither grow nor shrink."""
        fd = os.memfd_create("helios-board", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, SIZE)
        os.pwrite(fd, content, 0)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        return cls(fd)

    def copied(self) -> Board:
        """Another board that says the same, once this one does not change for the time that copying takes."""
        content = self._map[:]
        while content != (again := self._map[:]):
            content = again
        return Board.create(content)

    def close(self) -> None:
        """Unmap it and close the descriptor. Tables that were made from it must not be used any more."""
        self.words.release()
        self._map.close()
        os.close(self.fd)
