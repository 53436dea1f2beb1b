"""Copying a whole blob from one tier to another, verified on the way. Blocks; in a thread of its own.

The copy has a name that nothing reads until every byte was hashed on its way through memory, the hash is the blob's
name, and the disk has it all. A kill leaves a ``.moving`` file, which the next start removes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Callable
from typing import Final

from helios.errors import IntegrityError
from heliosfs.store.syscalls import start_writeback
from heliosfs.tiers.directory import TierDirectory
from heliosfs.tiers.places import unlink

BUFFER: Final = 4 << 20
TELL: Final = 32 << 20
"""Bytes between two calls of ``progress``."""


class Stopped(Exception):
    """The copy is not wanted any more."""


def room_for(size: int) -> int:
    """Bytes of disk that a copy takes at most, with what lies beside it and the filesystem's own share."""
    return -(-size // 4096) * 4096 + size // 1000 + 8192


def copy(source: str, to: TierDirectory, sha256: str, size: int, progress: Callable[[int], bool]) -> None:
    """Copy a whole blob's file to where ``to.place`` takes it from; after any error nothing is left.

    ``progress`` is told the bytes of disk that the copy takes, and answers whether to go on. Raises OSError,
    IntegrityError when the source's bytes are not the blob's, Stopped.
    """
    path = to.moving_path(sha256)
    with contextlib.ExitStack() as stack:
        came = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        stack.callback(os.close, came)
        goes = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        stack.callback(os.close, goes)
        try:
            _copy(came, goes, sha256, size, progress)
        except BaseException:
            with contextlib.suppress(OSError):  # a disk that is gone: so is the file, or its next start removes it
                unlink(path)
            raise


def _copy(came: int, goes: int, sha256: str, size: int, progress: Callable[[int], bool]) -> None:
    hasher, view = hashlib.sha256(), memoryview(bytearray(BUFFER))
    offset = told = 0
    while offset < size:
        part = view[: min(BUFFER, size - offset)]
        count = os.preadv(came, [part], offset)
        if not count:
            raise OSError(errno.EIO, f"the cached blob {sha256} is shorter than {size} bytes")
        hasher.update(part[:count])
        written = 0
        while written < count:
            written += os.pwrite(goes, part[written:count], offset + written)
        start_writeback(goes, offset, count)
        offset += count
        if offset - told >= TELL:
            told = offset
            if not progress(_cost(goes)):
                raise Stopped
    if hasher.hexdigest() != sha256 or os.fstat(came).st_size != size:
        raise IntegrityError(f"the cached file of {sha256} has other bytes than it was stored with")
    os.fchmod(goes, 0o444)
    os.fsync(goes)
    if not progress(_cost(goes)):
        raise Stopped


def _cost(fd: int) -> int:
    return os.fstat(fd).st_blocks * 512
