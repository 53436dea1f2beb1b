"""System calls around durable files: two that Python lacks (both release the GIL), and the fsync of a directory."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path
from typing import Final

_SYNC_FILE_RANGE_WRITE: Final = 2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]


def reserve(fd: int, size: int) -> bool:
    """Reserve ``size`` bytes of disk for an open file (fallocate(2)); the file then has that size.

    Returns False where the filesystem can't reserve; unlike posix_fallocate(3) nothing is then written. Raises OSError
    (ENOSPC, EDQUOT, EFBIG...) where it can but may not.
    """
    while size and _libc.fallocate(fd, 0, 0, size) != 0:
        number = ctypes.get_errno()
        if number in (errno.EOPNOTSUPP, errno.ENOSYS):
            return False
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))
    return True


def start_writeback(fd: int, offset: int, length: int) -> None:
    """Start writing dirty pages of a range to disk, without waiting (sync_file_range(2)).

    Makes a later fsync short and keeps dirty pages few. It is advice: a filesystem that can't is no error.
    """
    _libc.sync_file_range(fd, offset, length, _SYNC_FILE_RANGE_WRITE)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable: an fsync of a file does not cover its name."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
