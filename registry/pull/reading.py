"""Ways to read a file while it comes: for a client, and for the ingest."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import BinaryIO, Protocol

from helios.errors import IntegrityError


@dataclass(frozen=True, slots=True)
class View:
    """Bytes up to ``end`` may be read of the file of this attempt; ``fd`` is a descriptor of it for the reader to own,
    None where it has one."""

    attempt: int
    end: int
    fd: int | None


class Viewed(Protocol):
    """What readers need of a flight."""

    def view(self, number: int, offset: int, attempt: int | None) -> View | None: ...

    def read_into(self, buffer: memoryview, offset: int) -> int: ...


class Reader:
    """One client's view of a flight, as its reader number ``number``. Used on the event loop."""

    def __init__(self, flight: Viewed, number: int) -> None:
        self._flight, self._number = flight, number
        self._attempt: int | None = None
        self._file: BinaryIO | None = None

    def ready(self, offset: int, begun: bool) -> tuple[BinaryIO, int] | None:
        """A file, and up to where its bytes from ``offset`` on may be sent; None when none may yet.

        ``begun``: some were sent already, so that what comes must be of the same attempt. Raises IntegrityError if it
        is not, and what the flight fails with.
        """
        view = self._flight.view(self._number, offset, self._attempt)
        if view is None:
            return None
        if view.fd is not None:
            self.close()
            self._file = os.fdopen(view.fd, "rb", buffering=0)
            self._attempt = view.attempt
            if begun:
                raise IntegrityError("the upstream sent wrong bytes; ask again")
        assert self._file is not None, "the first view brings a descriptor"
        return self._file, view.end

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class FlightSource:
    """The flight's bytes in order, as an ingest's source."""

    def __init__(self, flight: Viewed) -> None:
        self._flight, self._offset = flight, 0

    def readinto(self, buffer: memoryview, /) -> int:
        count = self._flight.read_into(buffer, self._offset)
        self._offset += count
        return count
