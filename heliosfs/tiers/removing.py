"""Removing blobs from a tier: in order, one at a time, and nothing that anybody has open.

A blob is looked at and marked as leaving without a wait in between; whoever opens it then waits until it is gone, or
keeps it when its removal has not begun. What another process, or the kernel, has open is not removed: that would free
nothing. Who opens a file in the very moment of its removal keeps it; it counts as used until its last descriptor goes.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

import trio

from helios.metrics import MountMetrics
from heliosfs.tiers.directory import Busy, TierDirectory
from heliosfs.tiers.leases import open_elsewhere
from heliosfs.tiers.looks import Looks
from heliosfs.tiers.policy import Policy

log = logging.getLogger("heliosfs.tiers")

GONE: Final = ".gone"
"""Appended to a blob's name: what a removed file that is still open is kept as."""

SAVED: Final = frozenset({"room", "bounds"})
"""Reasons to remove a blob for which another tier may want it."""


@dataclass(slots=True)
class Evicted:
    """What came of a wish to remove blobs: which went, the bytes that this freed, of the others the reason."""

    gone: set[str] = field(default_factory=set)
    freed: int = 0
    kept: dict[str, str] = field(default_factory=dict)

    @property
    def removed(self) -> int:
        """How many went."""
        return len(self.gone)


@dataclass(slots=True, eq=False)
class Removal:
    key: str
    reason: str
    result: Evicted
    done: trio.Event = field(default_factory=trio.Event)


@dataclass(frozen=True, slots=True)
class Events:
    """Whom a tier tells: ``went``, when something has gone; ``lost``, when nothing can be written any more; ``save``,
    before a blob goes for want of room."""

    went: Callable[[], None]
    lost: Callable[[], None]
    save: Callable[[str], Awaitable[None]]


class Remover:
    """Removes what a policy marked as leaving, and tells ``looks`` of what it touches."""

    def __init__(
        self,
        name: str,
        policy: Policy,
        limiter: trio.CapacityLimiter,
        metrics: MountMetrics,
        events: Events,
        looks: Looks,
    ) -> None:
        self._name, self._policy, self._limiter, self._metrics = name, policy, limiter, metrics
        self._events, self._looking = events, looks
        self.directory: TierDirectory | None = None
        """Where the files are; None while it is away."""
        self.busy: dict[str, trio.Event] = {}
        """Blobs whose names are being changed: who opens one waits for the event."""
        self._queue: deque[Removal] = deque()
        self._wake = trio.Event()
        self._ghosts: dict[str, int] = {}
        """Descriptors of removed files that somebody has open."""
        self._open_by_others: set[str] = set()
        self._failing = False

    def close(self) -> None:
        """Watch removed files no more."""
        for fd in self._ghosts.values():
            os.close(fd)
        self._ghosts.clear()

    def enqueue(self, keys: Iterable[str], reason: str, result: Evicted) -> list[Removal]:
        """Marked blobs are to go; each removal's ``done`` is set when it is over."""
        removals = [Removal(key, reason, result) for key in keys]
        self._queue.extend(removals)
        if removals:
            self._wake.set()
        return removals

    @contextmanager
    def at(self, key: str) -> Iterator[None]:
        """The blob's names are being changed: who looked before that is over may have seen either."""
        done = self.busy[key] = trio.Event()
        self._looking.touch(key)
        try:
            yield
        finally:
            del self.busy[key]
            done.set()

    async def run(self) -> None:
        """Remove until cancelled."""
        while True:
            while not self._queue:
                self._wake = trio.Event()
                await self._wake.wait()
            removal = self._queue.popleft()
            try:
                await self._remove_one(removal)
            finally:
                removal.done.set()
            self._events.went()

    async def _remove_one(self, removal: Removal) -> None:
        key, policy = removal.key, self._policy
        if self._stays(removal):
            return
        if removal.reason in SAVED:
            await self._events.save(key)
            if self._stays(removal):
                return
        directory = self.directory
        if directory is None:
            policy.ended(key, gone=False)
            return
        entry = policy.entries[key]
        try:
            with self.at(key):
                ghost = await trio.to_thread.run_sync(directory.remove, key, limiter=self._limiter)
        except Busy:
            policy.ended(key, gone=False)
            self._open_by_others.add(key)
            removal.result.kept[key] = "in use"
            return
        except OSError as error:
            policy.ended(key, gone=False)
            removal.result.kept[key] = f"it can't be removed: {error.strerror}"
            if not self._failing:
                log.warning("a cached blob can't be removed", extra={"blob": key, "reason": error.strerror})
            self._failing = True
            return
        self._failing = False
        freed = entry.cost
        policy.ended(key, gone=True)
        if ghost >= 0:
            self._ghosts[key + GONE] = ghost
            policy.hold(key + GONE)
            policy.put(key + GONE, entry.size, freed)
        removal.result.gone.add(key)
        removal.result.freed += freed
        self._metrics.evictions.labels(self._name, removal.reason).inc()
        self._metrics.evicted_bytes.labels(self._name, removal.reason).inc(freed)
        fields = {"tier": self._name, "blob": key, "bytes": freed, "reason": removal.reason}
        log.info("evicted", extra=fields)

    def _stays(self, removal: Removal) -> bool:
        """Whether a blob that was to go has gone already, or was opened meanwhile."""
        entry = self._policy.entries.get(removal.key)
        if entry is None or not entry.leaving:
            return True
        if self._policy.holds(removal.key):
            self._policy.ended(removal.key, gone=False)
            removal.result.kept[removal.key] = "in use"
            return True
        return False

    def look_at_open_files(self) -> set[str]:
        """Removed files that somebody had open take room until the last descriptor goes.

        Returns blobs that could not be removed because somebody had them open, once: they are to be measured again.
        """
        for name, fd in list(self._ghosts.items()):
            if not open_elsewhere(fd):
                del self._ghosts[name]
                os.close(fd)
                self._policy.drop(name)
                self._policy.let_go(name)
                self._events.went()
        keys, self._open_by_others = self._open_by_others, set()
        return keys
