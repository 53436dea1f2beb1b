"""A store in the cloud with a bounded one on a fast local disk in front of it.

Writes are acknowledged when the cloud has them (``through``), or when the local disk has them and has written down that
the cloud does not yet (``back``). What waits for the cloud is never let go here; what the disk has no room for goes to
the cloud alone, in either case. Reads come from the front where it has the object, else from the cloud, in ranges;
what is read often enough comes here whole, in the background (fills.py).

A removal counts at once and for all readers, also while the cloud has the object still.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Final, TypeVar

from helios.errors import HeliosError, IntegrityError, NotFound, Unavailable
from helios.metrics import RegistryMetrics
from heliosfs.store.directory import DirectoryStore
from heliosfs.store.front.fills import Fills
from heliosfs.store.front.lasting import Lasting
from heliosfs.store.front.near import Near
from heliosfs.store.front.past import Past
from heliosfs.store.front.returning import is_named
from heliosfs.store.front.uploads import Uploads
from heliosfs.store.front.waiting import Op
from heliosfs.store.keys import check_key
from heliosfs.store.objects import Good, ObjectInfo, ObjectStore

T = TypeVar("T")

SIGNED_S: Final = 300.0
"""Addresses of one object that are signed within so many seconds are one use: nodes ask again with every lease."""
MAX_SIGNED: Final = 65536


class FrontStore:
    """An ``ObjectStore``. Threads share it; close it when done."""

    def __init__(
        self, cloud: ObjectStore, near: Near, metrics: RegistryMetrics, *, back: bool = False, send_near: bool = False
    ) -> None:
        """``back``: acknowledge writes before the cloud has them. ``send_near``: sign no address of what is here, so
        that it is sent from here."""
        self._cloud, self._near, self._metrics = cloud, near, metrics
        self._back, self._send_near = back, send_near
        self._past = Past(near)
        self._signed: dict[str, float] = {}
        self._signing = threading.Lock()
        self._uploads = Uploads(near, cloud, metrics)
        self._fills = Fills(near, cloud, metrics)

    def close(self) -> None:
        filled, uploaded = self._fills.close(), self._uploads.close()
        self._near.close(idle=filled and uploaded)
        self._cloud.close()

    def __enter__(self) -> FrontStore:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def describe(self) -> str:
        return f"{self._cloud.describe()} behind {self._near.root}"

    def staging(self) -> Path:
        """The cloud store's: what is written does not compete with what the front keeps."""
        return self._cloud.staging()

    # --- writing ---

    def put_file(self, key: str, path: Path) -> None:
        check_key(key)
        try:
            size = path.stat().st_size
        except OSError as error:
            raise Unavailable(f"{path} can't be read: {error}") from error

        def to_cloud() -> None:
            twin = path.with_name(secrets.token_hex(8))  # the front needs the file, too
            try:
                os.link(path, twin)
            except OSError:
                self._cloud.put_file(key, path)
                return
            try:
                self._cloud.put_file(key, twin)
            finally:
                twin.unlink(missing_ok=True)

        self._put(key, size, lambda store: store.put_file(key, path), to_cloud)
        path.unlink(missing_ok=True)

    def put_bytes(self, key: str, data: bytes) -> None:
        check_key(key)
        self._put(key, len(data), lambda store: store.put_bytes(key, data), lambda: self._cloud.put_bytes(key, data))

    def _put(self, key: str, size: int, write: Callable[[DirectoryStore], None], to_cloud: Callable[[], None]) -> None:
        near = self._near
        room = not near.has(key) and near.reserve(size)
        try:
            if self._back and not _is_claim(key) and self._put_back(key, size, write, room):
                return
            self._put_through(key, size, write, room, to_cloud)
        finally:
            if room:
                near.release(size)

    def _put_back(self, key: str, size: int, write: Callable[[DirectoryStore], None], room: bool) -> bool:
        """Whether the object is here now, and the cloud gets it. ``room`` was promised unless it was here already."""
        near = self._near
        with near.turn(key):
            item = near.item(key)
            if near.writable() is None:
                return False
            if near.has(key) and (item is None or item.op is not Op.DELETE):
                return near.put(key, size, write, held=item is not None)  # it is here already, or this raises
            if not room:
                return False
            removed = item is not None and item.op is Op.DELETE
            if near.remember(key, Op.REPLACE if removed else Op.PUT) is None:
                return False
            try:
                if near.put(key, size, write, held=True):
                    return True
            except BaseException:
                self._take_back(key, removed)
                raise
            self._take_back(key, removed)
            return False

    def _take_back(self, key: str, removed: bool) -> None:
        """What was to be written here was not; what waited before waits again."""
        if removed:
            self._near.unwritten(key)
        else:
            self._near.forget(key)

    def _put_through(
        self,
        key: str,
        size: int,
        write: Callable[[DirectoryStore], None],
        room: bool,
        to_cloud: Callable[[], None],
    ) -> None:
        near = self._near
        with self._uploads.turn(key):
            unknown = self._past.begin(key)
            item = near.item(key)
            if item is not None and item.op is not Op.PUT:
                self._cloud.delete(key)
            to_cloud()
            with near.turn(key):
                self._past.put(key, item, unknown)
                if not (room or near.has(key)) or near.writable() is None:
                    return
                try:
                    near.put(key, size, write, held=near.item(key) is not None)
                except IntegrityError:
                    near.remove(key)  # the cloud has compared it with what it holds, so this is what is out of date

    def delete(self, key: str) -> None:
        check_key(key)
        near = self._near
        with near.turn(key):
            self._fills.removed(key)
            waits = near.item(key) is not None
            if (self._back or waits) and near.writable() is not None and near.remember(key, Op.DELETE) is not None:
                near.remove(key)
                return
        with self._uploads.turn(key), near.turn(key):
            self._fills.removed(key)  # again: it may have been begun since
            self._past.remove(key, lambda: self._cloud.delete(key))

    # --- reading ---

    def info(self, key: str) -> ObjectInfo:
        entry = self._near.popular.entries.get(key)

        def look(store: ObjectStore) -> ObjectInfo:
            found = store.info(key)
            if store is not self._cloud and entry is not None and found.size != entry.size:
                raise IntegrityError(f"{key} has {found.size} bytes in the front, not {entry.size}")
            return found

        return self._read(key, look)

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        entry = self._near.popular.entries.get(key)

        def read(store: ObjectStore) -> bool:
            store.read_into(key, offset, buffer)
            return store is not self._cloud

        near = self._read(key, read)
        if not near:
            self._fills.read(key, len(buffer))
        elif entry is not None:
            self._near.used(key, len(buffer) / max(entry.size, 1))
        self._count(near, len(buffer))

    def open_local(self, key: str) -> BinaryIO | None:
        """Where the front has the object; whether there is one at all is not looked at."""
        check_key(key)
        store, item = self._near.store, self._near.item(key)
        if store is None or not self._near.has(key) or (item is not None and (item.stale or item.op is Op.DELETE)):
            return None
        try:
            file = store.open_local(key)
        except (NotFound, Unavailable):
            return None
        entry = self._near.popular.entries.get(key)
        if file is None or entry is None:
            return file
        if os.fstat(file.fileno()).st_size != entry.size:
            file.close()
            self._doubt(key)
            return None
        self._near.opened(key)
        self._count(True, 0)
        return file

    def _read(self, key: str, act: Callable[[ObjectStore], T]) -> T:
        check_key(key)
        near = self._near
        item, store = near.item(key), near.store
        if item is not None and item.op is Op.DELETE:
            raise NotFound(f"the object {key} is not in {self.describe()}")
        here = store if near.has(key) else None
        stale = item is not None and item.stale
        wrong: IntegrityError | None = None
        if here is not None and not stale:
            try:
                return act(here)
            except (NotFound, Unavailable):
                self._doubt(key)
            except IntegrityError as error:
                wrong = error
                self._doubt(key)
        now = near.item(key)
        if now is not None and now.op is not Op.PUT and not is_named(key):
            # The cloud may have it as it was before yet.
            if now is not item:
                return self._read(key, act)
            if here is None:
                raise NotFound(f"the object {key} is not in {self.describe()}")
            raise wrong or self._away(key)
        try:
            return act(self._cloud)
        except NotFound:
            if here is not None and stale:
                return act(here)
            if wrong is not None:  # it is here alone, and less than was asked for
                raise wrong from None
            if near.unknown(key) or (item is not None and near.item(key) is item):
                raise self._away(key) from None
            raise

    def _away(self, key: str) -> Unavailable:
        return Unavailable(
            f"the object {key} is not in {self._cloud.describe()} yet, and {self._near.root} does not give it",
            hint="Bring the front's disk back.",
        )

    def _doubt(self, key: str) -> None:
        """Reading what should be here failed. What is not what it was goes, where the cloud has it."""
        near = self._near
        with near.turn(key):
            entry, store = near.popular.entries.get(key), near.store
            if entry is None or entry.held or store is None:
                return
            try:
                if store.info(key).size == entry.size:
                    return
            except NotFound:
                near.dropped(key)
            except HeliosError:
                return
            else:
                near.remove(key)

    @property
    def lasting(self) -> ObjectStore:
        return Lasting(self, self._near, self._cloud)

    def heal(self, key: str, offset: int, length: int, good: Good) -> bool:
        """A copy here that is wrong goes, if the cloud's is right; one that waits for the cloud is all there is."""
        near = self._near
        store, item = near.store, near.item(key)
        if store is None or not near.has(key):
            return self._cloud.heal(key, offset, length, good)
        with contextlib.suppress(NotFound, Unavailable, IntegrityError):
            buffer = memoryview(bytearray(length))
            store.read_into(key, offset, buffer)
            if good(buffer):
                return True
        if not self._cloud.heal(key, offset, length, good):
            return False
        with near.turn(key):
            if near.item(key) is item:
                if item is not None:
                    near.forget(key)  # the cloud has it, and better
                near.remove(key)
        return True

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        near = self._near
        with near.journal:
            items = dict(near.waiting.items)
        gone = {key for key, item in items.items() if item.op is Op.DELETE}
        here = []
        for key in sorted(items.keys() - gone):
            entry = near.popular.entries.get(key)
            if entry is not None and key.startswith(prefix):
                here.append(ObjectInfo(key, entry.size))
        last = ""
        for info in heapq.merge(here, self._cloud.list(prefix), key=lambda info: info.key):
            if info.key != last and info.key not in gone:
                last = info.key
                yield info

    # --- where it is ---

    @property
    def local(self) -> None:
        """None: nodes would link what is to be let go, which then frees nothing."""
        return None

    def near(self, key: str) -> bool:
        return self._near.has(key)

    def waits(self, key: str) -> bool:
        return self._near.item(key) is not None

    def signed_urls(self, keys: Sequence[str], expires_s: float) -> Sequence[str | None] | None:
        """None for what the cloud does not have yet, and, where that is wanted, for what is here."""
        for key in keys:
            check_key(key)
        chosen = [key for key in keys if not self.waits(key) and not (self._send_near and self.near(key))]
        found = self._cloud.signed_urls(chosen, expires_s)
        if found is None:
            return None
        if self._send_near:
            self._note(chosen)
        urls = dict(zip(chosen, found, strict=True))
        return [urls.get(key) for key in keys]

    def _note(self, keys: Sequence[str]) -> None:
        """Whoever gets an address reads the object, as far as is known: we don't see it."""
        now = time.monotonic()
        with self._signing:
            new = [key for key in keys if now - self._signed.get(key, -SIGNED_S) >= SIGNED_S]
            for key in new:
                self._signed.pop(key, None)
                self._signed[key] = now
            while len(self._signed) > MAX_SIGNED:
                del self._signed[next(iter(self._signed))]
        for key in new:
            self._fills.read(key, None)

    def _count(self, near: bool, count: int) -> None:
        level = "front" if near else "store"
        self._metrics.front_reads.labels(level).inc()
        self._metrics.front_read_bytes.labels(level).inc(count)

    # --- the rest ---

    def check(self) -> None:
        self._cloud.check()

    def problems(self) -> Sequence[str]:
        return [*self._near.problems(), *self._cloud.problems()]

    def tidy(self) -> int:
        return self._cloud.tidy()


def _is_claim(key: str) -> bool:
    """Whether the key says whose the store is, which only the store itself can tell."""
    return key.split("/")[1] == "registry"
