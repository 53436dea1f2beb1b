"""READs of bytes that are here, answered in front of pyfuse3: from the page cache or from memory on the spot, from a
disk in a thread of that disk's."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence

from helios.metrics import MountMetrics
from heliosfs.fuse import protocol
from heliosfs.fuse.disk_threads import CLOSE_S, DiskThreads, Wanted
from heliosfs.fuse.sides import Disk, Files, Here

log = logging.getLogger("heliosfs.fuse")


class LocalReads:
    """``send(parts)`` hands the kernel an answer that nobody else knows of; ``answer(unique, data)`` one to a request
    that is pending; ``wait(unique, fh, offset, size)`` is for bytes that the disk did not give after all.

    ``at_once`` and ``later`` are called from one thread. Times are CLOCK_MONOTONIC in ns.
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
        self._disks: dict[Disk, DiskThreads] = {}
        self._reads = metrics.channel_reads
        self._bytes = {tier: metrics.read_bytes.labels(tier) for tier in ("l1", "l2", "memory")}
        self._latency = metrics.requests.labels(protocol.NAMES[protocol.READ])

    def close(self) -> None:
        """Wait for the threads, but not for disks that hang; what they have not begun stays unanswered."""
        until = time.monotonic() + CLOSE_S
        for threads in list(self._disks.values()):
            threads.close(until)

    def look(self) -> None:
        """To be called now and then, from any one thread: what a disk was asked for that hangs is had elsewhere."""
        for disk, threads in list(self._disks.items()):
            if disk.silent:
                del self._disks[disk]
                for wanted in threads.give_up():
                    self._elsewhere(wanted)
            elif threads.retire():  # the tier may be another directory by now
                del self._disks[disk]

    def at_once(self, unique: int, fh: int, offset: int, size: int, found: Here | None, since: int) -> bool:
        """Answer a READ whose bytes are in the page cache of ``found`` or in memory.

        False: the disk must be asked, which also finds out what is wrong, or somebody else.
        """
        parts: list[memoryview] | None = None
        if found is not None and self._cached(found.fd, self._payload[: found.count], offset):
            parts, tier = [self._payload[: found.count]], found.places.name
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

    def later(self, unique: int, fh: int, offset: int, found: Here, since: int) -> None:
        """Answer a READ, pending by now, from the disk."""
        wanted, disk = Wanted(unique, fh, offset, found.count, found, since), found.places
        threads = self._disks.get(disk)
        if threads is None and not disk.silent:
            threads = self._disks[disk] = DiskThreads(disk, self._got, self._refused)
        if threads is None or not threads.put(wanted):
            self._elsewhere(wanted)

    @staticmethod
    def _cached(fd: int, view: memoryview, offset: int) -> bool:
        try:
            return not view or os.preadv(fd, [view], offset, os.RWF_NOWAIT) == len(view)
        except OSError:
            return False

    def _got(self, wanted: Wanted, view: memoryview) -> None:
        self._count(wanted.here.places.name, len(view))
        self._answer(wanted.unique, view)
        self._files.answered(wanted.fh, wanted.offset, [view], (time.monotonic_ns() - wanted.since) / 1e9)

    def _refused(self, wanted: Wanted, error: OSError) -> None:
        """What the disk refuses the event loop may get elsewhere."""
        log.warning("a cached file can't be read", extra={"reason": error.strerror})
        self._elsewhere(wanted)

    def _elsewhere(self, wanted: Wanted) -> None:
        self._wait(wanted.unique, wanted.fh, wanted.offset, wanted.size)

    def _count(self, tier: str, count: int) -> None:
        self._bytes[tier].inc(count)
        self._reads.inc()
