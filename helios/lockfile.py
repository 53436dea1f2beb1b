"""A file that a running process holds under flock, and that says who it is.

The kernel frees the lock when its holder ends, however it ends: a free lock means a stale file, never a guess by pid.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

_TRIES = 5
_PAUSE_S = 0.02


class LockFile:
    """A held lock. ``write`` says who holds it; ``release`` removes the file and frees the lock."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path, self._fd = path, fd

    @classmethod
    def acquire(cls, path: Path) -> LockFile | None:
        """Take the lock, making the file where there is none; None while another process holds it.

        The file may be removed by its holder between our open and our lock: then the lock is on a file that nobody
        will find any more, and we start again. ``held`` takes the lock for an instant, so one refusal says little.
        """
        refused = 0
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                refused += 1
                if refused == _TRIES:
                    return None
                time.sleep(_PAUSE_S)
                continue
            try:
                if os.path.samestat(os.fstat(fd), os.stat(path)):
                    return cls(path, fd)
            except FileNotFoundError:
                pass
            os.close(fd)

    def fileno(self) -> int:
        """The descriptor that holds the lock: who inherits it holds it too."""
        return self._fd

    def read(self) -> bytes:
        """What the file says; after ``acquire`` that is what a holder that was killed left behind."""
        return os.pread(self._fd, 1 << 20, 0)

    def write(self, data: bytes) -> None:
        """Replace the content; whoever reads at the same time may see a part of each."""
        overwrite(self._fd, data)

    def release(self) -> None:
        self.path.unlink(missing_ok=True)
        os.close(self._fd)


def overwrite(fd: int, data: bytes) -> None:
    """Replace the content of a file in the blocks that it has, which a full disk takes, too. Raises OSError."""
    written = os.pwrite(fd, data, 0)
    if written < len(data):
        os.pwrite(fd, data[written:], written)
    os.ftruncate(fd, len(data))


def held(path: Path) -> bool:
    """Whether a living process holds the lock; never makes the file."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False
