"""Object stores in the cloud: what holds for every service and every client library.

A ``Bucket`` is the thin part, one class a library (cloud.py over obstore, through_fsspec.py over fsspec); this module
gives it the promises of an ``ObjectStore``:

- *Immutable.* A small object is created only if there is none (a conditional write, where the service has it). A large
  one goes up in parts, which are invisible until the last call; whether there is one already is looked at first. Both
  name content, so that two writers of one key write the same bytes.
- *Verified.* Every object is read once after it was written and compared with the local file, byte by byte, before the
  write counts. So what is in the store is known to come out of it as it went in, whatever checksums the service takes.
- *Finished or nothing.* An upload that fails is given up by the library; ``tidy`` finds what a killed process left.

Files that are being written lie in a local staging directory, as they do in front of a directory store.
"""

from __future__ import annotations

import logging
import mmap
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, Protocol, TypeVar

from helios.errors import HeliosError, IntegrityError, InvalidInput, NotFound, Unavailable
from heliosfs.store.keys import check_key
from heliosfs.store.objects import Good, ObjectInfo
from heliosfs.store.staging import Staging

T = TypeVar("T")

log = logging.getLogger("helios.store")

SINGLE: Final = 16 << 20
"""Largest object that is written with one request, in bytes; it is held in memory meanwhile."""

PIECE: Final = 8 << 20
"""Most bytes of one read."""

READERS: Final = 4
"""Pieces of one object that are read at the same time when it is compared."""

ATTEMPTS: Final = 3
"""How often an object is written that comes back wrong, or whose write ended in an unclear way."""

PAUSE_S: Final = 0.2

PATIENCE_S: Final = 60.0
"""A write that failed after so many seconds is not tried again."""

MAX_EXPIRY_S: Final = 7 * 86400.0
"""Longest that an address can be signed for, in seconds: S3's and GCS' limit."""

INTERRUPTED_S: Final = 86400.0
"""An upload in parts that was begun so long ago, in seconds, is one whose writer was killed."""


class Bucket(Protocol):
    """A place in one service, through one library. Keys are relative to it. Raises what an ``ObjectStore`` raises."""

    name: str
    """For people: ``s3://bucket/prefix``."""

    def create(self, key: str, data: bytes) -> bool:
        """Write a small object unless there is one of this key; returns whether it was written."""

    def upload(self, key: str, path: Path, size: int) -> None:
        """Write a large object, in parts; nothing of it is visible before, and nothing left when it fails."""

    def size(self, key: str) -> int:
        """Raises NotFound."""

    def read(self, key: str, offset: int, count: int) -> memoryview:
        """Bytes from ``offset``: fewer, or none, where the object ends before."""

    def delete(self, key: str) -> None:
        """A missing one is no error."""

    def list(self, directory: str) -> Iterator[tuple[str, int]]:
        """Keys and sizes of what lies below a directory (``""`` or ``a/b/``), in any order."""

    def sign(self, keys: Sequence[str], expires_s: float) -> Sequence[str] | None:
        """Addresses for GET."""

    def abandon(self, older_than_s: float) -> int:
        """Give up uploads in parts that were begun so long ago; returns how many."""

    def check(self) -> None:
        """Raises Unavailable unless the bucket is there and answers."""

    def close(self) -> None: ...


class RemoteStore:
    """An ``ObjectStore`` in a bucket. ``read_back`` is whether what was written is read and compared."""

    def __init__(self, bucket: Bucket, staging: Path, *, read_back: bool = True) -> None:
        self._bucket, self._read_back = bucket, read_back
        try:
            self._staging = Staging(staging)
        except OSError as error:
            raise Unavailable(f"the staging directory {staging} can't be used: {error}") from error

    def close(self) -> None:
        self._staging.close()
        self._bucket.close()

    def __enter__(self) -> RemoteStore:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def describe(self) -> str:
        return self._bucket.name

    def staging(self) -> Path:
        return self._staging.directory()

    def put_file(self, key: str, path: Path) -> None:
        """Store a finished file under ``key`` and remove it."""
        check_key(key)
        try:
            size = path.stat().st_size
            if size <= SINGLE:
                self._put_small(key, path.read_bytes(), whole=False)
            else:
                self._put_large(key, path, size)
            path.unlink(missing_ok=True)
        except OSError as error:
            raise Unavailable(f"{path} can't be read: {error}") from error

    def put_bytes(self, key: str, data: bytes) -> None:
        check_key(key)
        self._put_small(key, data, whole=True)

    def info(self, key: str) -> ObjectInfo:
        return ObjectInfo(key, self._bucket.size(check_key(key)))

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        check_key(key)
        if not len(buffer):
            self._bucket.size(key)
        done = 0
        while done < len(buffer):
            wanted = min(PIECE, len(buffer) - done)
            data = self._bucket.read(key, offset + done, wanted)
            if not 0 < len(data) <= wanted:
                raise IntegrityError(
                    f"the object {key} in {self.describe()} ends at byte {offset + done}, "
                    f"but {len(buffer)} bytes from {offset} were asked for"
                )
            buffer[done : done + len(data)] = data
            done += len(data)

    def open_local(self, key: str) -> None:
        return None

    @property
    def local(self) -> None:
        return None

    def signed_urls(self, keys: Sequence[str], expires_s: float) -> Sequence[str] | None:
        for key in keys:
            check_key(key)
        return self._bucket.sign(keys, min(expires_s, MAX_EXPIRY_S)) if keys else ()

    def near(self, key: str) -> bool:
        return False

    def waits(self, key: str) -> bool:
        return False

    @property
    def lasting(self) -> RemoteStore:
        return self

    def heal(self, key: str, offset: int, length: int, good: Good) -> bool:
        """Whether a second look is better: then it was the way here."""
        buffer = memoryview(bytearray(length))
        try:
            self.read_into(key, offset, buffer)
        except (IntegrityError, NotFound):
            return False
        return good(buffer)

    def delete(self, key: str) -> None:
        check_key(key)
        self._bucket.delete(key)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        if prefix.startswith("/") or any(part in (".", "..") for part in prefix.split("/")) or "\0" in prefix:
            raise InvalidInput(f"{prefix!r} is not a prefix of object keys")
        last = ""
        for key, size in self._bucket.list(prefix[: prefix.rfind("/") + 1]):
            if key.startswith(prefix):
                if key <= last:
                    raise Unavailable(f"{self.describe()} lists {key} after {last}: it has no order of keys")
                last = key
                yield ObjectInfo(key, size)

    def check(self) -> None:
        self.staging()
        self._bucket.check()

    def problems(self) -> Sequence[str]:
        return ()

    def tidy(self) -> int:
        count = self._bucket.abandon(INTERRUPTED_S)
        if count:
            log.warning("gave up uploads of killed writers", extra={"store": self.describe(), "uploads": count})
        return count

    # Inside

    def _put_small(self, key: str, data: bytes, *, whole: bool) -> None:
        """``whole``: an object that is there already must have this content, not only this size."""
        for attempt in range(1, ATTEMPTS + 1):
            made = self._patiently(lambda: self._bucket.create(key, data))
            if self._size(key) == len(data) and (
                not (whole or self._read_back) or self._same(key, memoryview(data), readers=1)
            ):
                return
            self._wrong(key, made, attempt)

    def _put_large(self, key: str, path: Path, size: int) -> None:
        for attempt in range(1, ATTEMPTS + 1):
            made = self._size(key) is None
            if made:
                self._bucket.upload(key, path, size)
            if self._size(key) == size and (not self._read_back or self._same_file(key, path, size)):
                return
            self._wrong(key, made, attempt)

    def _wrong(self, key: str, made: bool, attempt: int) -> None:
        """What is there is not what was to be written: take ours away, so that it is written again."""
        if not made:
            raise IntegrityError(
                f"the object {key} is already in {self.describe()} with other content; one of the two is damaged",
                hint=f"if it is the stored one, remove {key} there and try again",
            )
        log.warning("an object came back other than it was written", extra={"object": key, "store": self.describe()})
        self._bucket.delete(key)
        if attempt == ATTEMPTS:
            raise IntegrityError(
                f"{self.describe()} gave other bytes than were written for {key}, {ATTEMPTS} times",
                hint="something on the way changes bytes: look at proxies, memory and the service",
            )

    def _size(self, key: str) -> int | None:
        try:
            return self._bucket.size(key)
        except NotFound:
            return None

    def _same_file(self, key: str, path: Path, size: int) -> bool:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with mmap.mmap(fd, size, prot=mmap.PROT_READ) as mapped, memoryview(mapped) as view:
                return self._same(key, view, readers=READERS)
        finally:
            os.close(fd)

    def _same(self, key: str, data: memoryview, *, readers: int) -> bool:
        """Whether the object has exactly these bytes, its size being right."""

        def equal(start: int) -> bool:
            stop = min(start + PIECE, len(data))
            buffer = memoryview(bytearray(stop - start))
            self.read_into(key, start, buffer)
            with data[start:stop] as wanted:
                return wanted == buffer

        starts = range(0, len(data), PIECE)
        try:
            if readers == 1 or len(starts) < 2:
                return all(map(equal, starts))
            with ThreadPoolExecutor(readers, thread_name_prefix="compare") as threads:
                return all(threads.map(equal, starts))
        except (IntegrityError, NotFound):
            return False

    def _patiently(self, write: Callable[[], T]) -> T:
        """Write once more where it is not clear whether that worked; a second time it may find its own object."""
        until = time.monotonic() + PATIENCE_S
        for attempt in range(1, ATTEMPTS):
            try:
                return write()
            except Unavailable:
                if time.monotonic() > until:
                    raise
                time.sleep(PAUSE_S * attempt)
        return write()


_QUERY = re.compile(r"(https?://[^\s?\"'<>]*)\?[^\s\"'<>]*")
_USER = re.compile(r"(https?://)[^\s/@\"'<>]*@")
_FIELD = re.compile(r"<(Code|Message)>(.*?)</\1>", re.DOTALL)


def told(error: BaseException) -> str:
    """A library's error in a line, without what could be a credential: no query of an address, no string to sign."""
    text = str(error).partition("\n\nDebug source")[0]
    first, azure, rest = text.partition("\nErrorCode:")
    if azure:  # the lines below repeat the service's answer
        text = f"{first.partition(chr(10))[0]} ({rest.partition(chr(10))[0]})"
    head, xml, body = text.partition("<?xml")
    if not xml:
        head, xml, body = text.partition("<Error>")
    if xml:
        head += ", ".join(value.strip().partition("\n")[0] for _, value in _FIELD.findall(body))
    head = _USER.sub(r"\1", _QUERY.sub(r"\1", head))
    return " ".join(head.split())[:400] or type(error).__name__


def refused(where: str, error: BaseException) -> HeliosError:
    """The service knows us not, or does not let us."""
    return Unavailable(
        f"{where} refuses: {told(error)}",
        hint="Look at the credentials that this process finds (environment, configuration files, instance role) and at "
        "what they are allowed; docs/registry-stores.md lists both.",
    )
