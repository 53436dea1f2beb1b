"""Reading a source exactly: every byte of the size that was announced, no more and no fewer."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from helios.errors import InvalidInput, Unavailable
from registry.ingest.types import Source


class Reader:
    """A source whose first bytes can be looked at before they are read.

    ``path`` names the file in errors, ``size`` is its announced length in bytes.
    """

    def __init__(self, source: Source, path: str, size: int) -> None:
        self._source, self._path, self._size = source, path, size
        self._ahead = b""
        self._taken = 0

    def peek(self, count: int) -> bytes:
        """The first ``count`` bytes, which ``fill`` gives again; only before the first ``fill``."""
        if count > len(self._ahead):
            buffer = bytearray(count)
            buffer[: len(self._ahead)] = self._ahead
            self._read(memoryview(buffer)[len(self._ahead) :], len(self._ahead))
            self._ahead = bytes(buffer)
        return self._ahead[:count]

    def fill(self, buffer: memoryview) -> None:
        """Fill the whole buffer with the next bytes. Raises InvalidInput if the source ends before."""
        ahead = self._ahead[: len(buffer)]
        buffer[: len(ahead)] = ahead
        self._ahead = self._ahead[len(ahead) :]
        self._read(buffer[len(ahead) :], self._taken + len(ahead))
        self._taken += len(buffer)

    def expect_end(self) -> None:
        """Raises InvalidInput unless the source ends here."""
        if self._source.readinto(memoryview(bytearray(1))):
            raise InvalidInput(
                f"{self._path}: more than the {self._size} bytes announced; did the file grow meanwhile?"
            )

    def _read(self, buffer: memoryview, offset: int) -> None:
        done = 0
        while done < len(buffer):
            count = self._source.readinto(buffer[done:])
            if not count:
                raise InvalidInput(
                    f"{self._path}: ended after {offset + done} of {self._size} bytes; it is cut short or has changed"
                )
            done += count


class FileSource:
    """A local regular file as a source; a context manager. Raises InvalidInput when it is none or can't be opened."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a named pipe must not block us
        except OSError as error:
            raise InvalidInput(f"{path}: can't be read: {error.strerror}") from None
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise InvalidInput(f"{path}: not a regular file")
        self.size = status.st_size
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def readinto(self, buffer: memoryview, /) -> int:
        try:
            return os.readv(self._fd, [buffer])
        except OSError as error:
            raise Unavailable(f"{self._path}: can't be read: {error.strerror}") from None

    def close(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> FileSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
