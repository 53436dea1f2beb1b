"""Disks that hang: calls to them that do not come back. A thread in a system call can't be ended, only left behind.

Calls that take a moment on any disk that works (a look at whether it answers, opening a file) are counted while they
are under way. Where one takes longer than ``HANG_S`` the disk is *silent*: whoever owns the tier lets it go, and looks
at it again when every call has come back, those that may take long, too: what a late one does must not meet a file of
the tier's next life. Whatever asks a filesystem that may wait for a network or another process
(``waits_for_nobody``) does so in a thread.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from helios.mounts import mount_table

HANG_S: Final = 4.0
"""A disk that has not answered for so many seconds hangs: one under load takes tenths of it to open a file."""

LOCAL: Final = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "tmpfs", "zfs", "bcachefs", "overlay"})
"""Filesystems that open, stat and close what the kernel knows without waiting for anybody."""


class Asked:
    """Calls to one disk that are under way. Threads make them, anybody may look; times in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._since: dict[int, float] = {}

    @contextmanager
    def call(self, *, long: bool = False) -> Iterator[None]:
        """The block makes a call; ``long``: it writes or flushes, and how long that takes is no sign of a hang."""
        with self._lock:
            number = next(self._numbers)
            self._since[number] = math.inf if long else self._clock()
        try:
            yield
        finally:
            with self._lock:
                del self._since[number]

    def longest(self) -> float:
        """For how long the oldest call has been under way that is not a long one; 0 without any."""
        with self._lock:
            return max(0.0, self._clock() - min(self._since.values(), default=math.inf))

    @property
    def idle(self) -> bool:
        """Whether no call is under way, long ones included."""
        return not self._since


def waits_for_nobody(path: Path) -> bool:
    """Whether the filesystem of ``path`` is one of this machine's own disks, or memory. Raises OSError."""
    real = path.resolve()
    above = [entry for entry in mount_table() if entry.mountpoint == real or entry.mountpoint in real.parents]
    above.reverse()  # of several on one place the last one is on top
    return bool(above) and max(above, key=lambda entry: len(entry.mountpoint.parts)).fstype in LOCAL
