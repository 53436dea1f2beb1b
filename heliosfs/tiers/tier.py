"""One tier: what its disk really holds, the room in it, whether the disk can be relied on.

All methods run on the trio loop, which alone touches the policy; disk work is done in threads. What goes, the policy
says and removing.py does.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final, TypeVar

import trio

from helios.errors import HeliosError, NoSpace, Unavailable
from helios.metrics import MountMetrics
from heliosfs.tiers.directory import Found, TierDirectory
from heliosfs.tiers.examine import load_sums
from heliosfs.tiers.health import Health, State
from heliosfs.tiers.history import History
from heliosfs.tiers.local import LocalBlob, Places, save_sums, unlink
from heliosfs.tiers.moving import copy
from heliosfs.tiers.policy import Answer, Bounds, Disk, Policy, Reservation, Verdict
from heliosfs.tiers.removing import Events, Evicted, Removal, Remover

log = logging.getLogger("heliosfs.tiers")

T = TypeVar("T")

QUARANTINED: Final = 8
"""At most one in so many bytes of a tier's limit is kept in quarantine."""

LOOK_S: Final = 1.0
SCAN_S: Final = 60.0
"""How often bounds and the disk's health are looked at, and every file is measured, in seconds."""

RETRY_S: Final = 15.0
"""A blob that would have to push out others is refused without a new look for this long, in seconds."""

CHUNK_SLACK: Final = 16 << 10
"""Bytes of a chunk's room beyond its length: blocks that it shares, its place in the journal."""

MOVING: Final = ".moving"
"""Appended to a blob's name: what a copy of it that is under way is kept as."""


class Tier:
    """Keeps one directory within its bounds."""

    def __init__(
        self,
        name: str,
        root: Path,
        bounds: Bounds,
        history: History,
        limiter: trio.CapacityLimiter,
        metrics: MountMetrics,
        events: Events,
        *,
        beside: Path | None = None,
        needed: bool = True,
    ) -> None:
        """Take the directory. Raises what TierDirectory raises; one that is not ``needed`` may be away."""
        self.name, self.root, self.policy = name, root, Policy(bounds, history)
        self.health = Health()
        self._beside = beside
        self.directory: TierDirectory | None = None
        """None while there is none at ``root`` that is ours."""
        self._places: Places
        self._now, self._limiter, self._metrics, self._events = history.clock, limiter, metrics, events
        self._refused: dict[str, tuple[float, Answer]] = {}
        self._changed: set[str] = set()
        self._grown: set[str] = set()
        self._aside = 0
        self._remover = Remover(name, self.policy, limiter, metrics, events, self._changed)
        self._nursery: trio.Nursery | None = None
        metrics.cache_used.labels(name).set_function(lambda: self.policy.used)
        metrics.cache_reserved.labels(name).set_function(lambda: self.policy.reserved)
        metrics.cache_limit.labels(name).set(bounds.limit or 0)
        metrics.cache_up.labels(name).set_function(lambda: self.health.writable)
        try:
            self._take(*_taken(name, root, beside, True))
        except (NoSpace, Unavailable) as error:
            if needed:
                raise
            self.failed(OSError(errno.ENODEV, error.message))

    def close(self) -> None:
        """Give the directory up."""
        self._remover.close()
        if self.directory is not None:
            self.directory.close()

    async def run(self, nursery: trio.Nursery) -> None:
        """Remove and look until cancelled."""
        self._nursery = nursery
        nursery.start_soon(self._remover.run)
        scanned = self._now()
        try:
            while True:
                await trio.sleep(LOOK_S)
                await self._look()
                if self._now() - scanned >= SCAN_S:
                    await self.scan()
                    scanned = self._now()
        finally:
            self._nursery = None

    def disk(self) -> Disk | None:
        """The filesystem's free and total bytes, where it answers. Blocks."""
        directory = self.directory
        try:
            return None if directory is None else directory.disk()
        except OSError:
            return None  # the next look finds out why

    # --- blobs come and go ---

    @property
    def places(self) -> Places:
        """The directory that is, or was last, this tier's."""
        return self._places

    def has(self, local: LocalBlob) -> bool:
        """Whether the blob's files are here, or would be."""
        return self.directory is not None and local.places is self.directory

    def lead(self, local: LocalBlob) -> bool:
        """Have the blob's files made here, if they are not here; returns whether that is so now."""
        return self.directory is not None and local.go_to(self.directory)

    def hold(self, sha256: str) -> None:
        """The blob is in use from now on."""
        self.policy.hold(sha256)
        self._changed.add(sha256)

    def let_go(self, sha256: str) -> None:
        """The blob, whose files were elsewhere, is not in use any more."""
        self._changed.add(sha256)
        self.policy.let_go(sha256)
        if self.directory is None and not self.policy.holds(sha256):
            self.policy.drop(sha256)

    async def settled(self, sha256: str) -> None:
        """Wait while the blob, which is held, is being removed. One that only was to be removed stays."""
        while (done := self._remover.busy.get(sha256)) is not None:
            await done.wait()

    def loaded(self, local: LocalBlob) -> None:
        """The blob's files were opened, or there are none."""
        self._changed.add(local.sha256)
        if local.fd < 0:
            self.policy.drop(local.sha256)
        else:
            self.policy.put(local.sha256, local.size, local.cost, local.whole)

    def grew(self, local: LocalBlob, loan: Reservation | None) -> None:
        """Something was written for the blob with this loan; by a thread that was given up it may be closed by now."""
        sha256 = local.sha256
        self._changed.add(sha256)
        self._grown.add(sha256)
        if not local.closed:
            cost = local.cost if local.fd >= 0 else None
        else:
            cost = self._left(sha256) if self.policy.holds(sha256) == 1 else None
        if cost is not None:
            grown = self.policy.put(sha256, local.size, cost, local.whole)
            if loan is not None:
                self.policy.wrote(loan, grown)

    def closed(self, local: LocalBlob) -> None:
        """The blob is not in use any more: close its files. Its room is measured when that is done."""
        sha256 = local.sha256
        gone = local.fd >= 0 and os.fstat(local.fd).st_nlink == 0
        local.close()
        if self._nursery is not None and (gone or local.damaged or sha256 in self._grown or not local.ended):
            self._grown.discard(sha256)
            self._nursery.start_soon(self._measure, local)
        else:
            self.policy.let_go(sha256)

    # --- room ---

    def ask(self, key: str, size: int, need: int, group: str = "", group_need: int = 0, blob: str = "") -> Answer:
        """See ``Policy.ask``. What has to go begins to."""
        if not self.health.writable or self.directory is None:
            return Answer(Verdict.TOO_LARGE)
        try:
            disk = self.directory.disk()
        except OSError:
            return Answer(Verdict.TOO_LARGE)  # the directory is gone; the next look finds out
        policy, now = self.policy, self._now()
        until, answer = self._refused.get(key, (0.0, None))
        if answer is not None and now < until and need > policy.room(disk):
            return answer
        answer = policy.ask(key, size, need, disk, group, group_need, blob)
        if answer.verdict in (Verdict.TOO_LARGE, Verdict.NOT_WORTH):
            self._refused[key] = (now + RETRY_S, answer)
        else:
            self._refused.pop(key, None)
        self.remove(answer.victims, "room", Evicted())
        return answer

    def has_room(self, need: int) -> bool:
        """Whether so many bytes can be written and nothing has to go for it."""
        if not self.health.writable or self.directory is None:
            return False
        try:
            return need <= self.policy.room(self.directory.disk())
        except OSError:
            return False

    def end(self, key: str) -> None:
        """No room is wanted any more."""
        self._refused.pop(key, None)
        self.policy.end(key)

    def lend(self, local: LocalBlob, count: int) -> Reservation | None:
        """Room for chunks of ``count`` bytes that are about to be fetched; None: they can't be kept."""
        if not self.health.writable or self.directory is None:
            return None
        ticket = self.policy.ticket(local.sha256)
        if ticket is not None:
            return self.policy.split(ticket, count)
        try:
            return self.policy.borrow(count + CHUNK_SLACK, self.directory.disk())
        except OSError:
            return Reservation(0)  # writing will say what is wrong

    def reconsider(self) -> None:
        """Refusals are not to be relied on any more: something else counts now."""
        self._refused.clear()

    def remove(self, keys: Iterable[str], reason: str, result: Evicted) -> list[Removal]:
        """Blobs that the policy marked as leaving are to go; each removal's ``done`` is set when it is over."""
        return self._remover.enqueue(keys, reason, result)

    async def discard(self, sha256: str) -> bool:
        """Remove a blob that is wrong, pinned or not; False where it is in use. Returns when it is done."""
        if not self.policy.condemn(sha256):
            return self.policy.holds(sha256) == 0
        result = Evicted()
        for removal in self.remove([sha256], "damaged", result):
            await removal.done.wait()
        return not result.kept

    def taken_away(self, sha256: str, grown: int) -> None:
        """The whole file of a blob is gone; what was put aside takes ``grown`` bytes more."""
        self._changed.add(sha256)
        self.policy.drop(sha256)
        self._set_aside(grown)

    async def measure(self, sha256: str) -> None:
        """Something beside a blob that nobody holds was written."""
        self._changed.discard(sha256)
        directory = self.directory
        if directory is None:
            return
        found = await self._ask_disk(lambda: [directory.measure(sha256)])
        if found is not None and sha256 not in self._changed and not self.policy.holds(sha256):
            self._put(sha256, found[0])

    def refusal(self, sha256: str) -> str:
        """Why the blob was not let in when it was last asked for; empty where it was."""
        _, answer = self._refused.get(sha256, (0.0, None))
        return "" if answer is None else answer.verdict.value

    async def receive(
        self, source: TierDirectory, key: str, size: int, loan: Reservation, still: Callable[[], bool]
    ) -> bool:
        """Copy a whole blob's file here, with a loan; ``still``: whether it is wanted. Returns whether it is here now.

        Raises OSError, IntegrityError, Stopped.
        """
        wish, directory = key + MOVING, self.directory
        if directory is None:
            return False

        def grew(cost: int) -> bool:
            self.policy.wrote(loan, self.policy.put(wish, size, cost))
            return still() and self.health.writable

        def progress(cost: int) -> bool:
            trio.from_thread.check_cancelled()
            return trio.from_thread.run_sync(grew, cost)

        try:
            path = source.whole_path(key)
            await trio.to_thread.run_sync(copy, path, directory, key, size, progress, limiter=self._limiter)
            if not still():
                await self._in_thread(lambda: unlink(directory.moving_path(key)))
                return False
            with self._remover.at(key):
                found = await self._in_thread(lambda: _placed(directory, source, key, size))
                self._changed.add(key)
                self.policy.drop(wish)
                self._put(key, found)
        finally:
            self.policy.drop(wish)
        return True

    # --- health ---

    def failed(self, error: OSError) -> None:
        """The disk failed somebody: leave it alone for a while."""
        if not self.health.failed(error, self._now()):
            return
        state, reason = self.health.state, self.health.reason
        log.warning(
            "a tier of the cache can't be used as it should; everything else goes on",
            extra={"tier": self.name, "directory": str(self.root), "state": state.value, "reason": reason},
        )
        if state is State.AWAY:
            if self.directory is not None:
                self.directory.close()  # so that its filesystem can be unmounted and repaired
                self.directory = self._remover.directory = None
            for key in [key for key in self.policy.entries if not self.policy.holds(key)]:
                self.policy.drop(key)
            self._set_aside(-self._aside)
        self._events.lost()

    async def _look(self) -> None:
        directory = self.directory
        try:
            if directory is None:
                if self.health.due(self._now()):
                    await self._look_again()
            elif not await self._in_thread(directory.check):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))
            elif not self.health.writable and self.health.due(self._now()):
                await self._in_thread(directory.try_writing)
                self._works()
        except OSError as error:
            if self.directory is directory:
                self.failed(error)
        for key in self._remover.look_at_open_files():
            await self._measure_again(key)
        if self.directory is not None and self.health.writable:
            disk = await self._ask_disk(self.directory.disk)
            if disk is not None:
                self.remove(self.policy.trim(disk), "bounds", Evicted())

    async def _look_again(self) -> None:
        """Take the directory if it has come back: one that was a tier before, never an empty one made in its place."""
        try:
            taken = await self._in_thread(lambda: _taken(self.name, self.root, self._beside, False))
        except HeliosError as error:
            log.debug("a tier of the cache is still away", extra={"tier": self.name, "reason": str(error)})
            return
        self._take(*taken)
        if self.health.writable:
            self._works()

    def _works(self) -> None:
        self.health.works(self._now())
        log.info("a tier of the cache works again", extra={"tier": self.name, "directory": str(self.root)})
        self._events.went()

    def _take(self, directory: TierDirectory, found: dict[str, Found], aside: int, writable: bool) -> None:
        self.directory = self._remover.directory = self._places = directory
        if self.policy.bounds.limit is not None:
            directory.quarantine.bound(self.policy.bounds.limit // QUARANTINED)
        self.health.works(self._now())
        for key, each in found.items():
            if not self.policy.holds(key):
                self._put(key, each)
        self._set_aside(aside - self._aside)
        if not writable:
            self.failed(OSError(errno.EROFS, os.strerror(errno.EROFS)))

    # --- inside ---

    def _set_aside(self, grown: int) -> None:
        """What is no blob takes so many bytes more."""
        self._aside += grown
        self.policy.count(grown)

    def _left(self, sha256: str) -> int | None:
        """What a blob takes that nobody has open but a thread that was given up."""
        try:
            found = None if self.directory is None else self.directory.measure(sha256)
        except OSError:
            return None
        return None if found is None else found.cost

    async def _measure_again(self, key: str) -> None:
        directory = self.directory
        if directory is None or self.policy.holds(key) or key in self._remover.busy:
            return
        found = await self._ask_disk(lambda: [directory.measure(key)])
        if found is not None and not self.policy.holds(key) and key not in self._remover.busy:
            self._put(key, found[0])

    async def _measure(self, local: LocalBlob) -> None:
        key = local.sha256
        try:
            while not local.ended:  # noqa: ASYNC110 - a call that was given up is still at it, in its thread
                await trio.sleep(LOOK_S)
            directory = self.directory
            if directory is not None:
                found = await self._ask_disk(lambda: [directory.measure(key)])
                if found is not None and self.policy.holds(key) == 1:
                    self._put(key, found[0])
        finally:
            self.let_go(key)

    async def scan(self) -> None:
        """Measure every file: some may have gone, or may have lost their other name."""
        directory = self.directory
        if directory is None or not self.health.readable:
            return
        self._changed.clear()
        found = await self._ask_disk(directory.scan)
        if found is None:
            return
        for key in found.keys() | self.policy.entries.keys():
            if key not in self._changed and not self.policy.holds(key):
                self._put(key, found.get(key))

    def _put(self, key: str, found: Found | None) -> None:
        if found is None:
            self.policy.drop(key)
        else:
            self.policy.put(key, found.size, found.cost, found.whole)

    async def _in_thread(self, call: Callable[[], T]) -> T:
        return await trio.to_thread.run_sync(call, limiter=self._limiter)

    async def _ask_disk(self, call: Callable[[], T]) -> T | None:
        """In a thread. None when the disk fails: it may come back."""
        try:
            return await self._in_thread(call)
        except OSError as error:
            log.info("the cache's disk can't be asked", extra={"tier": self.name, "reason": error.strerror})
            return None


def _placed(directory: TierDirectory, source: TierDirectory, key: str, size: int) -> Found | None:
    """Give a copy its name, and what the scrubber needs of it. Blocks; raises OSError."""
    directory.place(key, size)
    sums = load_sums(source.sums_path(key), key)
    if sums is not None:
        save_sums(directory.sums_path(key), sums)
    return directory.measure(key)


def _taken(
    name: str, root: Path, beside: Path | None, create: bool
) -> tuple[TierDirectory, dict[str, Found], int, bool]:
    """A tier's directory, what is in it, the bytes that were put aside, whether it can be written. Blocks.

    Raises HeliosError.
    """
    directory = TierDirectory(name, root, beside, create=create)
    try:
        found, writable = directory.scan(), directory.check()
        if writable and not create:
            directory.try_writing()
        return directory, found, directory.quarantine.usage()[1], writable
    except OSError as error:
        directory.close()
        raise Unavailable(f"the cache directory {root} can't be read: {error.strerror}") from error
