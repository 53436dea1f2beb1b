"""Brings objects to the front that are read often enough, whole and in the background.

Readers only leave a note of what they read from the cloud. One thread asks for the size of what it does not know, and
brings what was read one and a half times within about a day, if it is worth more than what would have to go for it
(popular.py). What came is compared with what its key says before it gets its name.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from helios.errors import HeliosError, IntegrityError, NotFound, Unavailable
from helios.metrics import RegistryMetrics
from heliosfs.store.directory import DirectoryStore
from heliosfs.store.front.near import Near
from heliosfs.store.front.popular import ENOUGH
from heliosfs.store.objects import ObjectStore
from heliosfs.store.selfcheck import check_content
from heliosfs.store.syscalls import reserve

log = logging.getLogger("helios.store")

PIECE: Final = 8 << 20
READERS: Final = 4
"""Pieces of one object that are fetched at a time, and their bytes: 32 MiB of memory."""

NOTES: Final = 4096
"""Most objects of which notes are kept that nobody has looked at."""

SIZES: Final = 65536
"""Most sizes of objects that are remembered."""

CLOSE_S: Final = 5.0


class Fills:
    """The thread that brings objects. Close it when done."""

    def __init__(self, near: Near, cloud: ObjectStore, metrics: RegistryMetrics) -> None:
        self._near, self._cloud, self._metrics = near, cloud, metrics
        self._wanted = threading.Condition()
        self._notes: dict[str, tuple[int, int]] = {}
        """Bytes read of an object, and how often all of it was read, since they were last looked at."""
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._over = False
        self._looking_at, self._was_removed = "", False
        self._thread = threading.Thread(target=self._run, name="fill", daemon=True)
        self._thread.start()

    def close(self) -> bool:
        """Stop; whether it has."""
        with self._wanted:
            self._over = True
            self._wanted.notify_all()
        self._thread.join(CLOSE_S)
        return not self._thread.is_alive()

    def read(self, key: str, count: int | None) -> None:
        """So many bytes of an object were read from the cloud (None: all of them, as far as is known)."""
        with self._wanted:
            known = self._notes.get(key)
            if known is None and len(self._notes) >= NOTES:
                return
            read, wholes = known or (0, 0)
            self._notes[key] = (read, wholes + 1) if count is None else (read + count, wholes)
            self._wanted.notify()

    def removed(self, key: str) -> None:
        """The object is being removed; the caller has its turn."""
        with self._wanted:
            self._notes.pop(key, None)
            self._sizes.pop(key, None)
            if key == self._looking_at:
                self._was_removed = True

    def _run(self) -> None:
        while True:
            with self._wanted:
                while not self._notes and not self._over:
                    self._wanted.wait()
                if self._over:
                    return
                key = next(iter(self._notes))
                read, wholes = self._notes.pop(key)
                self._looking_at, self._was_removed = key, False
            try:
                self._consider(key, read, wholes)
            except HeliosError as error:
                log.info("an object was not brought to the front", extra={"object": key, "reason": error.message})
            except Exception:
                log.exception("bringing an object to the front broke")

    def _consider(self, key: str, read: int, wholes: int) -> None:
        near = self._near
        if near.has(key) or near.item(key) is not None or near.writable() is None:
            return
        size = self._sizes.get(key)
        if size is None:
            size = self._cloud.info(key).size
            self._sizes[key] = size
            if len(self._sizes) > SIZES:
                self._sizes.popitem(last=False)
        near.used(key, wholes + read / max(size, 1))
        if near.popular.recent(key) < ENOUGH - 1e-6:
            return
        if not near.reserve(size, near.popular.worth(key, size)):
            return
        try:
            self._bring(key, size)
        finally:
            near.release(size)

    def _bring(self, key: str, size: int) -> None:
        near = self._near
        store = near.store
        if store is None:
            return
        with _staged(store) as path:
            try:
                self._fetch(key, size, path)
                check_content(key, path)
            except OSError as error:
                near.refused(error)
                return
            with near.turn(key):
                if self._was_removed or near.item(key) is not None or near.has(key):
                    return
                if near.put(key, size, lambda there: there.put_file(key, path), held=False):
                    self._metrics.front_brought_bytes.inc(size)

    def _fetch(self, key: str, size: int, path: Path) -> None:
        """Copy the object into a new file. Raises what the cloud raises, and OSError."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

        def piece(start: int) -> None:
            if self._over:
                raise Unavailable("the store is closed")
            if self._was_removed:
                raise NotFound(f"the object {key} was removed")
            buffer = memoryview(bytearray(min(PIECE, size - start)))
            self._cloud.read_into(key, start, buffer)
            done = 0
            while done < len(buffer):
                done += os.pwrite(fd, buffer[done:], start + done)

        try:
            reserve(fd, size)
            starts = range(0, size, PIECE)
            if len(starts) < 2:
                for start in starts:
                    piece(start)
                return
            with ThreadPoolExecutor(READERS, thread_name_prefix="bring") as threads:
                for _ in threads.map(piece, starts):
                    pass
        finally:
            os.close(fd)


@contextlib.contextmanager
def _staged(store: DirectoryStore) -> Iterator[Path]:
    path = store.staging() / f"fill-{threading.get_ident()}"
    path.unlink(missing_ok=True)
    try:
        yield path
    except IntegrityError:
        log.warning("an object came from the cloud other than its name says", extra={"file": path.name})
        raise
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
