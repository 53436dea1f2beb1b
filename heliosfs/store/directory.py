"""The directory engine: objects as plain read-only files under one root.

    ROOT/.format                     "helios-store 1\\n"
    ROOT/.staging/                   files that are being written (staging.py)
    ROOT/<key>                       the objects, mode 0444

An object is written to the owner's staging directory, fsynced, hard-linked to its name, and the directory that holds
the name is fsynced: it is there whole and durable, or not at all. Several processes may use one root at a time.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final

from helios.errors import HeliosError, IntegrityError, InvalidInput, NoSpace, NotFound, Unavailable
from heliosfs.store.keys import check_key
from heliosfs.store.objects import Good, ObjectInfo
from heliosfs.store.staging import Staging
from heliosfs.store.syscalls import sync_directory

FORMAT: Final = b"helios-store 1\n"
FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class DirectoryStore:
    """An ``ObjectStore`` in a directory of the local machine, which is made if missing. Close it when done."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        with self._guard("opened"):
            self.root.mkdir(parents=True, exist_ok=True)
            self._check_format()
            self._staging = Staging(self.root / ".staging")

    def close(self) -> None:
        """Remove the staging directory and whatever is in it. The store must not be used any more."""
        self._staging.close()

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
        return self._staging.directory()

    def put_file(self, key: str, path: Path, *, keep: bool = False) -> None:
        """Store a finished file under ``key`` and take it away from ``path``; with ``keep`` a copy of it.

        An object that is already there stays as it is; one of another size raises IntegrityError.
        """
        target = self._path(key)
        with self._guard(f"written ({key})"):
            local = path
            if keep or path.stat().st_dev != self.root.stat().st_dev:
                local = self._staging.file()
            try:
                if local is not path:
                    shutil.copyfile(path, local)
                size = _seal(local)
                if not self._link(local, target) and target.stat().st_size != size:
                    raise self._differs(key)
            finally:
                if local is not path:
                    local.unlink(missing_ok=True)
            if not keep:
                path.unlink(missing_ok=True)

    def replace(self, key: str, path: Path) -> None:
        """Put a finished file of this store's staging in the place of a damaged object, or of none."""
        target = self._path(key)
        with self._guard(f"written ({key})"):
            _seal(path)
            self._make_parents(target.parent)
            path.replace(target)
            sync_directory(target.parent)

    def put_bytes(self, key: str, data: bytes) -> None:
        """Store a small object; one that is already there with other content raises IntegrityError."""
        target = self._path(key)
        with self._guard(f"written ({key})"):
            if not target.exists():
                temporary = self._staging.file()
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

    def signed_urls(self, keys: Sequence[str], expires_s: float) -> None:
        return None

    def near(self, key: str) -> bool:
        return True

    def waits(self, key: str) -> bool:
        return False

    @property
    def local(self) -> Path:
        return self.root

    @property
    def lasting(self) -> DirectoryStore:
        return self

    def heal(self, key: str, offset: int, length: int, good: Good) -> bool:
        return False

    def check(self) -> None:
        with self._guard("read"):
            self.staging().stat()

    def problems(self) -> Sequence[str]:
        return ()

    def tidy(self) -> int:
        return 0

    def delete(self, key: str) -> None:
        path = self._path(key)
        with self._guard(f"changed (removing {key})", key):
            try:
                path.unlink()
            except FileNotFoundError:
                self._there()

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        if prefix.startswith("/") or any(part in (".", "..") for part in prefix.split("/")) or "\0" in prefix:
            raise InvalidInput(f"{prefix!r} is not a prefix of object keys")
        with self._guard("listed"):
            yield from self._walk(self.root, "", prefix)

    # Inside

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    def _there(self) -> None:
        """What is missing is missing only while the store itself is there, and not on a disk that was taken away."""
        if not (self.root / ".format").exists():
            raise Unavailable(f"the object store in {self.root} is gone: is its disk mounted?")

    def _check_format(self) -> None:
        marker = self.root / ".format"
        try:
            found = marker.read_bytes()
        except FileNotFoundError:
            temporary = self.root / f".format.{secrets.token_hex(4)}"
            temporary.write_bytes(FORMAT)
            _seal(temporary)
            temporary.rename(marker)
            sync_directory(self.root)
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
                self._there()
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


def _seal(path: Path) -> int:
    """Make a finished file read-only and durable; returns its size."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fchmod(fd, 0o444)
        os.fsync(fd)
        return os.fstat(fd).st_size
    finally:
        os.close(fd)
