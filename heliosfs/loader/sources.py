"""Files that a model is read from, and the plainest of them: those of a directory."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Protocol

from helios.errors import Unavailable

PART: Final = 32 << 20
"""Bytes of one preadv(2)."""

WHOLE: Final = frozenset({"l1", "l2"})
"""What a mount says of files that it has whole on a disk (``user.helios.tier``)."""


class Source(Protocol):
    """An open file. Threads use it at the same time."""

    @property
    def path(self) -> str:
        """Its path in the folder."""

    @property
    def size(self) -> int: ...

    def fileno(self) -> int | None:
        """A descriptor that can be mapped, where the file is whole on this machine; valid until ``close``."""

    def awaited(self) -> int | None:
        """The same, after waiting for a file that will be whole shortly. Blocks."""

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill the view, which lies within the file. Raises HeliosError."""

    def close(self) -> None: ...


class Folder(Protocol):
    """A model's files; those in subfolders are none of its."""

    @property
    def name(self) -> str:
        """What it is called in errors."""

    @property
    def way(self) -> str:
        """How its files are read, in two words, for logs."""

    @property
    def files(self) -> Mapping[str, int]:
        """Sizes in bytes, by name."""

    def read(self, path: str) -> bytes:
        """A small file. Raises HeliosError."""

    def open(self, path: str) -> Source:
        """Raises HeliosError."""

    def fetch(self) -> None:
        """Make the files local, where they are not. Raises HeliosError."""


class DiskFile:
    """A file of a directory."""

    def __init__(self, path: Path, name: str, flags: int = 0) -> None:
        """``flags``: of open(2), besides those for reading."""
        self._path, self.path = path, name
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
        except OSError as error:
            raise Unavailable(f"{path} can't be opened: {error.strerror}") from error
        self.size = os.fstat(self._fd).st_size
        self._mapped = is_local(self._fd)

    def fileno(self) -> int | None:
        return self._fd if self._mapped else None

    def awaited(self) -> int | None:
        return self.fileno()

    def read_into(self, view: memoryview, offset: int) -> None:
        filled = 0
        try:
            while filled < len(view):
                count = os.preadv(self._fd, [view[filled : filled + PART]], offset + filled)
                if not count:
                    raise OSError(errno.EIO, "it has become shorter")
                filled += count
        except OSError as error:
            raise Unavailable(f"{self._path} can't be read: {error.strerror}") from error

    def close(self) -> None:
        os.close(self._fd)


class DiskFolder:
    """A directory."""

    way = "plain files"

    def __init__(self, directory: Path) -> None:
        self._directory, self.name = directory, str(directory)
        try:
            with os.scandir(directory) as entries:
                self.files = {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
        except OSError as error:
            raise Unavailable(f"{directory} can't be listed: {error.strerror}") from error

    def read(self, path: str) -> bytes:
        try:
            return (self._directory / path).read_bytes()
        except OSError as error:
            raise Unavailable(f"{self._directory / path} can't be read: {error.strerror}") from error

    def open(self, path: str) -> Source:
        return DiskFile(self._directory / path, path)

    def fetch(self) -> None:
        """Nothing: they are local, or the mount's to fetch."""


def is_local(fd: int) -> bool:
    """Whether mapping the file asks nothing of a daemon of ours, which is slower than reading it."""
    try:
        return os.getxattr(fd, "user.helios.tier").decode() in WHOLE
    except OSError:  # no mount of ours
        return True
