"""System calls on files that Python lacks, and the fsync of a directory."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import struct
from pathlib import Path
from typing import Final

REFUSED: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})
"""What a disk says that takes nothing more; what is on it can be read."""

_SYNC_FILE_RANGE_WRITE: Final = 2
_OPENAT2, _AT_FDCWD, _RESOLVE_CACHED = 437, -100, 0x20
_OPEN_HOW: Final = struct.Struct("<QQQ")

_libc = ctypes.CDLL(None, use_errno=True)
_quick = ctypes.PyDLL(None)  # what never waits need not give the GIL away
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


def open_cached(path: str) -> int:
    """Open a file for reading if the kernel knows its whole path already: that takes microseconds (openat2(2)).

    Returns -1 where it does not, where there is no such file or it is a symbolic link, and on kernels before 5.12.
    """
    how = _OPEN_HOW.pack(os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, 0, _RESOLVE_CACHED)
    fd: int = _quick.syscall(_OPENAT2, _AT_FDCWD, os.fsencode(path), how, len(how))
    return fd


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable: an fsync of a file does not cover its name."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_all(fd: int, data: bytes | bytearray | memoryview) -> None:
    """Write everything at the file's position; write(2) may take less at a time. Raises OSError."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def replace_file(path: Path, data: bytes, temporary: Path, *, lasting: bool = True) -> None:
    """Make ``data`` the content of ``path``, by way of another name beside it; it survives a power cut on return.

    Raises OSError: then the file is what it was or, when only the last fsync failed, the new one. Without ``lasting`` a
    power cut may leave either, neither, or a torn one.
    """
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            write_all(fd, data)
            if lasting:
                os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    if lasting:
        sync_directory(path.parent)
