"""What a home keeps of compiled kernels for itself: directories in which engines compile, names of models, what failed.

Below ``$HELIOS_HOME/vllm/compiled``: ``made/<key>`` while there is no artifact of a key, ``models/`` with the names by
which engines are told of models, ``bad/<key>`` with the commit of an artifact with which an engine did not start. Each
is bounded: versions, devices and arguments come and go. A kill at any instant leaves a name that ``sweep`` knows, or
nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from helios.home import hash_text
from helios.lockfile import LockFile

KEPT: Final = 8
"""Directories, and marks of what failed, that a home keeps; those unused for the longest time go."""
STALE_S: Final = 60.0
"""A name that is being made lives for moments; older ones were left by a process that was killed."""
TOO_OFTEN: Final = 2
"""So many starts in a row that fail with the same kernels are put down to them."""
HERE: Final = "here"
"""What a home's earlier engines have compiled, where an artifact is named by its commit."""
_GOING: Final = ".going-"


class Made:
    """What engines compile while there is no artifact: it stays, and is found here where nothing can be published."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path, self._lock = path, lock

    @classmethod
    def use(cls, path: Path) -> Made:
        """The directory, made if it is not there, until ``close``; several engines share it. Raises OSError."""
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = _locked(path, fcntl.LOCK_SH)  # who drops it holds it for a rename
        try:
            path.mkdir(exist_ok=True, mode=0o700)
            os.utime(path)  # used now
        except BaseException:
            os.close(lock)
            raise
        return cls(path, lock)

    @staticmethod
    def drop(path: Path) -> None:
        """Remove the directory, unless an engine uses it; an artifact has taken its place. Raises OSError.

        It goes as a whole: an engine that finds half of what another one has compiled may not survive that.
        """
        if not path.exists():
            return
        going = path.with_name(f"{_GOING}{secrets.token_hex(8)}")
        try:
            lock = _locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        try:
            path.rename(going)
        except FileNotFoundError:  # dropped meanwhile
            return
        finally:
            _lock_of(path).unlink(missing_ok=True)
            os.close(lock)
        shutil.rmtree(going)

    def close(self) -> None:
        os.close(self._lock)


def _lock_of(path: Path) -> Path:
    return path.with_suffix(".lock")


def _locked(path: Path, how: int) -> int:
    """A descriptor that holds a directory's lock; who drops the directory removes the lock's file while he holds it."""
    while True:
        lock = os.open(_lock_of(path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, how)
            if os.path.samestat(os.fstat(lock), os.stat(_lock_of(path))):
                return lock
        except FileNotFoundError:
            pass  # it was dropped between our open and our lock
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


def sweep(base: Path) -> None:
    """Remove what is of no more use, and what processes that were killed have left. Raises OSError."""
    made = base / "made"
    for going in made.glob(f"{_GOING}*"):
        shutil.rmtree(going, ignore_errors=True)  # somebody else may be at it
    for path in _oldest(path for path in made.glob("*") if path.suffix != ".lock"):
        Made.drop(path)
    for path in _oldest((base / "bad").glob("*")):
        path.unlink(missing_ok=True)
    staging = base / "staging"
    if staging.is_dir() and (turn := LockFile.acquire(staging / "publish.lock")) is not None:
        try:
            shutil.rmtree(staging / "files", ignore_errors=True)
        finally:
            turn.release()


def _oldest(paths: Iterable[Path]) -> list[Path]:
    """Those beyond KEPT that were changed the longest time ago."""
    aged = []
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            aged.append((path.stat().st_mtime, path))
    return [path for _, path in sorted(aged)[:-KEPT]]


class Bad:
    """With which kernels engines did not start: for each key an artifact's commit, or HERE, and how often in a row.

    Once may be anybody's fault, too little memory mostly. Two starts at a time may count one failure for another's.
    """

    def __init__(self, base: Path) -> None:
        self._base = base / "bad"

    def add(self, key: str, what: str) -> None:
        """An engine that had ``what`` has ended before it was up. Raises OSError."""
        self._base.mkdir(parents=True, exist_ok=True, mode=0o700)
        fresh = self._base / f".{key}-{secrets.token_hex(4)}"
        fresh.write_text(f"{what} {self._count(key, what) + 1}")
        fresh.replace(self._base / key)

    def forget(self, key: str, what: str) -> None:
        """One that had ``what`` is up. Raises OSError."""
        if self._count(key, what):
            (self._base / key).unlink(missing_ok=True)

    def __contains__(self, artifact: tuple[str, str]) -> bool:
        return self._count(*artifact) >= TOO_OFTEN

    def _count(self, key: str, what: str) -> int:
        try:
            of, _, count = (self._base / key).read_text(errors="replace").partition(" ")
        except FileNotFoundError:
            return 0
        return int(count) if of == what and count.isdecimal() else 0


def placed(base: Path, path: Path, manifest: str) -> tuple[Path, str]:
    """A directory, and from there a name of the model's directory ``path`` that is the same on every node.

    vLLM hashes how it was told of the model with what it compiles, so the place of the mount must not be in it. Raises
    OSError.
    """
    directory, name = base / f"{hash_text(str(path)):016x}", f"model-{manifest[:16]}"
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    for left in directory.glob(".*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - left.lstat().st_mtime > STALE_S:
                left.unlink()
    fresh = directory / f".{secrets.token_hex(8)}"
    fresh.symlink_to(path)
    fresh.replace(directory / name)
    return directory, name
