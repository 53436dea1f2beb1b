"""A file that may be replaced while a process runs: looked at now and then, read again when it changed."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, Generic, TypeVar

from helios.errors import UsageError

LOOK_AGAIN_S: Final = 2.0
"""How often a file is looked at, in seconds: what was revoked in it works no longer than that."""

T = TypeVar("T")
log = logging.getLogger("helios.watched")


class WatchedFile(Generic[T]):
    """What ``read`` makes of a file, as the file is now. Threads may share it.

    A file that can't be read, or that ``read`` refuses with UsageError, changes nothing: what it said before counts,
    and a warning is logged. ``version`` grows with each change.
    """

    def __init__(
        self, path: Path, read: Callable[[Path], T], what: str, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """``what`` names the file in messages ("file of tokens"). Raises UsageError, as ``read`` does."""
        self._path, self._make, self._what, self._clock = path, read, what, clock
        self._lock = threading.Lock()
        self._stamp = self._look()
        self._value = read(path)
        self._looked = clock()
        self.version = 0

    def get(self) -> T:
        """The value of this moment."""
        if self._clock() - self._looked >= LOOK_AGAIN_S:
            self._look_again()
        return self._value

    def _look_again(self) -> None:
        with self._lock:
            if self._clock() - self._looked < LOOK_AGAIN_S:
                return
            self._looked = self._clock()
            try:
                stamp = self._look()
                if stamp != self._stamp:
                    self._value, self._stamp = self._make(self._path), stamp
                    self.version += 1
            except UsageError as error:
                log.warning(
                    "a file can't be read; what it said before counts", extra={"what": self._what, "error": str(error)}
                )

    def _look(self) -> tuple[int, ...]:
        try:
            status = os.stat(self._path)
        except OSError as error:
            raise UsageError(f"the {self._what} {self._path} can't be read: {error.strerror}") from None
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
