"""The store under files and batches: small objects with a tag, in a directory or in the cloud (``cloud``).

All calls block; ``shelf`` makes them in threads. ``put`` is for keys that nobody else writes, ``replace`` for those
that several do: it writes only if the object is still the one with that tag.

In a directory an object is a file that is renamed into place; its tag is its content's hash, and ``replace`` compares
and renames under a lock (flock) that all processes take, on several machines as well where the filesystem has such
locks. Both are on the disk when they return.
"""

from __future__ import annotations

import errno
import fcntl
import importlib.util
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Final, NamedTuple, Protocol

from helios.config import BatchSettings
from helios.errors import NoSpace, NotFound, Unavailable, UsageError

EXTRAS: Final = {"s3": "s3", "gs": "gcs", "az": "azure"}
"""Schemes of cloud stores, and the extra that each needs."""
_ADDRESS = re.compile(r"(s3|gs|az)://([a-z0-9][a-z0-9._-]{1,221}[a-z0-9])((?:/[A-Za-z0-9_][A-Za-z0-9._-]*)*)/?\Z")
_NO_SPACE: Final = (errno.ENOSPC, errno.EDQUOT)


class Tag(NamedTuple):
    """Which version of an object it is, in the words of its store."""

    etag: str | None
    version: str | None = None


class Stored(NamedTuple):
    """An object, as it was when it was read."""

    data: bytes
    tag: Tag


class Objects(Protocol):
    """One store. Keys are relative, with slashes. All calls raise Unavailable, and NoSpace where they write."""

    name: str
    """For people."""

    def get(self, key: str) -> Stored:
        """Raises NotFound."""
        ...

    def put(self, key: str, data: bytes) -> None:
        """Write an object, whatever is there."""
        ...

    def replace(self, key: str, data: bytes, tag: Tag) -> Tag | None:
        """Write an object where the one with this tag is; its new tag, None where it is gone or another."""
        ...

    def delete(self, key: str) -> None:
        """One that is missing is no error."""
        ...

    def list(self, directory: str) -> list[str]:
        """The keys below a directory (``a/b``), sorted."""
        ...


class DirectoryObjects:
    """A store in a directory, which is made."""

    def __init__(self, root: Path) -> None:
        """Raises UsageError for a directory that can't be used."""
        self.name, self._root = str(root), root
        try:
            root.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.close(os.open(root / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        except OSError as error:
            raise UsageError(f"router.batches.store: {root} can't be used: {error.strerror}") from None

    def get(self, key: str) -> Stored:
        with self._guard(key):
            data = self._path(key).read_bytes()
        return Stored(data, _tag(data))

    def put(self, key: str, data: bytes) -> None:
        with self._guard(key):
            self._write(self._path(key), data)

    def replace(self, key: str, data: bytes, tag: Tag) -> Tag | None:
        path = self._path(key)
        with self._guard(key), open(self._root / ".lock", "rb+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # held for a read and a rename
            try:
                if _tag(path.read_bytes()) != tag:
                    return None
            except FileNotFoundError:
                return None
            self._write(path, data)
        return _tag(data)

    def delete(self, key: str) -> None:
        with self._guard(key):
            self._path(key).unlink(missing_ok=True)

    def list(self, directory: str) -> list[str]:
        found = []
        for top, _, names in os.walk(self._root / directory):
            below = Path(top).relative_to(self._root).as_posix()
            found += [f"{below}/{name}" for name in names if not name.startswith(".")]
        return sorted(found)

    def _path(self, key: str) -> Path:
        return self._root / key

    def _write(self, path: Path, data: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{secrets.token_hex(8)}")
        try:
            with open(draft, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, path)
            directory = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise

    @contextmanager
    def _guard(self, key: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise NotFound(f"there is no {key} in {self._root}") from None
        except OSError as error:
            kind = NoSpace if error.errno in _NO_SPACE else Unavailable
            raise kind(f"{self._root} can't be used: {error.strerror}") from None


def _tag(data: bytes) -> Tag:
    return Tag(blake2b(data, digest_size=16).hexdigest())


def open_objects(settings: BatchSettings) -> Objects:
    """The store that the settings name. Raises UsageError for one that can't be."""
    address = settings.store
    if "://" not in address:
        return DirectoryObjects(Path(address))
    scheme, bucket, prefix = _parsed(address)
    from router.batches.cloud import CloudObjects

    return CloudObjects(scheme, bucket, prefix.strip("/"), settings.store_options)


def check_store(settings: BatchSettings) -> None:
    """Raises UsageError for a store that can't be, without beginning to use it."""
    if "://" not in settings.store:
        DirectoryObjects(Path(settings.store))
        return
    scheme, _, _ = _parsed(settings.store)
    if importlib.util.find_spec("obstore") is None:
        raise UsageError(
            f"router.batches.store: {scheme}:// needs obstore, which is not installed",
            hint=f"pip install 'helios-llm[{EXTRAS[scheme]}]'",
        )


def _parsed(address: str) -> tuple[str, str, str]:
    found = _ADDRESS.match(address)
    if found is None:
        raise UsageError(
            f"router.batches.store: {address[:200]!r} is no directory and no address of a store",
            hint="Write s3://bucket/prefix, gs://bucket/prefix or az://container/prefix.",
        )
    scheme, bucket, prefix = found.groups()
    return scheme, bucket, prefix
