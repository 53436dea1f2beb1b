"""A body on disk: an unnamed temporary file that vanishes with its last descriptor, whatever happens to the process.

Disks are slow, so threads read and write; everything else runs in the event loop's thread. The file is closed when it
was given up, no thread is at it and nobody holds it, who sends it on.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Callable
from typing import BinaryIO, TypeVar

T = TypeVar("T")


class Spool:
    """One body. ``size``: bytes that are in the file, or about to be."""

    __slots__ = ("_busy", "_closed", "_file", "size")

    def __init__(self) -> None:
        self.size = 0
        self._file: BinaryIO | None = None
        self._busy = 0
        self._closed = False

    def append(self, data: bytes, done: Callable[[OSError | None], None]) -> None:
        """Write more; ``done`` hears how it went. One at a time."""
        self.size += len(data)
        self._start(lambda: self._write(data), lambda _, error: done(error))

    def read(self, offset: int, count: int, done: Callable[[bytes, OSError | None], None]) -> None:
        """Read up to ``count`` bytes; ``done`` gets them, or why not."""
        self._start(lambda: self._read(offset, count), lambda data, error: done(data or b"", error))

    def hold(self) -> None:
        """Keep what there is until ``release``, also when it is closed meanwhile."""
        self._busy += 1

    def release(self) -> None:
        self._busy -= 1
        self._let_go()

    def close(self) -> None:
        """It won't be sent again."""
        self._closed = True
        self._let_go()

    def _start(self, call: Callable[[], T], done: Callable[[T | None, OSError | None], None]) -> None:
        def over(future: asyncio.Future[T]) -> None:
            self.release()
            error = None if future.cancelled() else future.exception()
            if isinstance(error, OSError):
                done(None, error)
            else:
                done(future.result(), None)

        self.hold()
        asyncio.get_running_loop().run_in_executor(None, call).add_done_callback(over)

    def _let_go(self) -> None:
        if self._closed and not self._busy and self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, data: bytes) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (it lives as long as the body)
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]

    def _read(self, offset: int, count: int) -> bytes:
        assert self._file is not None
        return os.pread(self._file.fileno(), count, offset)
