"""What the files of a push are read from, so that the event loop can stop it: a request's body or a local file."""

from __future__ import annotations

import os
from typing import Protocol

from helios.errors import HeliosError, InvalidInput
from registry.ingest.reader import FileSource


class Stoppable(Protocol):
    """What an ingest reads from and the event loop can stop. ``taken`` counts the bytes read so far."""

    taken: int

    def fail(self, error: HeliosError) -> None: ...


class LocalSource:
    """A local file as a source that can be stopped from another thread."""

    def __init__(self) -> None:
        self.file: FileSource | None = None
        self.taken = 0
        self._error: HeliosError | None = None

    def fail(self, error: HeliosError) -> None:
        self._error = error

    def readinto(self, buffer: memoryview, /) -> int:
        if self._error is not None:
            raise self._error
        assert self.file is not None
        count = self.file.readinto(buffer)
        self.taken += count
        return count


def stamp(local: str) -> tuple[int, int, int]:
    """What differs after a file was written or replaced."""
    try:
        status = os.stat(local)
    except OSError as error:
        raise InvalidInput(f"{local}: can't be read: {error.strerror}") from None
    return status.st_ino, status.st_size, status.st_mtime_ns
