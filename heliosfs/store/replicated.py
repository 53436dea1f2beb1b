"""The directory engine, several times: every object in each of N directories, best on disks of their own.

A write is acknowledged when every directory that works has it; one that does not is written down as *behind* first
(members.py), and told of in the log. A read takes the first directory that has the object, those behind last. Bytes
that turn out to be wrong are compared in all directories (``heal``): copies that are wrong are read last.

Who has what and who is behind: copies.py; repair: mending.py. A disk that hangs, rather than fails, is not recognised.
"""

from __future__ import annotations

import heapq
import logging
import os
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, TypeVar

from helios.errors import HeliosError, IntegrityError, NotFound, Unavailable
from heliosfs.store.copies import Copies, Copy
from heliosfs.store.directory import DirectoryStore
from heliosfs.store.mending import Mender
from heliosfs.store.objects import Good, ObjectInfo
from heliosfs.store.patches import Patches

log = logging.getLogger("helios.store")

T = TypeVar("T")


class ReplicatedStore:
    """An ``ObjectStore`` in several directories. Threads share it; close it when done."""

    def __init__(self, roots: Sequence[Path]) -> None:
        """Raises what opening a directory raises when none of those that are whole can be opened."""
        self._copies = Copies(roots)
        self._lock = threading.Lock()
        """Held while an object is removed everywhere, or a repaired copy gets its name: neither slips by the other."""
        self._over = False
        self._patches = Patches()
        self._mender = Mender(self._copies, self._lock, self._patches)

    def close(self) -> None:
        self._over = True
        self._mender.close()
        self._copies.close()

    def __enter__(self) -> ReplicatedStore:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # --- what an ObjectStore does ---

    def describe(self) -> str:
        return self._copies.describe()

    def problems(self) -> Sequence[str]:
        return self._copies.problems()

    @property
    def local(self) -> Path:
        return next(
            (copy.root for copy in self._copies.all if copy.store and not copy.behind), self._copies.all[0].root
        )

    def staging(self) -> Path:
        """In the directory with the most room, of those that take anything now."""
        if self._over:
            raise Unavailable(f"{self.describe()}: the store is closed")
        for copy in sorted(self._copies.all, key=lambda copy: (copy.behind, -_room(copy.root))):
            if copy.store is not None and self._copies.takes(copy):
                return copy.store.staging()
        raise Unavailable(f"{self.describe()}: none takes anything now: {'; '.join(self.problems())}")

    def put_file(self, key: str, path: Path) -> None:
        """Store copies of a finished file, and remove it."""

        def put(store: DirectoryStore) -> None:
            if store.staging() != path.parent:
                store.put_file(key, path, keep=True)
                return
            twin = store.staging() / secrets.token_hex(8)  # the others still need the file
            os.link(path, twin)
            try:
                store.put_file(key, twin)
            finally:
                twin.unlink(missing_ok=True)

        try:
            self._everywhere(key, put)
            path.unlink(missing_ok=True)
        except OSError as error:
            raise Unavailable(f"{path} can't be stored: {error}") from error

    def put_bytes(self, key: str, data: bytes) -> None:
        self._everywhere(key, lambda store: store.put_bytes(key, data))

    def delete(self, key: str) -> None:
        with self._lock:
            self._everywhere(key, lambda store: store.delete(key))
            for copy in self._copies.all:
                copy.wrong.discard(key)
            self._patches.forget(key)

    def info(self, key: str) -> ObjectInfo:
        return self._first(key, lambda store: store.info(key))

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        known = self._patches.read(key, offset, len(buffer))  # where no copy is right as a whole
        if known is not None:
            buffer[:] = known
            return
        self._first(key, lambda store: store.read_into(key, offset, buffer))

    def open_local(self, key: str) -> BinaryIO | None:
        return self._first(key, lambda store: store.open_local(key))

    def signed_urls(self, keys: Sequence[str], expires_s: float) -> None:
        return None

    def near(self, key: str) -> bool:
        return True

    def waits(self, key: str) -> bool:
        return False

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        last = ""
        for info in heapq.merge(*(found for _, found in self._copies.listed(prefix)), key=lambda info: info.key):
            if info.key != last:
                last = info.key
                yield info

    @property
    def lasting(self) -> ReplicatedStore:
        return self

    def heal(self, key: str, offset: int, length: int, good: Good) -> bool:
        found, wrong, right = False, [], b""
        for copy in self._copies.whole_first():
            buffer = memoryview(bytearray(length))
            try:
                if copy.store is None:
                    continue
                copy.store.read_into(key, offset, buffer)
            except (IntegrityError, NotFound):
                wrong.append(copy)
            except Unavailable as problem:
                self._copies.failed(copy, problem)
            else:
                if good(buffer):
                    found = True
                    right = bytes(buffer)
                else:
                    wrong.append(copy)
        if found and wrong:
            self._patches.add(key, offset, right)
        for copy in wrong if found else ():
            copy.wrong.add(key)
            log.error("a copy is damaged; it is replaced", extra={"object": key, "directory": str(copy.root)})
        self._copies.wake.set()
        return found

    def check(self) -> None:
        self.staging().stat()

    def tidy(self) -> int:
        """What a directory lacks is repaired soon."""
        return self._copies.tidy()

    # --- writing and reading in several places ---

    def _everywhere(self, key: str, act: Callable[[DirectoryStore], None]) -> None:
        """Do it in each directory; one that fails is written down as behind before this returns.

        Raises the first failure where no directory that is whole could do it, or what all agree on.
        """
        failures: list[tuple[Copy, HeliosError]] = []
        done = False
        for copy in self._copies.whole_first():
            try:
                if copy.store is None:
                    raise Unavailable(f"{copy.root} can't be used: {copy.why}")
                act(copy.store)
                done = done or not copy.behind
            except IntegrityError as error:
                if not done and not copy.behind:
                    raise
                copy.wrong.add(key)
                failures.append((copy, error))
            except HeliosError as error:
                failures.append((copy, error))
        if not done:
            raise next((problem for copy, problem in failures if not copy.behind), failures[0][1])
        for copy, problem in failures:
            self._copies.lags(copy, problem)

    def _first(self, key: str, act: Callable[[DirectoryStore], T]) -> T:
        missing: list[Copy] = []
        damaged: IntegrityError | None = None
        absent: NotFound | None = None  # what a directory says that is whole, and should have it
        # A copy that is partly damaged is still better than none: whoever reads checks what it gets.
        for copy in sorted(self._copies.whole_first(), key=lambda copy: key in copy.wrong):
            if copy.store is None:
                continue
            if copy.behind and absent is not None:
                break  # it may still have what was removed
            try:
                found = act(copy.store)
            except NotFound as error:
                missing.append(copy)
                if not copy.behind and key not in copy.wrong:
                    absent = error
            except IntegrityError as error:
                copy.wrong.add(key)
                damaged = error
            except Unavailable as error:
                self._copies.failed(copy, error)
            else:
                for other in missing:
                    other.wrong.add(key)
                if missing:
                    self._copies.wake.set()
                return found
        failure = damaged or absent
        if failure is not None:
            raise failure
        raise Unavailable(f"no copy of the object {key} is in a directory of {self.describe()} that works now")


def _room(root: Path) -> int:
    try:
        space = os.statvfs(root)
    except OSError:
        return -1
    return space.f_bavail * space.f_frsize
