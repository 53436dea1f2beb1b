"""EIO to whoever waits while there has been no worker for too long. Structures: linux/fuse.h.

RESEND queues again what dead workers took; then all that waits is read, and answered before anything else is done. So a
worker that comes next finds nothing half done, on the board neither.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from collections.abc import Container, Iterator

from heliosfs.keeper import kernel
from heliosfs.keeper.board import CHANGE, DELIVERIES, FILES, SIZE, Board

_REQUEST = struct.Struct("<IIQQIIIHH")
_RESENT = 1 << 63
_FORGET, _RELEASE, _FLUSH, _RELEASEDIR, _INTERRUPT, _BATCH_FORGET = 2, 18, 25, 29, 36, 42
_BACKING_CLOSE = 0x4004E502
_READ_BYTES = (1 << 20) + (1 << 16)  # the kernel demands room for its largest request


def refuse(fuse_fd: int, board: Board) -> int:
    """Answer every request that waits; returns how many. Leaves the descriptor non-blocking. Raises OSError.

    FORGET and INTERRUPT have no answer. Closing a file succeeds, and is taken off the board, because nobody will hear
    of it again.
    """
    os.set_blocking(fuse_fd, False)
    kernel.resend(fuse_fd)
    board.words[DELIVERIES // 8 : FILES // 8] = memoryview(bytes(FILES - DELIVERIES)).cast("Q")
    taken = list(_waiting(fuse_fd))
    unused = [put_back(board, {unique & ~_RESENT for _, unique, _ in taken})]
    for opcode, unique, ino in taken:
        code = 0 if opcode in (_RELEASE, _RELEASEDIR, _FLUSH) else -errno.EIO
        with contextlib.suppress(FileNotFoundError):  # the caller was killed meanwhile
            os.write(fuse_fd, kernel.REPLY.pack(kernel.REPLY.size, code, unique))
        if opcode == _RELEASE:
            unused.append(released(board, ino))
    for backing in filter(None, unused):
        with contextlib.suppress(OSError):  # it is not the kernel's any more
            fcntl.ioctl(fuse_fd, _BACKING_CLOSE, struct.pack("<I", backing))
    return len(taken)


def _waiting(fuse_fd: int) -> Iterator[tuple[int, int, int]]:
    """Opcode, number and inode of all requests that must be answered."""
    buffer = memoryview(bytearray(_READ_BYTES))
    while True:
        try:
            os.readv(fuse_fd, [buffer])
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EINTR):  # the caller was killed meanwhile
                continue
            if error.errno in (errno.EAGAIN, errno.ENODEV):  # that is all; unmounted
                return
            raise
        _, opcode, unique, ino, *_ = _REQUEST.unpack_from(buffer)
        if opcode not in (_FORGET, _BATCH_FORGET, _INTERRUPT):
            yield opcode, unique, ino


def put_back(board: Board, again: Container[int]) -> int:
    """Settle the change that a dead worker left, as fuse/modes.py does; ``again``: what the kernel sent again.

    Returns the backing id that nobody uses any more, else 0.
    """
    unique, ino, before = board.words[CHANGE : CHANGE + 3]
    if unique in again:
        _record(board, ino, before)
    unused = before & 0xFFFFFFFF if unique and _row(board, ino) is None else 0
    board.words[CHANGE] = 0
    return unused


def released(board: Board, ino: int) -> int:
    """One handle less. Returns the backing id that nobody uses any more, else 0."""
    row = _row(board, ino)
    state = board.words[row + 1] - (1 << 32) if row is not None else 0
    _record(board, ino, state)
    return 0 if state >> 32 else state


def _record(board: Board, ino: int, state: int) -> None:
    """Change an inode's row, if there is one; without a handle it goes."""
    if (row := _row(board, ino)) is not None:
        if state >> 32:
            board.words[row + 1] = state
        else:
            board.words[row] = 0


def _row(board: Board, ino: int) -> int | None:
    inodes = board.words[FILES // 8 : SIZE // 8 : 2].tolist()
    return FILES // 8 + 2 * inodes.index(ino) if ino in inodes else None
