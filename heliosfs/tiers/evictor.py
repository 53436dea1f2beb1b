"""The policy's hands: what the local tier's disk really holds, and the removal of what must go.

All methods run on the trio loop, which alone touches the policy; disk work is done in threads, one removal at a time.
A blob is looked at and marked as leaving without a wait in between; whoever opens it then waits until it is gone
(``settled``), or keeps it when its removal has not begun.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, TypeVar

import trio

from helios.metrics import MountMetrics
from heliosfs.tiers.keeping import KeepingFiles, Uses
from heliosfs.tiers.l1 import L1, Found
from heliosfs.tiers.local import LocalBlob
from heliosfs.tiers.pins import Pins
from heliosfs.tiers.policy import MAX_USES, Answer, Bounds, Policy, Priority, Reservation, Verdict

log = logging.getLogger("heliosfs.tiers")

T = TypeVar("T")

LOOK_S: Final = 1.0
SCAN_S: Final = 60.0
SAVE_S: Final = 60.0
"""How often bounds are looked at, every file is measured, and uses are saved, in seconds."""

RETRY_S: Final = 15.0
"""A blob that would have to push out others is refused without a new look for this long, in seconds."""

CHUNK_SLACK: Final = 16 << 10
"""Bytes of a chunk's room beyond its length: blocks that it shares, its place in the journal."""


@dataclass(slots=True)
class Evicted:
    """What came of a wish to remove blobs: how many went, the bytes that this freed, of the others the reason."""

    removed: int = 0
    freed: int = 0
    kept: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class _Removal:
    key: str
    reason: str
    result: Evicted
    done: trio.Event = field(default_factory=trio.Event)


class Evictor:
    """Keeps one local tier within its bounds. ``made_room`` is called when something has gone."""

    def __init__(
        self,
        l1: L1,
        bounds: Bounds,
        limiter: trio.CapacityLimiter,
        metrics: MountMetrics,
        clock: Callable[[], float],
        *,
        made_room: Callable[[], None],
    ) -> None:
        self._l1, self._limiter, self._made_room = l1, limiter, made_room
        self._files = KeepingFiles(l1.root)
        self._metrics = metrics
        uses = self._files.load_uses()
        self._clock, self._before = clock, uses.clock
        self._started: float | None = None
        self.policy = Policy(bounds, self.now)
        self.policy.uses.update(sorted(uses.taken().items(), key=lambda item: item[1].last))
        for key, found in l1.scan().items():
            self.policy.put(key, found.size, found.cost)
        self.policy.count(l1.quarantine.usage()[1])
        self._refused: dict[str, tuple[float, Answer]] = {}
        self.pins = Pins(self._files, self.classify)
        self._changed: set[str] = set()
        self._grown: set[str] = set()
        self._queue: deque[_Removal] = deque()
        self._removing: _Removal | None = None
        self._wake = trio.Event()
        self._moved = trio.Event()
        self._nursery: trio.Nursery | None = None
        self._failing = False
        metrics.cache_used.set_function(lambda: self.policy.used)
        metrics.cache_reserved.set_function(lambda: self.policy.reserved)
        metrics.cache_limit.set(bounds.limit or 0)

    def now(self) -> float:
        """Seconds that this tier has been in use, over all its runs: no jump of a clock changes it."""
        if self._started is None:
            self._started = self._clock()
        return self._before + self._clock() - self._started

    async def run(self, nursery: trio.Nursery) -> None:
        """Remove, look and save until cancelled."""
        self._nursery = nursery
        nursery.start_soon(self._remove)
        scanned = saved = self.now()
        try:
            while True:
                await trio.sleep(LOOK_S)
                disk = await self._ask_disk(self._l1.disk)
                if disk is not None:
                    self._enqueue(self.policy.trim(disk), "bounds", Evicted())
                if self.now() - scanned >= SCAN_S:
                    await self.scan()
                    scanned = self.now()
                if self.now() - saved >= SAVE_S:
                    await self.save()
                    saved = self.now()
        finally:
            self._nursery = None

    # --- blobs come and go ---

    def hold(self, sha256: str) -> None:
        """The blob is in use from now on."""
        self.policy.hold(sha256)
        self._changed.add(sha256)

    def used(self, sha256: str, group: str) -> None:
        """The blob, which is held, was opened for the model ``group``."""
        self.policy.use(sha256, group)

    async def settled(self, sha256: str) -> None:
        """Wait while the blob, which is held, is being removed. One that only was to be removed stays."""
        if self._removing is not None and self._removing.key == sha256:
            await self._removing.done.wait()

    def loaded(self, local: LocalBlob) -> None:
        """The blob's files were opened, or there are none."""
        self._changed.add(local.sha256)
        if local.fd < 0:
            self.policy.drop(local.sha256)
        else:
            self.policy.put(local.sha256, local.size, local.cost)

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
            grown = self.policy.put(sha256, local.size, cost)
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

    def ask(self, sha256: str, size: int, need: int, group: str, group_need: int) -> Answer:
        """See ``Policy.ask``. What has to go begins to."""
        try:
            disk = self._l1.disk()
        except OSError:
            return Answer(Verdict.TOO_LARGE)  # the directory is gone; reads find out what that means for them
        policy, now = self.policy, self.now()
        until, answer = self._refused.get(sha256, (0.0, None))
        if answer is not None and now < until and need > policy.room(disk):
            return answer
        answer = policy.ask(sha256, size, need, disk, group, group_need)
        if answer.verdict in (Verdict.TOO_LARGE, Verdict.NOT_WORTH):
            self._refused[sha256] = (now + RETRY_S, answer)
        else:
            self._refused.pop(sha256, None)
        self._enqueue(answer.victims, "room", Evicted())
        return answer

    def missing(self, sha256: str, size: int) -> int:
        """About how many bytes of room the rest of a blob takes that nobody has open."""
        entry = self.policy.entries.get(sha256)
        if entry is None:
            return size
        return max(0, size - entry.cost) if entry.cost else 0

    def end(self, sha256: str) -> None:
        """No room is wanted for the blob any more."""
        self._refused.pop(sha256, None)
        self.policy.end(sha256)

    def lend(self, local: LocalBlob, count: int) -> Reservation | None:
        """Room for chunks of ``count`` bytes that are about to be fetched; None: they can't be kept."""
        if local.sealed:
            return Reservation(0)
        ticket = self.policy.ticket(local.sha256)
        if ticket is not None:
            return self.policy.split(ticket, count)
        try:
            return self.policy.borrow(count + CHUNK_SLACK, self._l1.disk())
        except OSError:
            return Reservation(0)  # writing will say what is wrong

    def give_back(self, loan: Reservation) -> None:
        """Nothing more will be written with it."""
        self.policy.close(loan)

    def waits(self, sha256: str) -> bool:
        """Whether others are going for the blob."""
        return self.policy.waiting(sha256)

    async def moved(self) -> None:
        """Wait until something was removed, for a second at most."""
        with trio.move_on_after(LOOK_S):
            await self._moved.wait()

    # --- wishes from outside ---

    async def evict(self, keys: Iterable[str]) -> Evicted:
        """Remove these blobs but for those that are pinned or in use; returns when it is done."""
        result = Evicted()
        victims, result.kept = self.policy.choose(keys)
        for removal in self._enqueue(victims, "asked", result):
            await removal.done.wait()
        return result

    async def discard(self, sha256: str) -> bool:
        """Remove a blob that is wrong, pinned or not; False where it is in use. Returns when it is done."""
        if not self.policy.condemn(sha256):
            return self.policy.holds(sha256) == 0
        result = Evicted()
        for removal in self._enqueue([sha256], "damaged", result):
            await removal.done.wait()
        return not result.kept

    def taken_away(self, sha256: str, grown: int) -> None:
        """The whole file of a blob is gone; what was put aside takes ``grown`` bytes more."""
        self._changed.add(sha256)
        self.policy.drop(sha256)
        self.policy.count(grown)

    async def measure(self, sha256: str) -> None:
        """Something beside a blob that nobody holds was written."""
        self._changed.discard(sha256)
        found = await self._ask_disk(lambda: _Measured(self._l1.measure(sha256)))
        if found is not None and sha256 not in self._changed and not self.policy.holds(sha256):
            self._take(sha256, found.found)

    def refusal(self, sha256: str) -> str:
        """Why the blob was not let in when it was last asked for; empty where it was."""
        _, answer = self._refused.get(sha256, (0.0, None))
        return "" if answer is None else answer.verdict.value

    def disk(self) -> dict[str, int]:
        """The filesystem's free and total bytes. Blocks."""
        disk = self._l1.disk()
        return {"free": disk.free, "total": disk.total}

    def classify(self, classes: Mapping[str, Priority]) -> None:
        """See ``Policy.classify``."""
        self.policy.classify(dict(classes))
        self._refused.clear()

    # --- inside ---

    def _enqueue(self, keys: Iterable[str], reason: str, result: Evicted) -> list[_Removal]:
        removals = [_Removal(key, reason, result) for key in keys]
        self._queue.extend(removals)
        if removals:
            self._wake.set()
        return removals

    async def _remove(self) -> None:
        while True:
            while not self._queue:
                self._wake = trio.Event()
                await self._wake.wait()
            removal = self._queue.popleft()
            try:
                await self._remove_one(removal)
            finally:
                self._removing = None
                removal.done.set()
            moved, self._moved = self._moved, trio.Event()
            moved.set()
            self._made_room()

    async def _remove_one(self, removal: _Removal) -> None:
        key, policy = removal.key, self.policy
        entry = policy.entries.get(key)
        if entry is None or not entry.leaving:
            return
        if policy.holds(key):  # opened meanwhile: it stays
            policy.ended(key, gone=False)
            removal.result.kept[key] = "in use"
            return
        self._removing = removal
        self._changed.add(key)
        freed = entry.cost
        try:
            await trio.to_thread.run_sync(self._l1.remove, key, limiter=self._limiter)
        except OSError as error:
            policy.ended(key, gone=False)
            removal.result.kept[key] = f"it can't be removed: {error.strerror}"
            if not self._failing:
                log.warning("a cached blob can't be removed", extra={"blob": key, "reason": error.strerror})
            self._failing = True
            return
        self._failing = False
        policy.ended(key, gone=True)
        removal.result.removed += 1
        removal.result.freed += freed
        self._metrics.evictions.labels(removal.reason).inc()
        self._metrics.evicted_bytes.labels(removal.reason).inc(freed)
        log.info("evicted", extra={"blob": key, "bytes": freed, "reason": removal.reason})

    async def _measure(self, local: LocalBlob) -> None:
        try:
            while True:
                if local.ended:  # else a call that was given up is still at it
                    break
                await trio.sleep(LOOK_S)
            found = await self._ask_disk(lambda: _Measured(self._l1.measure(local.sha256)))
            if found is not None and self.policy.holds(local.sha256) == 1:
                self._take(local.sha256, found.found)
        finally:
            self.policy.let_go(local.sha256)

    def _left(self, sha256: str) -> int | None:
        """What a blob takes that nobody has open but a thread that was given up."""
        try:
            found = self._l1.measure(sha256)
        except OSError:
            return None
        return None if found is None else found.cost

    async def scan(self) -> None:
        """Measure every file: some may have gone, or may have lost their other name."""
        self._changed.clear()
        found = await self._ask_disk(self._l1.scan)
        if found is None:
            return
        for key in found.keys() | self.policy.entries.keys():
            if key not in self._changed and not self.policy.holds(key):
                self._take(key, found.get(key))

    def _take(self, key: str, found: Found | None) -> None:
        if found is None:
            self.policy.drop(key)
        else:
            self.policy.put(key, found.size, found.cost)

    async def save(self) -> None:
        """Keep what is known of uses; a disk that does not take it costs a line in the log."""
        kept = list(self.policy.uses.items())[-MAX_USES:]
        blobs = {key: (use.weight, use.hits, use.last, use.counted) for key, use in kept}
        uses = Uses(self.now(), blobs)
        await self._ask_disk(lambda: self._files.save_uses(uses))

    async def _ask_disk(self, call: Callable[[], T]) -> T | None:
        """In a thread. None when the disk fails: it may come back."""
        try:
            return await trio.to_thread.run_sync(call, limiter=self._limiter)
        except OSError as error:
            log.info("the cache's disk can't be asked", extra={"reason": error.strerror})
            return None


@dataclass(frozen=True, slots=True)
class _Measured:
    found: Found | None
