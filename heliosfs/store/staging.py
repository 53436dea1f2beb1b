"""Staging: local directories for files that are being written, one a process, which go when the process does.

    AREA/.lock             held (flock) while a staging directory is made or dead ones are removed
    AREA/<random>/.lock    held as long as the process that owns the directory lives

What a killed process left is removed when the next one opens the area: its lock is free then, whatever its pid.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from helios.errors import Unavailable

LOCK_DEADLINE_S: Final = 30.0
"""Longest wait for another process that is opening the area, in seconds."""


class Staging:
    """This process' directory in an area, which is made if missing. Raises OSError; close it when done."""

    def __init__(self, area: Path) -> None:
        self._lock: int | None = None
        area.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _flock(area / ".lock"):
            _remove_dead(area)
            self._directory = area / secrets.token_hex(8)
            self._directory.mkdir(mode=0o700)
            self._lock = os.open(self._directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def directory(self) -> Path:
        """Where to write. Raises Unavailable once it is closed."""
        if self._lock is None:
            raise Unavailable(f"{self._directory.parent} is not used any more: the object store is closed")
        return self._directory

    def file(self) -> Path:
        """A name for a new file."""
        return self.directory() / secrets.token_hex(8)

    def close(self) -> None:
        """Remove the directory and whatever is in it."""
        if self._lock is not None:
            lock, self._lock = self._lock, None
            try:
                _remove(self._directory)
            finally:
                os.close(lock)


@contextlib.contextmanager
def _flock(path: Path) -> Iterator[None]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + LOCK_DEADLINE_S
        while not _try_lock(fd):
            if time.monotonic() > deadline:
                raise Unavailable(f"another process has held {path} for {LOCK_DEADLINE_S:g} s; find it with lsof")
            time.sleep(0.02)
        yield
    finally:
        os.close(fd)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove_dead(area: Path) -> None:
    """Remove the staging directories of processes that are gone; needs the area's lock."""
    for directory in area.iterdir():
        if directory.name == ".lock":
            continue
        try:
            fd = os.open(directory / ".lock", os.O_RDWR | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            # Made under the area's lock, which we hold: its maker died in between.
            _remove(directory)
            continue
        try:
            if _try_lock(fd):
                _remove(directory)
        finally:
            os.close(fd)


def _remove(path: Path) -> None:
    """Remove a staging directory, or a stray file; somebody else may be doing the same."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    for entry in path.iterdir():
        _remove(entry)
    with contextlib.suppress(FileNotFoundError):
        path.rmdir()
