"""Ways of reading a file that a broken mount can't take the test down with: each ends, with bytes or an OSError."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
import threading
from collections.abc import Callable
from typing import Final, TypeVar

T = TypeVar("T")

_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_MS_RDONLY, _MS_REMOUNT = 1, 32


class Hangs(AssertionError):
    """A call did not come back in time."""


def within(seconds: float, call: Callable[[], T], what: str = "the call") -> T:
    """What the call gives, in a thread of its own; raises Hangs when it takes longer (the thread is left behind)."""
    result: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            result.append(call())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise Hangs(f"{what} took more than {seconds:g} s")
    if failure:
        raise failure[0]
    return result[0]


def pread(fd: int, size: int, offset: int) -> bytes:
    """All ``size`` bytes from ``offset``, fewer at the end of the file."""
    out = bytearray()
    while len(out) < size and (data := os.pread(fd, size - len(out), offset + len(out))):
        out += data
    return bytes(out)


def touch(fd: int, size: int, offset: int) -> bytes:
    """Like ``pread``, through a mapping. The kernel touches the pages, so that a failure is EFAULT and no SIGBUS."""
    length = os.fstat(fd).st_size
    size = max(0, min(size, length - offset))
    if not size:
        return b""
    begin = offset - offset % mmap.ALLOCATIONGRANULARITY
    sink = os.memfd_create("touched")
    try:
        with (
            mmap.mmap(fd, offset + size - begin, prot=mmap.PROT_READ, offset=begin) as mapped,
            memoryview(mapped) as view,
            view[offset - begin :] as wanted,
        ):
            done = 0
            while done < size:
                with wanted[done:] as rest:
                    done += os.write(sink, rest)
        return os.pread(sink, size, 0)
    finally:
        os.close(sink)


def getdents(fd: int, size: int) -> list[tuple[str, int]]:
    """The next entries of a directory that fit into ``size`` bytes: name and where the one after it is (lseek)."""
    buffer = ctypes.create_string_buffer(size)
    count = _LIBC.getdents64(fd, buffer, ctypes.c_size_t(size))
    if count < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    out, at = [], 0
    while at < count:
        _, following, length, _ = struct.unpack_from("<QqHB", buffer, at)
        name = buffer.raw[at + 19 : at + length].split(b"\0")[0]
        if name not in (b".", b".."):
            out.append((os.fsdecode(name), following))
        at += length
    return out


def drop_names(mountpoint: str | os.PathLike[str]) -> bool:
    """Let the kernel forget the names of this one mount; False where that needs root."""
    if os.geteuid() != 0:
        return False
    if _LIBC.mount(b"", os.fsencode(mountpoint), b"", _MS_REMOUNT | _MS_RDONLY, b"") != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), os.fspath(mountpoint))
    return True


def outcome(call: Callable[[], bytes]) -> bytes | int:
    """The bytes, or the errno: what a mapping could not give is EIO."""
    try:
        return call()
    except OSError as error:
        return errno.EIO if error.errno == errno.EFAULT else error.errno or errno.EIO
