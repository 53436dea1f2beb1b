"""What an unfinished pull keeps on disk, across restarts.

    ROOT/models/org/name/held                 sha256 of each blob already stored for the pull, one a line
    ROOT/models/org/name/<content>.partial    the first bytes of a file; ``<content>`` is its sha256 or git oid

One-segment repositories lie under ``_``.

Partial files are named by their content, so a branch that moves meanwhile costs only the files that changed. Blobs in
``held`` are pending in the store and must survive its cleaning: see ``held``. A repository's directory goes when one of
its pulls succeeds, or when nothing has touched it for a week.
"""

from __future__ import annotations

import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from helios.errors import NoSpace, Unavailable
from helios.names import RepoId
from heliosfs.store.directory import FULL
from registry.pull.listing import RemoteFile

KEEP_S: Final = 7 * 86400.0
"""An unfinished pull that nobody resumes is forgotten after a week."""

_SHA256 = re.compile(r"[0-9a-f]{64}\Z")


class Spool:
    """The directory of all unfinished pulls. Threads may share one; a store has one."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock = threading.Lock()

    def open(self, repo: RepoId) -> RepoSpool:
        """The repository's directory, made if missing."""
        directory = self._directory(repo)
        with guard(directory):
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        return RepoSpool(directory)

    def held(self) -> set[str]:
        """Every blob that an unfinished pull has stored and would have to download again."""
        out: set[str] = set()
        for file in self.root.glob("*/*/*/held"):
            out |= _read_held(file)
        return out

    def remove(self, repo: RepoId) -> set[str]:
        """Forget a repository's unfinished pulls; returns the blobs that are not kept any more."""
        return self._remove(self._directory(repo))

    def expire(self, now: float | None = None) -> set[str]:
        """Forget what nobody has touched for a week; returns the blobs that are not kept any more."""
        gone: set[str] = set()
        oldest = (time.time() if now is None else now) - KEEP_S
        for directory in list(self.root.glob("*/*/*")):
            if max(path.stat().st_mtime for path in (directory, *directory.iterdir())) < oldest:
                gone |= self._remove(directory)
        return gone

    def _directory(self, repo: RepoId) -> Path:
        return self.root / repo.kind / (repo.org or "_") / repo.name

    def _remove(self, directory: Path) -> set[str]:
        with self._lock, guard(directory):
            held = _read_held(directory / "held")
            if directory.exists():
                shutil.rmtree(directory)
            return held

    def ensure(self) -> Path:
        """The directory, made if missing."""
        with guard(self.root):
            self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        return self.root


class RepoSpool:
    """One repository's unfinished pulls."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._lock = threading.Lock()

    def partial(self, file: RemoteFile) -> Partial:
        """The file's partial download."""
        return Partial(self.directory / f"{file.key}.partial")

    def hold(self, sha256: str) -> None:
        """Note that the blob is stored. Not fsynced: after a power cut it is downloaded again."""
        with self._lock, guard(self.directory), (self.directory / "held").open("a") as file:
            file.write(f"{sha256}\n")


class Partial:
    """A file that is being downloaded; single writer."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def size(self) -> int:
        """Bytes here already."""
        try:
            return self.path.stat().st_size
        except FileNotFoundError:
            return 0

    @contextmanager
    def append(self) -> Iterator[Appender]:
        """Open it to write at its end."""
        with guard(self.path):
            fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            yield Appender(fd, self.path)
        finally:
            os.close(fd)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


class Appender:
    """Writes at the end of a partial download, past Python's buffers: what was written survives a SIGKILL."""

    def __init__(self, fd: int, path: Path) -> None:
        self._fd, self._path = fd, path
        self.size = os.lseek(fd, 0, os.SEEK_END)
        """Bytes in the file."""

    def write(self, data: bytes) -> None:
        """Append all of it; raises NoSpace when the disk is full."""
        view = memoryview(data)
        with guard(self._path):
            while view:
                count = os.write(self._fd, view)
                self.size += count
                view = view[count:]

    def restart(self) -> None:
        """Throw away what is here."""
        with guard(self._path):
            os.ftruncate(self._fd, 0)
            self.size = os.lseek(self._fd, 0, os.SEEK_SET)


@contextmanager
def guard(path: Path) -> Iterator[None]:
    """Turn what the system says about the spool's files into errors a person can act on."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise NoSpace(
                f"no space left for downloads in {path.parent}",
                hint="Free some, then pull again: it goes on from here.",
            ) from None
        raise Unavailable(f"{path} can't be written: {error.strerror}") from None


def _read_held(file: Path) -> set[str]:
    try:
        lines = file.read_text().splitlines()
    except FileNotFoundError:
        return set()
    return {line for line in lines if _SHA256.match(line)}
