"""READs of one tier's open files that must ask its disk, from the event loop: each in a thread, as many as the disk may
be asked at once. A disk that hangs keeps its own threads and buffers, and no others: whoever waits for it is told when
it is given up (silence.py), and its threads are left behind.

Why sharing the buffers is safe: pyfuse3 copies what ``read`` returns to the kernel before its task waits again, and so
does every other caller, so from the moment a buffer is filled until it was used no other task runs. A buffer belongs to
its thread until that is done, and returns to the pool only then; one of a thread that was left behind never does.
"""

from __future__ import annotations

import errno
import os
from typing import Final

import trio

from heliosfs.tiers.silence import Asked

MAX_READ: Final = 1 << 20
"""Largest READ the kernel sends, in bytes: 256 pages (fs.fuse.max_pages_limit)."""

THREADS: Final = 8
"""Reads that may wait for a disk at once; each holds one buffer."""


NO_NOWAIT: Final = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})
"""A filesystem's answers to RWF_NOWAIT when it can't: then a thread is always asked."""


class DiskReads:
    """Used from one trio loop."""

    def __init__(self, asked: Asked, threads: int = THREADS) -> None:
        self._asked = asked
        self._limiter = trio.CapacityLimiter(threads)
        self._turns = trio.Semaphore(threads)
        self._buffers: list[memoryview] = []
        self._waiting: set[trio.CancelScope] = set()
        self._given_up = False
        self._nowait = True

    def at_once(self, fd: int, view: memoryview, offset: int) -> int:
        """Read what takes no time: what is in the page cache. Returns how many bytes that were; raises OSError."""
        if self._nowait:
            try:
                return os.preadv(fd, [view], offset, os.RWF_NOWAIT)
            except BlockingIOError:
                pass
            except OSError as error:
                if error.errno not in NO_NOWAIT:
                    raise
                self._nowait = False
        return 0

    @property
    def busy(self) -> int:
        """Threads at the disk."""
        return int(self._limiter.borrowed_tokens)

    async def read(self, fd: int, offset: int, size: int) -> memoryview:
        """Up to ``size`` bytes, at most MAX_READ, from ``offset``; fewer only at the end of the file.

        Valid until the caller waits again. Raises OSError, ETIMEDOUT where the disk hangs.
        """
        with trio.CancelScope() as scope:
            if self._given_up:
                scope.cancel()
            self._waiting.add(scope)
            try:
                async with self._turns:
                    buffer = self._buffers.pop() if self._buffers else memoryview(bytearray(MAX_READ))
                    view = buffer[:size]
                    try:
                        count = await trio.to_thread.run_sync(
                            self._fill, fd, view, offset, abandon_on_cancel=True, limiter=self._limiter
                        )
                    except OSError:
                        self._buffers.append(buffer)
                        raise
                    self._buffers.append(buffer)
                    return view[:count]
            finally:
                self._waiting.discard(scope)
        raise OSError(errno.ETIMEDOUT, "its disk does not answer")

    def give_up(self) -> None:
        """The disk hangs: nobody waits for it any more."""
        self._given_up = True
        for scope in self._waiting:
            scope.cancel()

    def _fill(self, fd: int, view: memoryview, offset: int) -> int:
        filled = 0
        while filled < len(view):
            with self._asked.call():
                count = os.preadv(fd, [view[filled:]], offset + filled)
            if not count:
                break
            filled += count
        return filled
