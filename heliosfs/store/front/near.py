"""What lies in the front and what waits there for the cloud: the state that writers, readers and the background share.

Locks, always taken in this order: a key's turn (one at a time changes what the front has under a key), ``journal``
(held while the journal is written), ``_lock`` (what is in memory). Readers take none of them: they look, try, and go to
the cloud where what they saw has changed.

Whatever the disk refuses is no error here: writes then go to the cloud alone, and what the front has *missed* so is
written down elsewhere (missed.py), and caught up with before the front is written to again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from helios.errors import HeliosError, NoSpace, NotFound, Unavailable
from helios.metrics import RegistryMetrics
from heliosfs.store.directory import DirectoryStore
from heliosfs.store.front.disk import Disk, Memory, open_disk
from heliosfs.store.front.missed import Missed
from heliosfs.store.front.popular import Popular
from heliosfs.store.front.returning import weigh
from heliosfs.store.front.turns import Turns
from heliosfs.store.front.waiting import Item, Op, Waiting

log = logging.getLogger("helios.store")

LOOK_S: Final = 5.0
"""How soon a disk that refused is tried again, in seconds."""


class Near:
    """The front's side of a ``FrontStore``."""

    def __init__(
        self, root: Path, name: str, memory: Memory, limit: int | None, min_free: float, metrics: RegistryMetrics
    ) -> None:
        """Raises UsageError for a directory that is no front of the store ``name``; one that is missing is no error."""
        self.root, self.metrics, self._name, self._min_free = root, metrics, name, min_free
        self.memory = memory
        self.turn = Turns()
        self.journal = threading.Lock()
        self._lock = threading.Lock()
        self.popular = Popular(limit, time.time)
        self.wake = threading.Event()
        """Set when there is something to upload or remove."""
        self.disk: Disk | None = None
        self.waiting = Waiting(root)
        self.doubtful = False
        """Whether some of what waits may be in the cloud already."""
        self._missed = Missed(memory.path.with_suffix(".missed"))
        if memory.known is not None:
            self._missed.of(memory.known.id)
        self._stale: set[str] = set()
        """Of what waits, what the cloud may have newer."""
        self._closed = False
        self._why = ""
        self._again = 0.0
        metrics.front_limit.set(limit or 0)
        self._open()

    # --- what is here ---

    @property
    def store(self) -> DirectoryStore | None:
        """Where to read, if the disk was ever there."""
        return None if self.disk is None else self.disk.store

    def has(self, key: str) -> bool:
        return key in self.popular.entries and self.disk is not None

    def item(self, key: str) -> Item | None:
        """What waits for the key."""
        return self.waiting.items.get(key)

    def unknown(self, key: str) -> bool:
        """Whether the front may have the object, and nobody can say so."""
        known = self.memory.known
        return self.disk is None and known is not None and known.owes and not self._missed.keys.get(key)

    def problems(self) -> Sequence[str]:
        found = [f"front {self.root}: {self._why}"] if self._why else []
        stuck = [key for key, item in list(self.waiting.items.items()) if item.failures and item.why]
        if stuck:
            item = self.waiting.items.get(stuck[0])
            found.append(f"{len(stuck)} objects could not be uploaded yet: {item.why if item else ''}")
        return found

    # --- room ---

    def reserve(self, size: int, worth: float | None = None) -> bool:
        """Promise room, for which others go; with ``worth`` none that is worth more. Give it back with ``release``."""
        disk = self.disk
        if disk is None or not self.popular.fits(size):
            return False
        try:
            free, total = disk.space()
        except OSError as error:
            self.refused(error)
            return False
        with self._lock:
            lacking = self.popular.lacking(size, free, int(self._min_free * total))
            victims = self.popular.choose(lacking, worth) if lacking else []
            if victims is None:
                return False
            self.popular.reserved += size
        evicted = [self.evict(key) for key in victims]
        if all(evicted):
            return True
        self.release(size)
        return False

    def release(self, size: int) -> None:
        with self._lock:
            self.popular.reserved -= size

    def trim(self) -> None:
        """Let go what is over the bounds: others write to the disk, too."""
        disk = self.disk
        if disk is None:
            return
        try:
            free, total = disk.space()
        except OSError as error:
            self.refused(error)
            return
        with self._lock:
            victims = self.popular.over(free, int(self._min_free * total))
        for key in victims:
            self.evict(key)

    def evict(self, key: str) -> bool:
        """Remove an object that the cloud has; False where the disk refuses."""
        with self.turn(key):
            entry, store = self.popular.entries.get(key), self.store
            if entry is None or entry.held or store is None:
                return True
            try:
                store.delete(key)
            except HeliosError as error:
                self.refused(error)
                with self._lock:
                    self.popular.spare(key)
                return False
            self.dropped(key)
            self.metrics.front_evictions.inc()
            self.metrics.front_evicted_bytes.inc(entry.size)
            return True

    # --- changes; the caller has the key's turn ---

    def writable(self) -> DirectoryStore | None:
        """Where to write, if that can be written now and has missed nothing."""
        if self._why:
            if time.monotonic() < self._again:
                return None
            self._again = time.monotonic() + LOOK_S
        disk = self.disk
        if disk is None or not disk.is_there():
            self.refused(Unavailable("its disk is not there" if disk else self._why or "it is not there"))
            return None
        if self._missed and not self._catch_up():
            return None
        if self._why:
            log.info("the front store can be written again", extra={"front": str(self.root)})
            self._why = ""
        return disk.store

    def refused(self, error: Exception) -> None:
        """The disk did not do what it was asked to."""
        why = error.message if isinstance(error, HeliosError) else str(error)
        if why != self._why:
            log.warning("the front store can't be used", extra={"front": str(self.root), "reason": why})
        self._why, self._again = why, time.monotonic() + LOOK_S

    def put(self, key: str, size: int, write: Callable[[DirectoryStore], None], *, held: bool) -> bool:
        """Write an object for which there is room; False where the disk refuses."""
        store = self.writable()
        if store is None:
            return False
        try:
            write(store)
        except (NoSpace, Unavailable, OSError) as error:
            if not isinstance(error, NoSpace):
                self.refused(error)
            if key not in self.popular.entries:
                self.remove(key)  # it may have got its name before something failed
            return False
        with self._lock:
            self.popular.put(key, size, held=held)
        self.tell()
        return True

    def remember(self, key: str, op: Op) -> Item | None:
        """Write down that the cloud has to be told; None where the disk refuses."""
        try:
            with self.journal:
                if self._closed:
                    return None
                if not self.waiting.items:
                    self.memory.note(owes=True)
                item = self.waiting.add(key, op)
                self._stale.discard(key)
        except OSError as error:
            self.refused(error)
            return None
        self.tell()
        self.wake.set()
        return item

    def unwritten(self, key: str) -> None:
        """What was to replace a removed object was not written: the removal alone waits again. Where the disk refuses
        to note that, its journal says the same: it names a file that is not there."""
        if self.remember(key, Op.DELETE) is None:
            with self.journal:
                self.waiting.items[key] = Item(Op.DELETE)

    def forget(self, key: str) -> None:
        """Nothing waits for the key any more: the cloud is right about it."""
        with self.journal:
            if self._closed:
                return
            try:
                self.waiting.done(key)
                if key in self._stale:
                    self._stale.discard(key)
                    self._note_whole()
                if not self.waiting.items and self.disk is not None:
                    self.memory.note(owes=False)
            except OSError as error:
                self.refused(error)
                self.miss(key, sure=True)
                self.waiting.items.pop(key, None)
        with self._lock:
            if key in self.popular.entries:
                self.popular.hold(key, False)
        self.tell()

    def remove(self, key: str) -> None:
        """Have the object not here any more, on the disk as soon as that can be written."""
        with self._lock:
            self.popular.drop(key)
        store = self.writable()
        try:
            if store is not None:
                _delete(store, key)
                self.tell()
                return
        except HeliosError as error:
            self.refused(error)
        self.missed(key)
        self.tell()

    def missed(self, key: str) -> None:
        """What the disk has of the key may be out of date, unless it waits."""
        with self.journal:
            self.miss(key, sure=False)

    def has_missed(self, key: str) -> bool:
        return key in self._missed.keys

    def miss(self, key: str, *, sure: bool) -> None:
        """Note it, or with ``sure`` that the cloud is right about the key. The caller holds the journal."""
        if self.memory.known is None:
            return  # there is no front yet: one that comes is compared
        try:
            if self._closed:
                raise OSError("the store is closed")
            if not self._missed.note(key, sure=sure):
                self.memory.note(away=True)
        except OSError as error:
            raise Unavailable(f"what the front store missed can't be noted in {self._missed.path}: {error}") from error

    def dropped(self, key: str) -> None:
        """The file is gone."""
        with self._lock:
            self.popular.drop(key)
        self.tell()

    def used(self, key: str, share: float) -> None:
        with self._lock:
            self.popular.use(key, share)

    def opened(self, key: str) -> None:
        with self._lock:
            self.popular.opened(key)

    def tell(self) -> None:
        """The figures."""
        self.metrics.front_used.set(self.popular.used)
        self.metrics.front_waiting.set(len(self.waiting.items))
        self.metrics.front_waiting_bytes.set(self.popular.held)

    # --- the disk comes and goes ---

    def look(self) -> None:
        """From time to time: take a disk that has come, let go what is over the bounds."""
        if self.disk is None:
            self._open()
        elif self.writable() is not None:
            self.trim()

    def close(self, *, idle: bool) -> None:
        """Nothing is written down from here on. Unless everybody is ``idle`` the directory stays locked while this
        process lives: what is under way yet may reach the cloud, and must not meet a successor's."""
        with self.journal:
            self._closed = True
            self.waiting.close()
            self._missed.close()
            if self.disk is not None and idle:
                self.disk.close()

    def _open(self) -> None:
        try:
            disk = open_disk(self.root, self._name, self.memory)
        except Unavailable as error:
            self.refused(error)
            return
        try:
            self._take(disk)
        except BaseException as error:
            disk.close()
            if not isinstance(error, (OSError, HeliosError)):
                raise
            self.refused(error)

    def _take(self, disk: Disk) -> None:
        """Find out what is there and what waits."""
        found = disk.objects()
        with self.journal:  # from what was missed until the disk is there, nothing may be missed unseen
            known = self.memory.known
            assert known is not None
            if self._closed:
                raise Unavailable("the store is closed")
            self._missed.of(known.id)
            journal, away = self.waiting.load(), known.away or self._missed.lost
            items, gone = weigh(found, journal, self._missed.keys, away)
            for key in gone:
                _delete(disk.store, key)
            self.waiting.items = items
            try:
                self.waiting.begin()
                self.memory.note(owes=bool(items), away=away and bool(items))
                self._missed.clear()
            except BaseException:
                self.waiting.items = {}
                raise
            self._stale = {key for key, item in items.items() if item.stale}
            self.doubtful = any(item.doubtful for item in items.values())
            with self._lock:
                for key in found.keys() - gone:
                    size, arrived = found[key]
                    self.popular.put(key, size, held=key in items, used=arrived)
            self.disk, self._why = disk, ""
        if self.doubtful:
            log.warning("the front store is compared with the cloud", extra={"front": str(self.root)})
        self.tell()
        self.wake.set()

    def settled(self) -> None:
        """What was doubtful is known."""
        self.doubtful = False
        try:
            with self.journal:
                self._note_whole()
        except OSError as error:
            self.refused(error)

    def _note_whole(self) -> None:
        """What lies here can be believed again, if that is so; the caller holds the journal."""
        if not self._missed and not self._stale and not self.doubtful:
            self.memory.note(away=False)

    def _catch_up(self) -> bool:
        """Remove what was removed or written elsewhere while the disk refused; memory says what waits."""
        assert self.disk is not None
        try:
            with self.journal:
                if self._missed.lost or self._closed:
                    return False
                for key in self._missed.keys:
                    item = self.waiting.items.get(key)
                    if key not in self.popular.entries and (item is None or item.op is Op.DELETE):
                        _delete(self.disk.store, key)
                self.waiting.begin()
                self._missed.clear()
                self._note_whole()
        except (OSError, NotFound, Unavailable) as error:
            self.refused(error)
            return False
        return True


def _delete(store: DirectoryStore, key: str) -> None:
    """Remove an object for good: a disk that was away for a moment has it still, though there was nothing to remove."""
    store.delete(key)
    if (store.root / key).exists():
        raise Unavailable(f"{store.root / key} is there after it was removed: its disk was away meanwhile")
