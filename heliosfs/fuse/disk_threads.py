"""Threads that answer READs from one disk. One that hangs keeps its own threads and no others, and what it was asked
for is taken from it when it is given up: a READ belongs to whoever takes it out of the table, once."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from heliosfs.fuse import protocol
from heliosfs.fuse.sides import Disk, Here

DISK_THREADS: Final = 4
"""READs that one disk is asked for at once."""

IDLE_S: Final = 10.0
"""A thread without work ends after so many seconds."""

CLOSE_S: Final = 5.0
"""How long the end waits for READs under way, in seconds: a disk may hang."""


@dataclass(frozen=True, slots=True, eq=False)
class Wanted:
    """A pending READ of ``size`` bytes; ``since`` is CLOCK_MONOTONIC in ns."""

    unique: int
    fh: int
    offset: int
    size: int
    here: Here
    since: int


class DiskThreads:
    """READs of one disk, at most DISK_THREADS at once. Any thread may call; ``got`` and ``refused`` are called from its
    own threads, with what was read or with why it was not. The bytes are valid during the call."""

    def __init__(
        self,
        disk: Disk,
        got: Callable[[Wanted, memoryview], None],
        refused: Callable[[Wanted, OSError], None],
    ) -> None:
        self.disk, self._got, self._refused = disk, got, refused
        self._changed = threading.Condition()
        self._queue: deque[Wanted] = deque()
        self._under_way: set[Wanted] = set()
        self._threads: set[threading.Thread] = set()
        self._idle = 0
        self._over = False

    def put(self, wanted: Wanted) -> bool:
        """Have it read; False where it has ended."""
        with self._changed:
            if self._over:
                return False
            self._queue.append(wanted)
            if self._idle >= len(self._queue):
                self._changed.notify()
            elif len(self._threads) < DISK_THREADS:
                thread = threading.Thread(target=self._run, name=f"fuse-{self.disk.name}", daemon=True)
                self._threads.add(thread)
                thread.start()
            return True

    def retire(self) -> bool:
        """End, if it has neither work nor threads; returns whether it did."""
        with self._changed:
            self._over = self._over or not (self._threads or self._queue)
            return self._over

    def give_up(self) -> list[Wanted]:
        """The disk hangs: its threads are left behind. Returns what was not answered, the caller's from now on."""
        with self._changed:
            self._over = True
            left = [*self._under_way, *self._queue]
            self._under_way.clear()
            self._queue.clear()
            self._changed.notify_all()
        return left

    def close(self, until: float) -> None:
        """Begin nothing more, and wait for what is under way until ``until`` (time.monotonic)."""
        with self._changed:
            self._over = True
            self._queue.clear()
            self._changed.notify_all()
            threads = list(self._threads)
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _run(self) -> None:
        buffer = memoryview(bytearray(protocol.MAX_READ))
        while (wanted := self._next()) is not None:
            view, failure = buffer[: wanted.size], None
            try:
                self._fill(view, wanted)
            except OSError as error:
                failure = error
            with self._changed:
                mine = wanted in self._under_way
                self._under_way.discard(wanted)
            if not mine:
                continue
            if failure is None:
                self._got(wanted, view)
            else:
                self._refused(wanted, failure)

    def _next(self) -> Wanted | None:
        """The next READ; None: this thread is to end."""
        with self._changed:
            self._idle += 1
            self._changed.wait_for(lambda: self._queue or self._over, IDLE_S)
            self._idle -= 1
            if self._queue:
                wanted = self._queue.popleft()
                self._under_way.add(wanted)
                return wanted
            self._threads.discard(threading.current_thread())
            return None

    def _fill(self, view: memoryview, wanted: Wanted) -> None:
        done = 0
        while done < len(view):
            with self.disk.asked.call():
                count = os.preadv(wanted.here.fd, [view[done:]], wanted.offset + done)
            if self._over and wanted not in self._under_way:
                return  # given up: the descriptor may be another file's by now
            if not count:
                raise OSError(errno.EIO, "a cached file is shorter than its blob")
            done += count
