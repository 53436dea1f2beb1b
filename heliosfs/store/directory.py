"""The directory engine: objects as plain read-only files under one root.

    ROOT/.format                     "helios-store 1\\n"
    ROOT/.staging/.lock              held (flock) while a staging directory is made or dead ones are removed
    ROOT/.staging/<random>/.lock     held as long as the process that owns the directory lives
    ROOT/<key>                       the objects, mode 0444

An object is written to the owner's staging directory, fsynced, hard-linked to its name, and the directory that holds
the name is fsynced: it is there whole and durable, or not at all. Several processes may use one root at a time. What a
killed process left in staging is removed when the next one opens the store: its lock is free then, whatever its pid.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final

from helios.errors import HeliosError, IntegrityError, InvalidInput, NoSpace, NotFound, Unavailable
from heliosfs.store.keys import check_key
from heliosfs.store.objects import ObjectInfo
from heliosfs.store.syscalls import sync_directory

FORMAT: Final = b"helios-store 1\n"
LOCK_DEADLINE_S: Final = 30.0
"""Longest wait for another process that is opening the store, in seconds."""

FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class DirectoryStore:
    """An ``ObjectStore`` in a directory of the local machine, which is made if missing. Close it when done."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self._staging_lock: int | None = None
        with self._guard("opened"):
            self.root.mkdir(parents=True, exist_ok=True)
            self._check_format()
            area = self.root / ".staging"
            area.mkdir(mode=0o700, exist_ok=True)
            with _flock(area / ".lock"):
                _remove_dead(area)
                self._staging = area / secrets.token_hex(8)
                self._staging.mkdir(mode=0o700)
                self._staging_lock = os.open(self._staging / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                fcntl.flock(self._staging_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def close(self) -> None:
        """Remove the staging directory and whatever is in it. The store must not be used any more."""
        if self._staging_lock is not None:
            lock, self._staging_lock = self._staging_lock, None
            try:
                _remove(self._staging)
            finally:
                os.close(lock)

    def __enter__(self) -> DirectoryStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def describe(self) -> str:
        return f"directory {self.root}"

    def staging(self) -> Path:
        """This process' private directory on the store's filesystem; it goes when the process does."""
        if self._staging_lock is None:
            raise Unavailable(f"the object store in {self.root} is closed")
        return self._staging

    def put_file(self, key: str, path: Path) -> None:
        """Store a finished file under ``key`` and take it away from ``path``.

        An object that is already there stays as it is; one of another size raises IntegrityError.
        """
        target = self._path(key)
        with self._guard(f"written ({key})"):
            local = path
            if path.stat().st_dev != self.root.stat().st_dev:
                local = self.staging() / secrets.token_hex(8)
            try:
                if local is not path:
                    shutil.copyfile(path, local)
                size = _seal(local)
                if not self._link(local, target) and target.stat().st_size != size:
                    raise self._differs(key)
            finally:
                if local is not path:
                    local.unlink(missing_ok=True)
            path.unlink(missing_ok=True)

    def put_bytes(self, key: str, data: bytes) -> None:
        """Store a small object; one that is already there with other content raises IntegrityError."""
        target = self._path(key)
        with self._guard(f"written ({key})"):
            if not target.exists():
                temporary = self.staging() / secrets.token_hex(8)
                try:
                    temporary.write_bytes(data)
                    _seal(temporary)
                    if self._link(temporary, target):
                        return
                finally:
                    temporary.unlink(missing_ok=True)
            if target.stat().st_size != len(data) or target.read_bytes() != data:
                raise self._differs(key)

    def info(self, key: str) -> ObjectInfo:
        path = self._path(key)
        with self._guard(f"read ({key})", key):
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                raise NotFound(f"the object {key} is not in {self.describe()}")
            return ObjectInfo(key, status.st_size)

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        path = self._path(key)
        with self._guard(f"read ({key})", key):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                done = 0
                while done < len(buffer):
                    count = os.preadv(fd, [buffer[done:]], offset + done)
                    if count == 0:
                        raise IntegrityError(
                            f"the object {key} in {self.describe()} ends at byte {offset + done}, "
                            f"but {len(buffer)} bytes from {offset} were asked for"
                        )
                    done += count
            finally:
                os.close(fd)

    def open_local(self, key: str) -> BinaryIO | None:
        path = self._path(key)
        with self._guard(f"read ({key})", key):
            return open(path, "rb", buffering=0)

    def delete(self, key: str) -> None:
        with self._guard(f"changed (removing {key})"):
            self._path(key).unlink(missing_ok=True)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        if prefix.startswith("/") or any(part in (".", "..") for part in prefix.split("/")) or "\0" in prefix:
            raise InvalidInput(f"{prefix!r} is not a prefix of object keys")
        with self._guard("listed"):
            yield from self._walk(self.root, "", prefix)

    # Inside

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    def _check_format(self) -> None:
        marker = self.root / ".format"
        try:
            found = marker.read_bytes()
        except FileNotFoundError:
            temporary = self.root / f".format.{secrets.token_hex(4)}"
            temporary.write_bytes(FORMAT)
            temporary.rename(marker)
            found = FORMAT
        if found != FORMAT:
            raise IntegrityError(
                f"{self.root} is not an object store that this Helios knows: {marker} says {found[:40]!r}",
                hint="upgrade Helios, or choose another directory",
            )

    def _link(self, path: Path, target: Path) -> bool:
        """Give the sealed file its name, durably; False when the name is taken."""
        self._make_parents(target.parent)
        try:
            os.link(path, target)
        except FileExistsError:
            # Whoever linked it may not have got to its fsync yet, and our caller relies on the object from here on.
            sync_directory(target.parent)
            return False
        sync_directory(target.parent)
        return True

    def _make_parents(self, directory: Path) -> None:
        missing = []
        while not directory.is_dir():
            missing.append(directory)
            directory = directory.parent
        for path in reversed(missing):
            path.mkdir(exist_ok=True)
            sync_directory(path.parent)

    def _walk(self, directory: Path, base: str, prefix: str) -> Iterator[ObjectInfo]:
        with os.scandir(directory) as entries:
            # A directory sorts as its name with the slash that follows it in the keys below it.
            found = sorted(
                (entry.name + "/" if entry.is_dir(follow_symlinks=False) else entry.name, entry)
                for entry in entries
                if not entry.name.startswith(".")
            )
        for name, entry in found:
            key = base + name
            if name.endswith("/"):
                if key.startswith(prefix) or prefix.startswith(key):
                    yield from self._walk(directory / entry.name, key, prefix)
            elif key.startswith(prefix):
                try:
                    yield ObjectInfo(key, entry.stat(follow_symlinks=False).st_size)
                except FileNotFoundError:
                    continue  # deleted while we listed

    def _differs(self, key: str) -> IntegrityError:
        return IntegrityError(
            f"the object {key} is already in {self.describe()} with other content; one of the two is damaged",
            hint=f"if it is the stored one, remove {self.root / key} and try again",
        )

    @contextlib.contextmanager
    def _guard(self, what: str, key: str | None = None) -> Iterator[None]:
        """Turn the system's errors into ours; with ``key`` a missing file is a missing object."""
        try:
            yield
        except HeliosError:
            raise
        except OSError as error:
            if error.errno in FULL:
                raise full(self.root, error) from error
            if key is not None and error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
                raise NotFound(f"the object {key} is not in {self.describe()}") from None
            raise Unavailable(f"the object store in {self.root} can't be {what}: {error}") from error


def full(directory: Path, error: OSError) -> NoSpace:
    """The error for a write under ``directory`` that found no room."""
    try:
        space = os.statvfs(directory)
        left = f"{space.f_bavail * space.f_frsize:,} bytes are free"
    except OSError:
        left = "how much is free can't be told"
    return NoSpace(
        f"no room in {directory}: {error.strerror} ({left})",
        hint="free some space there, raise the quota, or put the store on a larger disk (registry.store)",
    )


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


def _seal(path: Path) -> int:
    """Make a finished file read-only and durable; returns its size."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fchmod(fd, 0o444)
        os.fsync(fd)
        return os.fstat(fd).st_size
    finally:
        os.close(fd)
