"""The caller's buffers, checked, and reading a local file into them."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
import time
from typing import TYPE_CHECKING, Final

from helios.errors import DeadlineExceeded, Unavailable
from heliosfs.client.values import Closed

if TYPE_CHECKING:
    from typing_extensions import Buffer

PART: Final = 32 << 20
"""Bytes between two looks at a deadline or a cancellation."""

_OPEN: Final = os.O_RDONLY | os.O_CLOEXEC


def writable(buffer: Buffer) -> memoryview:
    """The buffer as bytes. Raises TypeError unless it is writable and C-contiguous.

    Formats that a memoryview can't recast (structures, half floats of other libraries) go through ctypes, without a
    copy.
    """
    try:
        view = memoryview(buffer)
    except TypeError:
        raise TypeError(
            f"{type(buffer).__name__} has no buffer to read into: pass a bytearray, memoryview, mmap or NumPy array "
            "(for a PyTorch tensor on the CPU: tensor.view(torch.uint8).numpy())"
        ) from None
    if view.readonly:
        raise TypeError(f"this {type(buffer).__name__} is read-only")
    if not view.c_contiguous:
        raise TypeError(f"this {type(buffer).__name__} is not contiguous in memory: make a contiguous copy")
    if not view.nbytes:
        return memoryview(bytearray())
    try:
        return view.cast("B")
    except (TypeError, ValueError):
        return memoryview((ctypes.c_ubyte * view.nbytes).from_buffer(view)).cast("B")


def clipped(view: memoryview, offset: int, size: int) -> memoryview:
    """The part of the view that a file of ``size`` bytes can fill from ``offset``. Raises ValueError."""
    if offset < 0:
        raise ValueError(f"the offset {offset} is negative")
    return view[: max(0, min(len(view), size - offset))]


class Descriptor:
    """An open whole file. Threads may share it: ``close`` waits for nobody, the last read under way closes it."""

    def __init__(self, fd: int, name: str, size: int) -> None:
        self._fd, self._name, self.size = fd, name, size
        self._lock = threading.Lock()
        self._users = 0
        self._closed = False

    @classmethod
    def again(cls, fd: int, name: str, size: int) -> Descriptor:
        """Open the file behind a descriptor anew: with read-ahead of its own, and a life of its own."""
        try:
            return cls(os.open(f"/proc/self/fd/{fd}", _OPEN), name, size)
        except OSError as error:
            raise Unavailable(f"{name}: the cached file can't be opened: {error.strerror}") from error

    def fileno(self) -> int:
        """The descriptor, valid until ``close``. Raises Closed."""
        if self._closed:
            raise Closed(f"{self._name} is closed")
        return self._fd

    def read_into(self, view: memoryview, offset: int, until: float = float("inf")) -> None:
        """Fill the view, which lies within the file, with preadv(2). Blocks.

        ``until`` is a time of the monotonic clock. Raises DeadlineExceeded, Closed, Unavailable.
        """
        fd = self._enter()
        try:
            filled = 0
            while filled < len(view):
                if time.monotonic() > until:
                    raise DeadlineExceeded(f"{self._name}: not read before the deadline")
                if self._closed:
                    raise Closed(f"{self._name} was closed while it was read")
                count = os.preadv(fd, [view[filled : filled + PART]], offset + filled)
                if not count:
                    raise OSError(errno.EIO, "it is shorter than it should be")
                filled += count
        except OSError as error:
            raise Unavailable(f"{self._name}: the cached file can't be read: {error.strerror}") from error
        finally:
            self._leave()

    def read_cached(self, view: memoryview, offset: int) -> bool:
        """Fill the view from the page cache without blocking; False where that can't be done."""
        fd = self._enter()
        try:
            return os.preadv(fd, [view], offset, os.RWF_NOWAIT) == len(view)
        except OSError:  # not in the page cache, or a filesystem that can't tell: then it is read in a thread
            return False
        finally:
            self._leave()

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if self._users:
                return
        os.close(self._fd)

    def _enter(self) -> int:
        with self._lock:
            if self._closed:
                raise Closed(f"{self._name} is closed")
            self._users += 1
            return self._fd

    def _leave(self) -> None:
        with self._lock:
            self._users -= 1
            last = self._closed and not self._users
        if last:
            os.close(self._fd)
