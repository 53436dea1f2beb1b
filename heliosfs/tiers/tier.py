"""One tier: the room in it, and whether its disk can be relied on.

All methods run on the trio loop, which alone touches the policy; disk work is done in threads. What is there,
measuring.py finds out; what goes, the policy says and removing.py does.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

import trio

from helios.errors import HeliosError, NoSpace, Unavailable
from helios.metrics import MountMetrics
from heliosfs.tiers.directory import Found, TierDirectory, TierUsage
from heliosfs.tiers.examine import load_sums
from heliosfs.tiers.health import State
from heliosfs.tiers.history import History
from heliosfs.tiers.local import LocalBlob
from heliosfs.tiers.measuring import LOOK_S, Measured
from heliosfs.tiers.moving import copy
from heliosfs.tiers.places import Places, save_sums, unlink
from heliosfs.tiers.policy import Answer, Bounds, Disk, Policy, Reservation, Verdict
from heliosfs.tiers.removing import Events, Evicted, Removal
from heliosfs.tiers.silence import HANG_S

log = logging.getLogger("heliosfs.tiers")

T = TypeVar("T")

QUARANTINED: Final = 8
"""At most one in so many bytes of a tier's limit is kept in quarantine."""

SCAN_S: Final = 60.0
"""How often every file is measured, in seconds."""

RETRY_S: Final = 15.0
"""A blob that would have to push out others is refused without a new look for this long, in seconds."""

CHUNK_SLACK: Final = 16 << 10
"""Bytes of a chunk's room beyond its length: blocks that it shares, its place in the journal."""

MOVING: Final = ".moving"
"""Appended to a blob's name: what a copy of it that is under way is kept as."""


class Tier(Measured):
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
        super().__init__(name, Policy(bounds, history), limiter, metrics, events)
        self.root, self._beside = root, beside
        self._places: Places
        self._now, self._metrics, self._events = history.clock, metrics, events
        self._looks = trio.CapacityLimiter(1)
        self._refused: dict[str, tuple[float, Answer]] = {}
        self._silent: TierDirectory | None = None
        """One that hangs, until its calls have come back."""
        self._seen: Disk | None = None
        """The filesystem's room, as it was when it last answered."""
        metrics.cache_used.labels(name).set_function(lambda: self.policy.used)
        metrics.cache_reserved.labels(name).set_function(lambda: self.policy.reserved)
        metrics.cache_limit.labels(name).set(bounds.limit or 0)
        metrics.cache_up.labels(name).set_function(lambda: self.health.writable)
        try:
            self._take(*_taken(name, root, beside, True))
            self._seen = self.disk()
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
                await self._look(nursery)
                if self._now() - scanned >= SCAN_S and self.directory is not None:
                    scanned = self._now()
                    nursery.start_soon(self.scan)
        finally:
            self._nursery = None

    def held(self, sha256: str) -> tuple[int, int | None, bool]:
        """See TierDirectory.held; of a partial blob, where the disk may take long, the room that it takes."""
        assert self.directory is not None
        if self.directory.prompt:
            return self.directory.held(sha256)
        size, entry = self.directory.whole_bytes(sha256), self.policy.entries.get(sha256)
        if size is not None:
            return size, size, True
        return (entry.cost, entry.size, False) if entry is not None else (0, None, False)

    def usage(self, directory: TierDirectory) -> TierUsage:
        """What is here now: counted, where the disk may take long to say."""
        disk = self._seen
        if directory.prompt or disk is None:
            return directory.usage()
        parts = [entry.cost for entry in self.policy.entries.values() if not entry.whole]
        whole, size = directory.counted()
        return TierUsage(whole, size, len(parts), sum(parts), disk.free, disk.total)

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

    @property
    def silent(self) -> bool:
        """Whether its disk hangs."""
        return self._silent is not None

    def has(self, local: LocalBlob) -> bool:
        """Whether the blob's files are here, or would be."""
        return self.directory is not None and local.places is self.directory

    def lead(self, local: LocalBlob) -> bool:
        """Have the blob's files made here, if they are not here; returns whether that is so now."""
        return self.directory is not None and local.go_to(self.directory)

    def busy(self, sha256: str) -> bool:
        """Whether the blob is being removed, or given its name."""
        return self.directory is not None and sha256 in self._remover.busy

    # --- room ---

    def ask(self, key: str, size: int, need: int, group: str = "", group_need: int = 0, blob: str = "") -> Answer:
        """See ``Policy.ask``. What has to go begins to."""
        if not self.health.writable or self.directory is None:
            return Answer(Verdict.TOO_LARGE)
        disk = self._room_now(self.directory)
        if disk is None:
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
        disk = self._room_now(self.directory)
        return disk is not None and need <= self.policy.room(disk)

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
            return self.policy.split(ticket, count + CHUNK_SLACK)
        disk = self._room_now(self.directory)
        if disk is None:
            return Reservation(0)  # writing will say what is wrong
        return self.policy.borrow(count + CHUNK_SLACK, disk)

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
                if error.errno == errno.ETIMEDOUT:
                    self._silent = self.directory
                    self._silent.give_up()
                else:
                    self.directory.close()  # so that its filesystem can be unmounted and repaired
                self.directory = self._remover.directory = None
            for key in [key for key in self.policy.entries if not self.policy.holds(key)]:
                self.policy.drop(key)
            self._set_aside(-self._aside)
        self._events.lost()

    async def _look(self, nursery: trio.Nursery) -> None:
        """Nothing that may hang is waited for here: what the tier is worth is found out by the next look."""
        directory, seen = self.directory, None
        try:
            if directory is None:
                if self.health.due(self._now()) and await self._answers_again():
                    await self._look_again()
                    directory = self.directory
            elif await self._ask_shortly(directory, directory.check) is False:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))
            elif self.health.due(self._now()) and await self._ask_shortly(directory, directory.try_writing):
                self._works()
            if directory is not None and self.health.writable:
                seen = await self._ask_shortly(directory, directory.disk)
        except OSError as error:
            if self.directory is directory:
                self.failed(error)
        for key in self._remover.look_at_open_files():
            nursery.start_soon(self.measure, key)
        if seen is not None and self.health.writable:
            self._seen = seen
            self.remove(self.policy.trim(seen), "bounds", Evicted())

    async def _ask_shortly(self, directory: TierDirectory, call: Callable[[], T]) -> T | None:
        """In a thread, for a moment; None where it takes longer, and no other question is under way meanwhile.

        Raises OSError, also when any call to the disk hangs.
        """
        answer = None
        if self._looks.available_tokens:
            with trio.move_on_after(HANG_S):
                answer = await trio.to_thread.run_sync(call, abandon_on_cancel=True, limiter=self._looks)
        if directory.asked.longest() >= HANG_S:
            raise OSError(errno.ETIMEDOUT, "it does not answer")
        return answer

    async def _answers_again(self) -> bool:
        """Whether a disk that hung has answered whatever it was asked; then it is given up for good."""
        if self._silent is None:
            return True
        if not self._silent.asked.idle:
            return False
        await trio.to_thread.run_sync(self._silent.close, abandon_on_cancel=True, limiter=self._looks)
        self._silent = None
        return True

    def _room_now(self, directory: TierDirectory) -> Disk | None:
        """The filesystem's room; what was seen last where asking may take long. None where it fails."""
        if not directory.prompt:
            return self._seen
        try:
            return directory.disk()
        except OSError:
            return None

    async def _look_again(self) -> None:
        """Take the directory if it has come back: one that was a tier before, never an empty one made in its place."""
        try:
            take = partial(_taken, self.name, self.root, self._beside, False)
            taken = await trio.to_thread.run_sync(take, abandon_on_cancel=True, limiter=self._looks)
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
