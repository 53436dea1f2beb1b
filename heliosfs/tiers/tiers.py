"""The local tiers of a node: where a blob is, where one goes that comes, what moves between them.

``l1`` is the faster directory and always there; ``l2`` is another one, on another disk, if there is one. A blob's files
are in one of them; a whole blob is in both only while it moves. New blobs go to L1 while it has room, then to L2, whose
policy makes room at once; only what that refuses pushes others out of L1. What is used again in L2 is copied to L1 in
the background, one blob at a time (mover.py), and what L1 pushes out goes down to L2 if that takes it in. Who has a
blob open keeps the files that were opened; the next opening takes L1's.

All methods run on the trio loop.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

import trio

from helios.config import MountSettings
from helios.errors import UsageError
from helios.metrics import MountMetrics
from heliosfs.store.recipe import Recipe
from heliosfs.tiers.behind import Behind
from heliosfs.tiers.beside import Beside
from heliosfs.tiers.directory import TierUsage
from heliosfs.tiers.doubt import settle
from heliosfs.tiers.history import MAX_USES, History
from heliosfs.tiers.keeping import KeepingFiles, Uses
from heliosfs.tiers.local import Loaded, LocalBlob
from heliosfs.tiers.measuring import LOOK_S
from heliosfs.tiers.mover import Mover
from heliosfs.tiers.pins import Pins
from heliosfs.tiers.places import Places
from heliosfs.tiers.policy import Answer, Bounds, Priority, Reservation, Verdict
from heliosfs.tiers.removing import Events, Evicted
from heliosfs.tiers.silence import HANG_S
from heliosfs.tiers.tier import Tier

log = logging.getLogger("heliosfs.tiers")

T = TypeVar("T")

SAVE_S: Final = 60.0
"""How often uses are saved, in seconds."""

DISK_THREADS: Final = 4
"""Calls to a tier's disk at a time; a slow one must not keep the other waiting."""

OPENERS: Final = 8
"""Files that are looked for at a time."""


class Tiers:
    """One or two tiers. ``made_room`` is called when something has gone, ``lost`` when a tier takes nothing now."""

    def __init__(
        self,
        root: Path,
        second: Path | None,
        settings: MountSettings,
        metrics: MountMetrics,
        clock: Callable[[], float],
        *,
        beside: Path | None,
        made_room: Callable[[], None],
        lost: Callable[[], None],
    ) -> None:
        """Take the directories. Raises HeliosError; an L2 that is not there is taken when it is."""
        if second is not None and (second == root or second in root.parents or root in second.parents):
            raise UsageError(
                f"the tiers {root} and {second} lie in each other", hint="Give mount.l2 a directory on another disk."
            )
        self._clock, self._made_room, self._lost = clock, made_room, lost
        self._started: float | None = None
        self._before = 0.0
        self.history = History(self.now)
        self._limiter = trio.CapacityLimiter(1)
        self._locals: dict[str, list[LocalBlob]] = {}
        """What is in use by sha256: one for each size and recipe that it is said to have."""
        self._broken: dict[str, Tier] = {}
        """Where the whole file of a blob that is open could not be read."""
        self._loans: dict[Reservation, tuple[Tier, str]] = {}
        self._moved = trio.Event()
        self._waiting: dict[trio.CancelScope, Places | None] = {}
        """What waits for a disk: for this one, or for whichever has a blob."""
        self._askers = trio.CapacityLimiter(OPENERS)
        self._beside, self._behind = Beside(), Behind()
        self.l2: Tier | None = None
        self._mover: Mover | None = None
        bounds, events = bounds_of(settings, "l1"), self._events("l1")
        threads = trio.CapacityLimiter(DISK_THREADS)
        self.l1 = Tier("l1", root, bounds, self.history, threads, metrics, events, beside=beside)
        try:
            if second is not None:
                threads = trio.CapacityLimiter(DISK_THREADS)
                bounds, events = bounds_of(settings, "l2"), self._events("l2")
                self.l2 = Tier("l2", second, bounds, self.history, threads, metrics, events, needed=False)
                self._mover = Mover(self.l1, self.l2, metrics, self.moved)
            self._files = KeepingFiles(root)
            uses = self._files.load_uses()
            self._before = uses.clock
            self.history.uses.update(sorted(uses.taken().items(), key=lambda item: item[1].last))
            self.pins = Pins(self._files, self.classify)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give the directories up."""
        for tier in self.all():
            tier.close()

    def all(self) -> list[Tier]:
        """The tiers, the faster one first."""
        return [self.l1] if self.l2 is None else [self.l1, self.l2]

    def now(self) -> float:
        """Seconds that these tiers have been in use, over all their runs: no jump of a clock changes it."""
        return self._before if self._started is None else self._before + self._clock() - self._started

    async def run(self, nursery: trio.Nursery) -> None:
        """Remove, look, move and save until cancelled."""
        self._started = self._clock()
        for tier in self.all():
            nursery.start_soon(tier.run, nursery)
        if self._mover is not None:
            nursery.start_soon(self._mover.run)
        while True:
            await trio.sleep(SAVE_S)
            await self.save()

    def halt(self, halted: bool) -> None:
        """Bring nothing up from L2, or do it again. What has to leave L1 for want of room still goes down."""
        if self._mover is not None:
            self._mover.halted = halted

    @property
    def copying(self) -> int:
        """Blobs that are copied from one tier to the other now."""
        return 0 if self._mover is None else self._mover.copying

    async def save(self) -> None:
        """Keep what is known of uses; a disk that does not take it costs a line in the log."""
        kept = list(self.history.uses.items())[-MAX_USES:]
        blobs = {key: (use.weight, use.hits, use.last, use.counted) for key, use in kept}
        uses = Uses(self.now(), blobs)
        try:
            await trio.to_thread.run_sync(self._files.save_uses, uses, abandon_on_cancel=True, limiter=self._limiter)
        except OSError as error:
            log.info("how often blobs were used can't be kept", extra={"reason": error.strerror})

    # --- blobs come and go ---

    def blob(self, sha256: str, size: int) -> LocalBlob:
        """One blob's files, held until ``closed``; nothing is touched until they are loaded from ``places``."""
        local = LocalBlob(self.l1.places, sha256, size)
        self._locals.setdefault(sha256, []).append(local)
        for tier in self.all():
            tier.hold(sha256)
        return local

    def instead(self, local: LocalBlob, *, broken: bool = False) -> LocalBlob:
        """Other files for the blob, which is open, in place of wrong ones, which are the caller's to close.

        ``broken``: they can't be read and are removed when nobody has them open.
        """
        tier = self._of(local)
        if broken and tier is not None:
            self._broken[local.sha256] = tier
        fresh, claims = LocalBlob(self.l1.places, local.sha256, local.size), self._locals[local.sha256]
        claims[claims.index(local)] = fresh
        return fresh

    def instead_of_late(self, local: LocalBlob) -> LocalBlob:
        """Other files for the blob, which is open, in place of those that nobody waits for ``find`` to open."""
        self._behind.leave(local)
        return self.instead(local)

    def places(self) -> list[Places]:
        """Where blobs may be found, the best place first."""
        return [tier.directory for tier in self.all() if tier.directory is not None and tier.health.readable]

    def used(self, sha256: str, group: str) -> None:
        """The blob, which is held, was opened for the model ``group``."""
        self.l1.policy.use(sha256, group)
        if self.l2 is not None:
            self.l2.policy.belongs(sha256, group)

    def busy(self, sha256: str) -> bool:
        """Whether the blob is being removed or given its name somewhere."""
        return any(tier.busy(sha256) for tier in self.all())

    async def settled(self, sha256: str) -> None:
        """Wait while the blob, which is held, is being removed or given its name somewhere."""
        for tier in self.all():
            await tier.settled(sha256)

    async def find(self, local: LocalBlob, recipe_digest: str) -> Loaded | None:
        """Open what the disks have of the blob, which is held. None when a tier went away meanwhile: then, and when it
        is cancelled, its thread is left behind and these files are to be replaced (``instead_of_late``). ``doubted`` in
        what was found: the whole file there is right, and the blob's size is wrong."""
        places = self.places()

        async def look() -> Loaded:
            await self.settled(local.sha256)
            await self._behind.through(local.sha256)
            while True:
                found = await trio.to_thread.run_sync(
                    local.load, recipe_digest, *places, abandon_on_cancel=True, limiter=self._askers
                )
                if found.doubted is None or await self._stays(found, found.doubted, local):
                    return found

        return await self._until_lost(look)

    async def adopt(self, local: LocalBlob, recipe: Recipe) -> bool:
        """Link the store's object, see ``LocalBlob.adopt``; False also when its disk hangs: then, and only then, the
        thread is left behind, since on a tier that goes on it would meet files that take the place of these."""
        if local.places.silent or not await self._beside.has(local.sha256, local.places):
            return False
        threads = local.places.threads
        link = partial(trio.to_thread.run_sync, local.adopt, recipe, abandon_on_cancel=True, limiter=threads)
        return bool(await self._until_lost(link, local.places))

    def loaded(self, local: LocalBlob) -> None:
        """The blob's files were opened, or there are none."""
        tier = self._of(local)
        shared = any(other.fd >= 0 for other in self._locals[local.sha256] if other is not local)
        if tier is not None and (local.fd >= 0 or not shared):
            tier.loaded(local)

    def grew(self, local: LocalBlob, loan: Reservation | None) -> None:
        """Something was written for the blob, which is open, with this loan."""
        tier = self._of(local)
        if tier is not None:
            tier.grew(local, loan if loan is not None and self._loans.get(loan, (tier,))[0] is tier else None)

    def closed(self, local: LocalBlob) -> None:
        """The blob is not in use any more: close its files. Its room is measured when that is done."""
        claims = self._locals[local.sha256]
        claims.remove(local)
        if not claims:
            del self._locals[local.sha256]
        home = self._of(local)
        broken = self._broken.pop(local.sha256, None)
        for tier in self.all():
            if tier is home:
                tier.closed(local)
            else:
                tier.let_go(local.sha256)
        if home is None:
            local.let_go()
        if broken is not None and (broken is not home or not local.whole):
            broken.remove(broken.policy.leave([local.sha256]), "damaged", Evicted())

    def failed(self, local: LocalBlob, error: OSError) -> bool:
        """The blob's disk refused something; whether that concerns its tier alone, which is left alone now."""
        if self.l2 is None:
            return False
        tier = self._of(local)
        if tier is not None:
            tier.failed(error)
        return True

    def writable(self, local: LocalBlob) -> bool:
        """Whether something may be written for the blob."""
        tier = self._of(local)
        return tier is not None and tier.health.writable

    def held(self, sha256: str) -> tuple[str, int, int | None, bool]:
        """Of a blob that nobody has open: its tier, bytes that are here, its size if known, whether it is whole."""
        best: tuple[str, int, int | None, bool] = ("remote", 0, None, False)
        for tier in self.all():
            if tier.directory is not None and tier.health.readable:
                try:
                    local, size, whole = tier.held(sha256)
                except OSError:
                    continue  # the next look at the tier says what is wrong
                if whole:
                    return tier.name, local, size, True
                if local > best[1]:
                    best = (tier.name, local, size, False)
        return best

    # --- room ---

    def ask(self, local: LocalBlob, need: int, group: str, group_need: int) -> Answer:
        """See ``Policy.ask``. What has to go begins to; files that are not made yet go where there is room."""
        sha256, size, refusal = local.sha256, local.size, Answer(Verdict.TOO_LARGE)
        for tier in self._choices(local, need):
            answer = tier.ask(sha256, size, need, group, group_need)
            if answer.verdict in (Verdict.GRANTED, Verdict.WAIT) and tier.lead(local):
                for other in self.all():
                    if other is not tier:
                        other.end(sha256)
                return answer
            tier.policy.end(sha256)
            if answer.verdict is Verdict.NOT_WORTH:
                refusal = answer
        return refusal

    def usage(self) -> dict[str, TierUsage]:
        """What the tiers that are there hold now, by name."""
        found = {}
        for tier in self.all():
            if tier.directory is not None and tier.health.readable:
                with contextlib.suppress(OSError):  # the next look at the tier says what is wrong
                    found[tier.name] = tier.usage(tier.directory)
        return found

    def missing(self, sha256: str, size: int) -> int:
        """About how many bytes of room the rest of a blob takes that nobody has open."""
        entries = [entry for tier in self.all() if (entry := tier.policy.entries.get(sha256)) is not None]
        return min((max(0, size - entry.cost) if entry.cost else 0 for entry in entries), default=size)

    def end(self, sha256: str) -> None:
        """No room is wanted for the blob any more."""
        for tier in self.all():
            tier.end(sha256)

    def lend(self, local: LocalBlob, count: int) -> Reservation | None:
        """Room for chunks of ``count`` bytes that are about to be fetched; None: they can't be kept."""
        if local.sealed:
            return Reservation(0)
        tier = self._of(local)
        loan = None if tier is None else tier.lend(local, count)
        if tier is not None and loan is not None:
            self._loans[loan] = (tier, local.sha256)
        return loan

    def give_back(self, loan: Reservation) -> None:
        """Nothing more will be written with it."""
        tier, _ = self._loans.pop(loan, (self.l1, ""))
        tier.policy.close(loan)

    def refusal(self, sha256: str) -> str:
        """Why the blob was not let in when it was last asked for; empty where it was."""
        return next((found for tier in self.all() if (found := tier.refusal(sha256))), "")

    def waits(self, sha256: str) -> bool:
        """Whether others are going for the blob."""
        return any(tier.policy.waiting(sha256) for tier in self.all())

    async def moved(self) -> None:
        """Wait until something was removed, for a second at most."""
        with trio.move_on_after(LOOK_S):
            await self._moved.wait()

    # --- wishes from outside ---

    async def evict(self, keys: Iterable[str]) -> Evicted:
        """Remove these blobs but for those that are pinned or in use; returns when it is done."""
        result, wanted = Evicted(), list(keys)
        removals = []
        for tier in self.all():
            victims, kept = tier.policy.choose(wanted)
            result.kept |= kept
            removals += tier.remove(victims, "asked", result)
        for removal in removals:
            await removal.done.wait()
        return result

    def classify(self, classes: Mapping[str, Priority]) -> None:
        """See ``Policy.classify``."""
        for tier in self.all():
            tier.policy.classify(classes)
            tier.reconsider()

    # --- inside ---

    async def _until_lost(self, call: Callable[[], Awaitable[T]], places: Places | None = None) -> T | None:
        """What waits for disks, until a tier takes nothing any more: then None. With ``places`` until that one hangs,
        whoever else gives up, and where nobody looks after it any more until it must hang."""
        late = math.inf if places is None else trio.current_time() + 2 * HANG_S
        with trio.CancelScope(shield=places is not None, deadline=late) as scope:
            if places is not None and places.silent:
                scope.cancel()
            self._waiting[scope] = places
            try:
                return await call()
            finally:
                del self._waiting[scope]
        return None

    async def _stays(self, found: Loaded, places: Places, local: LocalBlob) -> bool:
        """Whether the whole file that was found is right and has another size, or can't be looked at; else it is gone,
        or was seen to be this blob."""
        try:
            right = await trio.to_thread.run_sync(
                settle, places, local.sha256, abandon_on_cancel=True, limiter=self._askers
            )
            return right and found.size != local.size
        except OSError as error:
            found.failed.append((places, error))
            found.doubted = None
            return True

    def _of(self, local: LocalBlob) -> Tier | None:
        """The tier in whose directory the blob's files are; None when that is not a tier's any more."""
        return next((tier for tier in self.all() if tier.has(local)), None)

    def _choices(self, local: LocalBlob, need: int) -> list[Tier]:
        """Where the blob may go, in the order to ask: L1 comes last when others would have to leave it first, since
        those would have to be copied, and a reader does not wait for that."""
        found = [tier for tier in self.all() if self._may_go(local, tier)]
        if len(found) > 1 and not (self.l1.has_room(need) or self.l1.policy.wants(local.sha256)):
            found.reverse()
        return found

    def _may_go(self, local: LocalBlob, tier: Tier) -> bool:
        """Whether the blob's files are in this tier, or can still be made there."""
        if tier.has(local):
            return True
        return local.fd < 0 and all(sha256 != local.sha256 for _, sha256 in self._loans.values())

    def _events(self, name: str) -> Events:
        return Events(self._went, self._gone_away, self._save_blob if name == "l1" else _goes)

    def _gone_away(self) -> None:
        """A tier takes nothing now, or hangs: nobody waits for it, nor for threads that do."""
        self._askers = trio.CapacityLimiter(OPENERS)
        for scope, places in self._waiting.items():
            if places is None or places.silent:
                scope.cancel()
        for loan, (tier, _) in list(self._loans.items()):
            if tier.silent:  # who has it may wait for the disk as long as that hangs, and its blob is made elsewhere
                self.give_back(loan)
        self._lost()

    async def _save_blob(self, key: str) -> None:
        if self._mover is not None:
            await self._mover.down(key)

    def _went(self) -> None:
        moved, self._moved = self._moved, trio.Event()
        moved.set()
        self._made_room()


async def _goes(_: str) -> None:
    """Nobody takes in what the last tier pushes out."""


def bounds_of(settings: MountSettings, tier: str) -> Bounds:
    """A tier's bounds. Raises UsageError."""
    names = ("cache_limit_gib", "cache_min_free") if tier == "l1" else ("l2_limit_gib", "l2_min_free")
    limit_gib, min_free = (float(getattr(settings, name)) for name in names)
    if limit_gib < 0 or not 0 <= min_free < 1:
        raise UsageError(
            f"mount.{names[0]} is {limit_gib:g} and mount.{names[1]} {min_free:g}",
            hint="The limit is 0 (none) or more, the share that stays free at least 0 and less than 1.",
        )
    return Bounds(int(limit_gib * (1 << 30)) or None, min_free)
