"""Uploaded xorbs, from when they come until files were made of them: one directory an upload, with a deadline.

hf-xet remembers for weeks what it uploaded to a service, and does not send it again. Its memory goes by the service's
address, so each spool has an address of its own: a client that comes back to one finds everything it remembers, and one
that is sent to a new spool remembers nothing. That is why a spool takes no new client once something of it was
committed, but stays, for those who have its address, until nobody has used it for a while.
"""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from helios.errors import EntryNotFound, Unavailable
from helios.names import RepoId
from registry.ingest import Source
from registry.ingest.staged import check_space

IDLE_S: Final = 3600.0
"""How long a spool stays after its last use, in seconds."""
MAX_SPOOLS: Final = 512
PIECE: Final = 1 << 20
"""Bytes written at a time."""


@dataclass(slots=True)
class Spool:
    """One upload's xorbs, in files named by their hashes."""

    name: str
    repo: RepoId
    tenant: str | None
    directory: Path
    made: float
    used: float
    open: bool = True
    """Whether clients are still sent here."""
    busy: int = 0
    reserved: int = 0
    """Bytes of xorbs for which room was asked for and of which no file was made yet."""

    def path(self, xorb: str) -> Path:
        return self.directory / xorb


class Spools:
    """The spools of one process; on the event loop alone, except that files in them are written by threads."""

    def __init__(
        self,
        root: Path,
        named: Callable[[str], str] = str,
        *,
        idle_s: float = IDLE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """What an earlier process left below ``root`` is removed: nobody knows its address any more. ``named`` makes a
        name from which other processes know whose spool it is."""
        self._named = named
        self._root, self._idle_s, self._clock = root, idle_s, clock
        self._spools: dict[str, Spool] = {}
        shutil.rmtree(root, ignore_errors=True)

    def __len__(self) -> int:
        return len(self._spools)

    def of(self, repo: RepoId, tenant: str | None) -> Spool:
        """Where a client who uploads to the repository is sent. Raises Unavailable when there are too many."""
        for spool in self._spools.values():
            young = self._clock() - spool.made < self._idle_s  # commits at other processes are not heard of
            if spool.open and young and (spool.repo, spool.tenant) == (repo, tenant):
                return spool
        if len(self._spools) >= MAX_SPOOLS:
            raise Unavailable(f"{MAX_SPOOLS} uploads are under way; try again later")
        name = self._named(secrets.token_hex(16))
        spool = self._spools[name] = Spool(name, repo, tenant, self._root / name, self._clock(), self._clock())
        return spool

    @contextmanager
    def using(self, name: str) -> Iterator[Spool]:
        """The spool, which stays as long as the context lasts. Raises NotFound for one that has gone."""
        spool = self._spools.get(name)
        if spool is None:
            raise EntryNotFound("this upload was given up too long ago: start it again")
        spool.busy += 1
        try:
            yield spool
        finally:
            spool.busy -= 1
            spool.used = self._clock()

    def committed(self, repo: RepoId) -> None:
        """Something that was uploaded to the repository was committed: whoever comes next gets a new spool."""
        for spool in self._spools.values():
            if spool.repo == repo:
                spool.open = False

    def drop_idle(self) -> list[Path]:
        """Forget the spools that nobody used for long; returns their directories, to be removed."""
        idle = [s for s in self._spools.values() if not s.busy and self._clock() - s.used > self._idle_s]
        for spool in idle:
            del self._spools[spool.name]
        return [spool.directory for spool in idle]

    def close(self) -> None:
        self._spools.clear()
        shutil.rmtree(self._root, ignore_errors=True)


def receive_file(path: Path, size: int, source: Source) -> None:
    """Put the bytes of a source into a file, which is there whole or not at all. Raises NoSpace."""
    path.parent.mkdir(parents=True, exist_ok=True)
    check_space(path.parent, size)
    half = path.with_name(f"{path.name}.{id(source):x}")
    try:
        buffer = memoryview(bytearray(PIECE))
        with half.open("wb", buffering=0) as file:
            while count := source.readinto(buffer):
                file.write(buffer[:count])
        half.replace(path)
    finally:
        half.unlink(missing_ok=True)
