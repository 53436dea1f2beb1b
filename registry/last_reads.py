"""When blobs were read last, to the hour: what tells the cold from the rest.

A read is somebody's question where a blob's chunks lie, or for its bytes. It is noted in memory and written behind, all
that were noted in a minute in one transaction, and each blob once in an hour; so a read costs nothing, and a crash
forgets a minute of them at most.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final

from helios.errors import HeliosError
from registry.metadata import coldness
from registry.metadata.database import Changes, Database

log = logging.getLogger("helios.registry")

HOUR_S: Final = 3600
MOST: Final = 1 << 16
"""Blobs that are remembered of an hour, some 8 MB of memory. More are written early, and perhaps twice."""


class LastReads:
    """Of one registry; a blob goes by its domain and sha256. Threads may share it."""

    def __init__(self, database: Database, now: Callable[[], float] = time.time) -> None:
        self._database, self._now = database, now
        self._lock = threading.Lock()
        self._hour = 0
        self._noted: set[tuple[str, str]] = set()
        self._written: set[tuple[str, str]] = set()

    def note(self, domain: str, sha256: str) -> None:
        """The blob is read now. Blocks only where very many are."""
        hour = int(self._now()) // HOUR_S
        with self._lock:
            if hour > self._hour:
                self._hour = hour
                self._written.clear()
            if (domain, sha256) in self._written:
                return
            self._noted.add((domain, sha256))
            full = len(self._noted) >= MOST
        if full:
            self.write()

    def write(self) -> None:
        """Have what was noted stand in the metadata. What can't be written is kept for the next time, within bounds."""
        with self._lock:
            noted, self._noted = self._noted, set()
            hour = self._hour
        if not noted:
            return
        try:
            with self._database.write(lazy=True, changes=Changes.NOTHING) as connection:
                for domain in {domain for domain, _ in noted}:
                    digests = [sha256 for theirs, sha256 in noted if theirs == domain]
                    coldness.note_reads(connection, domain, digests, hour * HOUR_S)
        except HeliosError as error:
            log.warning("reads could not be noted; trying again later", extra={"error": error.message})
            with self._lock:
                if len(self._noted) + len(noted) < MOST:
                    self._noted |= noted
            return
        with self._lock:
            if hour == self._hour and len(self._written) + len(noted) <= MOST:
                self._written |= noted
