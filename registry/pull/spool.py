"""What unfinished downloads keep on disk, across restarts.

    ROOT/models/org/name/<content>.partial    a sparse file of the content's size, named by its sha256 or git oid
    ROOT/models/org/name/<content>.blocks     numbers of the 1 MiB blocks of it that are here, four bytes each

One-segment repositories lie under ``_``. A block's number is written after its bytes: a killed registry loses at most
the blocks it was in the middle of. Nothing is fsynced: what a power cut loses is found by the hash at the end, and
fetched again.

Partial files are named by their content, so a branch that moves meanwhile costs only the files that changed. They go
when the file is stored, when a pull of their repository succeeds, or when nothing has touched them for a week.
"""

from __future__ import annotations

import os
import struct
import threading
import time
from collections.abc import Iterable, Iterator, Set
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from helios.errors import NoSpace, Unavailable
from helios.names import RepoId
from heliosfs.store.directory import FULL
from registry.pull.listing import RemoteFile

KEEP_S: Final = 7 * 86400.0
"""An unfinished download that nobody resumes is forgotten after a week."""

_NUMBER = struct.Struct("<I")


class Spool:
    """The directory of all unfinished downloads. Threads may share one; a store has one."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock = threading.Lock()

    def partial(self, repo: RepoId, file: RemoteFile) -> Partial:
        """The file's partial download, of the repository it comes from."""
        directory = self._directory(repo)
        with self._lock, guard(directory):
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        return Partial(directory / f"{file.key}.partial", file.size)

    def remove(self, repo: RepoId, keep: Set[str] = frozenset()) -> None:
        """Forget a repository's unfinished downloads, all but those of these contents."""
        directory = self._directory(repo)
        with self._lock, guard(directory), suppress(FileNotFoundError):
            for path in list(directory.iterdir()):
                if path.stem not in keep:
                    path.unlink()
            with suppress(OSError):  # not empty
                directory.rmdir()

    def expire(self, now: float | None = None) -> None:
        """Forget what nobody has touched for a week."""
        oldest = (time.time() if now is None else now) - KEEP_S
        for directory in list(self.root.glob("*/*/*")):
            with self._lock, guard(directory), suppress(FileNotFoundError):
                paths = list(directory.iterdir())
                young = {path.stem for path in paths if path.stat().st_mtime >= oldest}
                for path in paths:
                    if path.stem not in young:
                        path.unlink(missing_ok=True)
                if directory.stat().st_mtime < oldest or paths:
                    with suppress(OSError):  # not empty
                        directory.rmdir()

    def ensure(self) -> Path:
        """The directory, made if missing."""
        with guard(self.root):
            self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        return self.root

    def _directory(self, repo: RepoId) -> Path:
        return self.root / repo.kind / (repo.org or "_") / repo.name


class Partial:
    """A file that is being downloaded: any thread may write bytes of it, past Python's buffers."""

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size = path, size
        self._journal_path = path.with_suffix(".blocks")
        self._fd = self._journal = -1

    @property
    def allocated(self) -> int:
        """Bytes that it takes on the disk."""
        try:
            return self.path.stat().st_blocks * 512
        except FileNotFoundError:
            return 0

    def open(self) -> list[int]:
        """Open it, made if missing, and return the numbers of the blocks that are here."""
        with guard(self.path):
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self._journal = os.open(self._journal_path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            if os.fstat(self._fd).st_size != self.size:
                os.ftruncate(self._journal, 0)
                os.ftruncate(self._fd, self.size)
                return []
            data = self._journal_path.read_bytes()
            if len(data) % _NUMBER.size:  # cut short by a kill
                data = data[: -(len(data) % _NUMBER.size)]
                os.ftruncate(self._journal, len(data))
            return [number for (number,) in _NUMBER.iter_unpack(data)]

    def write(self, data: memoryview, offset: int) -> None:
        """Write all of it; raises NoSpace when the disk is full."""
        with guard(self.path):
            while data:
                count = os.pwrite(self._fd, data, offset)
                data, offset = data[count:], offset + count

    def done(self, numbers: Iterable[int]) -> None:
        """These blocks have been written."""
        data = b"".join(map(_NUMBER.pack, numbers))
        if data:
            with guard(self.path):
                os.write(self._journal, data)

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Read bytes that were written; returns how many."""
        with guard(self.path):
            return os.preadv(self._fd, [buffer], offset)

    def duplicate(self) -> int:
        """A descriptor of one's own to read from, which stays good when the file is removed."""
        with guard(self.path):
            return os.dup(self._fd)

    def close(self) -> None:
        """Nobody writes or reads any more here; what was written stays."""
        for fd in (self._fd, self._journal):
            if fd >= 0:
                os.close(fd)
        self._fd = self._journal = -1

    def remove(self) -> None:
        """Close and forget it."""
        self.close()
        self.unlink()

    def unlink(self) -> None:
        """Forget it; whoever has it open may still read."""
        with guard(self.path):
            self._journal_path.unlink(missing_ok=True)
            self.path.unlink(missing_ok=True)


@contextmanager
def guard(path: Path) -> Iterator[None]:
    """Turn what the system says about the spool's files into errors a person can act on."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno in FULL:
            raise NoSpace(
                f"no space left for downloads in {path.parent}",
                hint="Free some, then try again: it goes on from here.",
            ) from None
        raise Unavailable(f"{path} can't be written: {error.strerror}") from None
