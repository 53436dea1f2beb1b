"""READs of bytes that are here, answered in front of pyfuse3: from the page cache or from memory on the spot, from the
disk in a thread."""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from helios.metrics import MountMetrics
from heliosfs.fuse import protocol
from heliosfs.fuse.sides import Files

log = logging.getLogger("heliosfs.fuse")

DISK_THREADS: Final = 4


class LocalReads:
    """``send(parts)`` hands the kernel an answer that nobody else knows of; ``answer(unique, data)`` one to a request
    that is pending; ``wait(unique, fh, offset, size)`` is for bytes that the disk did not give after all.

    ``at_once`` is called from one thread. Times are CLOCK_MONOTONIC in ns.
    """

    def __init__(
        self,
        files: Files,
        metrics: MountMetrics,
        send: Callable[[Sequence[bytes | memoryview]], object],
        answer: Callable[[int, memoryview], None],
        wait: Callable[[int, int, int, int], None],
    ) -> None:
        self._files, self._send, self._answer, self._wait = files, send, answer, wait
        self._payload = memoryview(bytearray(protocol.MAX_READ))
        self._pool = ThreadPoolExecutor(DISK_THREADS, "fuse-disk")
        self._local = threading.local()
        self._reads = metrics.channel_reads
        self._bytes = {tier: metrics.read_bytes.labels(tier) for tier in ("l1", "l2", "memory")}
        self._latency = metrics.requests.labels(protocol.NAMES[protocol.READ])

    def close(self) -> None:
        """Wait for the threads; what they have not begun stays unanswered."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def at_once(self, unique: int, fh: int, offset: int, size: int, found: tuple[int, int] | None, since: int) -> bool:
        """Answer a READ whose bytes are in the page cache of ``found``, a descriptor and a count, or in memory.

        False: the disk must be asked, which also finds out what is wrong, or somebody else.
        """
        parts: list[memoryview] | None = None
        if found is not None and self._cached(found[0], self._payload[: found[1]], offset):
            parts, tier = [self._payload[: found[1]]], self._files.tier(fh)
        elif (parts := self._files.held(fh, offset, size)) is not None:
            tier = "memory"
        if parts is None:
            return False
        count = sum(map(len, parts))
        self._count(tier, count)
        self._send([protocol.REPLY.pack(protocol.REPLY.size + count, 0, unique), *parts])
        seconds = (time.monotonic_ns() - since) / 1e9
        self._latency.observe(seconds)
        self._files.answered(fh, offset, parts, seconds)
        return True

    def later(self, unique: int, fh: int, offset: int, found: tuple[int, int], since: int) -> None:
        """Answer a READ, pending by now, from the disk."""
        self._pool.submit(self._from_disk, unique, fh, *found, offset, since)

    @staticmethod
    def _cached(fd: int, view: memoryview, offset: int) -> bool:
        try:
            return not view or os.preadv(fd, [view], offset, os.RWF_NOWAIT) == len(view)
        except OSError:
            return False

    def _from_disk(self, unique: int, fh: int, fd: int, size: int, offset: int, since: int) -> None:
        """In a thread of the pool, with a buffer of its own. What the disk refuses the event loop may get elsewhere."""
        try:
            buffer: memoryview | None = getattr(self._local, "buffer", None)
            if buffer is None:
                buffer = self._local.buffer = memoryview(bytearray(protocol.MAX_READ))
            view, done = buffer[:size], 0
            while done < size:
                count = os.preadv(fd, [view[done:]], offset + done)
                if not count:
                    raise OSError(errno.EIO, "a cached file is shorter than its blob")
                done += count
        except OSError as error:
            log.warning("a cached file can't be read", extra={"reason": error.strerror})
            self._wait(unique, fh, offset, size)
        else:
            self._count(self._files.tier(fh), size)
            self._answer(unique, view)
            self._files.answered(fh, offset, [view], (time.monotonic_ns() - since) / 1e9)

    def _count(self, tier: str, count: int) -> None:
        self._bytes[tier].inc(count)
        self._reads.inc()
