"""The file of a partial blob's journal; its format is bitmap.py's. The order of the steps is what a crash relies on.

Calls block and raise OSError; those that change the journal are not made at the same time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Final

from heliosfs.store.recipe import Recipe
from heliosfs.tiers import bitmap
from heliosfs.tiers.places import unlink

NEW: Final = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW


class JournalFile:
    """An open journal of ``end`` valid bytes, where the next entry goes. Owns its descriptor until ``close``."""

    def __init__(self, fd: int, end: int = 0, seed: int = 0) -> None:
        self._fd, self.end, self._seed = fd, end, seed

    @classmethod
    def create(cls, path: str, recipe: Recipe) -> JournalFile:
        """The journal of a blob of which nothing is here, in a new file."""
        head = bitmap.start(recipe)
        journal = bitmap.replay(head, recipe.blob, recipe.size)
        fd = os.open(path, NEW, 0o600)
        try:
            _write(fd, head)
        except OSError:
            os.close(fd)
            raise
        return cls(fd, journal.end, journal.seed)

    @classmethod
    def open(cls, path: str, blob: str) -> tuple[JournalFile, bitmap.Journal]:
        """An existing one, with what it says; ``cut`` takes off what is not valid.

        Raises IntegrityError when it contradicts itself, or is another blob's.
        """
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            journal = bitmap.replay(_all(fd), blob)
        except BaseException:
            os.close(fd)
            raise
        return cls(fd, journal.end, journal.seed), journal

    def cut(self) -> None:
        """Take off what follows the valid part."""
        os.ftruncate(self._fd, self.end)

    def write(self, chunks: Iterable[int]) -> int:
        """Add chunks, durably; returns the new ``end``, which is the caller's to set once their names are durable."""
        entries = bitmap.entries(self._seed, self.end, chunks)
        written = 0
        while written < len(entries):
            written += os.pwrite(self._fd, entries[written:], self.end + written)
        os.fdatasync(self._fd)
        return self.end + len(entries)

    def forget(self, path: str, blob: str, size: int, chunks: Iterable[int], sync_names: Callable[[], None]) -> None:
        """Take chunks out, durably: a new file takes the place of this one at ``path``."""
        journal = bitmap.replay(_all(self._fd), blob, size)
        for index in chunks:
            journal.have[index] = 0
        head = bitmap.start(journal.recipe)
        have = (index for index, flag in enumerate(journal.have) if flag)
        data = head + bitmap.entries(journal.seed, len(head), have)
        fd = os.open(f"{path}.new", NEW, 0o600)
        try:
            _write(fd, data)
            os.fsync(fd)
            os.rename(f"{path}.new", path)
        except OSError:
            os.close(fd)
            unlink(f"{path}.new")
            raise
        sync_names()
        os.dup2(fd, self._fd, inheritable=False)
        os.close(fd)
        self.end = len(data)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


def _all(fd: int) -> bytes:
    with os.fdopen(os.dup(fd), "rb") as file:
        file.seek(0)
        return file.read()


def _write(fd: int, data: bytes) -> None:
    written = 0
    while written < len(data):
        written += os.write(fd, data[written:])
