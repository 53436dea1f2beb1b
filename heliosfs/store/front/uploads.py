"""Has the cloud catch up with what the front acknowledged, in the background, for as long as it takes.

What waits is done in the order in which it came, a few at a time and one at a time for each key. A cloud that fails is
tried again with growing pauses, forever: it is what the front store promised. A look around every few seconds keeps the
front within its bounds and takes its disk back.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import threading
import time
from typing import Final

from helios.errors import HeliosError, IntegrityError, NotFound, Unavailable
from helios.metrics import RegistryMetrics
from heliosfs.store.front.near import LOOK_S, Near
from heliosfs.store.front.returning import is_named
from heliosfs.store.front.turns import Turns
from heliosfs.store.front.waiting import Item, Op
from heliosfs.store.objects import ObjectStore
from heliosfs.store.selfcheck import check_content

log = logging.getLogger("helios.store")

AT_A_TIME: Final = 4
"""Objects that go up at a time; a large one has several parts under way."""

FIRST_S: Final = 0.5
LONGEST_S: Final = 300.0
"""Pauses after a failure, in seconds: they double from the first to the longest."""

IDLE_S: Final = 0.5
"""How often a thread without work looks whether something is due again, in seconds."""

CLOSE_S: Final = 5.0
"""Longest wait for uploads under way when the store is closed, in seconds; the journal remembers what is left."""


class Uploads:
    """The threads that do what waits. ``turn`` keeps a key's uploads and removals in the cloud apart."""

    def __init__(self, near: Near, cloud: ObjectStore, metrics: RegistryMetrics) -> None:
        self._near, self._cloud, self._metrics = near, cloud, metrics
        self.turn = Turns()
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._busy: set[str] = set()
        self._failures, self._not_before = 0, 0.0
        """Of the cloud as a whole."""
        self._looked = time.monotonic()
        self._threads = [
            threading.Thread(target=self._run, args=(number == 0,), name=f"upload {number}", daemon=True)
            for number in range(AT_A_TIME)
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> bool:
        """Stop; whether everything under way has ended."""
        self._over.set()
        self._near.wake.set()
        end = time.monotonic() + CLOSE_S
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self, first: bool) -> None:
        near = self._near
        while not self._over.is_set():
            try:
                if first:
                    self._look_around()
                found = None if near.doubtful else self._next()
                if found is None:
                    near.wake.wait(IDLE_S)
                    if not self._over.is_set():
                        near.wake.clear()
                    continue
                self._work(*found)
            except Exception:
                log.exception("the front store's background work broke; it goes on")
                self._over.wait(FIRST_S)

    def _look_around(self) -> None:
        now = time.monotonic()
        if now - self._looked >= LOOK_S:
            self._looked = now
            self._near.look()
        if self._near.doubtful and now >= self._not_before:
            try:
                self._settle()
            except HeliosError as error:
                self._failed(error)

    def _settle(self) -> None:
        """Compare lists: what the cloud has in the same size was uploaded, the rest waits for it."""
        near = self._near
        doubtful = {key for key, item in dict(near.waiting.items).items() if item.doubtful}
        there = {info.key: info.size for info in self._cloud.list("") if info.key in doubtful}
        left = 0
        for key in doubtful:
            with near.turn(key):
                item, entry = near.item(key), near.popular.entries.get(key)
                if item is None or not item.doubtful:
                    continue
                if entry is None or (is_named(key) and there.get(key) == entry.size):
                    near.forget(key)
                else:
                    left += 1
                    item.doubtful = False
        log.info("the front store was compared with the cloud", extra={"objects": len(doubtful), "missing": left})
        near.settled()
        self._worked()

    # --- one thing after the other ---

    def _next(self) -> tuple[str, Item] | None:
        now = time.monotonic()
        if now < self._not_before:
            return None
        with self._near.journal, self._lock:
            for key, item in self._near.waiting.items.items():
                if key not in self._busy and now >= item.not_before:
                    self._busy.add(key)
                    return key, item
        return None

    def _work(self, key: str, item: Item) -> None:
        near = self._near
        try:
            with self.turn(key):
                with near.turn(key):  # who wrote down that it waits may be writing it yet
                    if near.item(key) is not item or self._over.is_set():
                        return
                if item.op is not Op.PUT:
                    self._cloud.delete(key)
                if item.op is not Op.DELETE:
                    self._upload(key, item)
                with near.turn(key):
                    if near.item(key) is item:
                        near.forget(key)
            self._worked()
            self._metrics.front_uploads.labels("done" if item.op is not Op.DELETE else "removed").inc()
        except HeliosError as error:
            if near.item(key) is not item:
                return  # removed or written anew meanwhile, which follows
            self._metrics.front_uploads.labels("failed").inc()
            item.failures += 1
            item.why = error.message
            item.not_before = time.monotonic() + _pause(item.failures)
            if isinstance(error, Unavailable):
                self._failed(error)
            else:
                log.error("an object can't be uploaded", extra={"object": key, "reason": error.message})
        finally:
            with self._lock:
                self._busy.discard(key)

    def _upload(self, key: str, item: Item) -> None:
        try:
            self._send(key)
        except IntegrityError as error:
            if not self._is_there(key):
                raise  # it went wrong on the way, and was taken away again
            self._conflict(key, item, error)

    def _send(self, key: str) -> None:
        """Write the object as the front has it. Raises Unavailable where that does not have it (any more)."""
        store = self._near.store
        if store is None:
            raise Unavailable(f"the front store in {self._near.root} is not there")
        twin = store.staging() / secrets.token_hex(8)
        try:
            if not is_named(key):  # a record of some bytes, which must be this one if there is one already
                self._cloud.put_bytes(key, (store.root / key).read_bytes())
                return
            os.link(store.root / key, twin)
            check_content(key, twin)  # it may have rotted while it waited: the cloud's read-back would not notice
        except OSError as error:
            raise Unavailable(f"{store.root / key} can't be read, and only it has the object: {error}") from error
        except IntegrityError:
            twin.unlink(missing_ok=True)
            raise
        try:
            self._cloud.put_file(key, twin)
        finally:
            with contextlib.suppress(OSError):
                twin.unlink(missing_ok=True)

    def _conflict(self, key: str, item: Item, error: IntegrityError) -> None:
        """The cloud has something else under this key. What the key is a hash of is right; else the cloud is, unless
        the front has something newer by now, which follows."""
        if self._near.item(key) is not item:
            return
        store = self._near.store
        if store is None:
            raise Unavailable(f"the front store in {self._near.root} is not there")
        named = is_named(key) and key.split("/")[1] != "xet"  # of which selfcheck.py can't tell
        try:
            check_content(key, store.root / key)
        except IntegrityError:
            named = False
        except OSError as problem:
            raise Unavailable(f"{store.root / key} can't be read: {problem}") from problem
        log.error(
            "the cloud has another object of this name",
            extra={"object": key, "reason": error.message, "kept": "the front's" if named else "the cloud's"},
        )
        if named:
            self._cloud.delete(key)
            self._send(key)
            return
        with self._near.turn(key):
            if self._near.item(key) is item:
                self._near.remove(key)
                self._near.forget(key)

    def _is_there(self, key: str) -> bool:
        try:
            self._cloud.info(key)
        except NotFound:
            return False
        return True

    def _failed(self, error: HeliosError) -> None:
        with self._lock:
            self._failures += 1
            self._not_before = time.monotonic() + _pause(self._failures)
        if self._failures in (1, 5) or self._failures % 50 == 0:
            log.warning(
                "uploads wait for the cloud", extra={"waiting": len(self._near.waiting.items), "reason": error.message}
            )

    def _worked(self) -> None:
        with self._lock:
            self._failures, self._not_before = 0, 0.0


def _pause(failures: int) -> float:
    return float(min(FIRST_S * 2 ** min(failures - 1, 20), LONGEST_S))
