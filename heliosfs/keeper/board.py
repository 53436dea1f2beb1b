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
fuse/tables.py, or the keeper while there is none. A row's key is written last and removed first, so that a process
killed in between leaves a whole row or none.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from collections.abc import Container
from typing import Final

VERSION: Final = 1
INIT_MAX: Final = 256
INIT: Final = 64
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

    @property
    def init(self) -> bytes:
        """The kernel's INIT request with its header; empty before it came."""
        return self._map[INIT : INIT + self._init_len]

    @init.setter
    def init(self, request: bytes) -> None:
        if len(request) > INIT_MAX:
            raise ValueError(f"an INIT request of {len(request)} bytes is longer than {INIT_MAX}")
        self._map[INIT : INIT + len(request)] = request
        self._init_len = len(request)

    def forgive(self) -> None:
        """Forget all deliveries."""
        self._map[DELIVERIES:FILES] = bytes(FILES - DELIVERIES)

    def put_back(self, again: Container[int]) -> int:
        """Settle the change that a dead worker left, as fuse/modes.py does; ``again``: what the kernel sent again.

        Returns the backing id that nobody uses, else 0.
        """
        unique, ino, state = self.words[CHANGE : CHANGE + 3]
        if unique in again:
            self._put(ino, state if state >> 32 else 0)
        self.words[CHANGE] = 0
        return state & 0xFFFFFFFF if unique and self._row(ino) is None else 0

    def released(self, ino: int) -> int:
        """One handle less. Returns the backing id that nobody uses any more, else 0."""
        row = self._row(ino)
        state = self.words[row + 1] if row is not None else 0
        last = state >> 32 <= 1
        self._put(ino, 0 if last else state - (1 << 32))
        return state & 0xFFFFFFFF if last else 0

    def _row(self, ino: int) -> int | None:
        keys = self.words[FILES // 8 : SIZE // 8 : 2].tolist()
        return FILES // 8 + 2 * keys.index(ino) if ino in keys else None

    def _put(self, ino: int, state: int) -> None:
        row = self._row(ino)
        if not state:
            if row is not None:
                self.words[row] = 0
            return
        row = self._row(0) if row is None else row  # a free one
        if row is not None:
            self.words[row + 1], self.words[row] = state, ino
