"""What a tier's disk really holds: the policy is told what was measured, never what somebody thinks.

All methods run on the trio loop. A blob that is open is measured through its descriptor, one that was closed through
its name; every file is looked at now and then. What was opened, closed, written or removed while a thread looked at the
disk is left as the loop knows it (looks.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Final, TypeVar

import trio

from helios.metrics import MountMetrics
from heliosfs.tiers.directory import Found, TierDirectory
from heliosfs.tiers.health import Health
from heliosfs.tiers.local import LocalBlob
from heliosfs.tiers.looks import Looks
from heliosfs.tiers.policy import Policy, Reservation
from heliosfs.tiers.removing import Events, Remover

log = logging.getLogger("heliosfs.tiers")

T = TypeVar("T")

LOOK_S: Final = 1.0
"""How often bounds and the disk's health are looked at, in seconds."""


class Measured:
    """A tier's policy and directory, and what keeps the one in step with the other."""

    def __init__(
        self, name: str, policy: Policy, limiter: trio.CapacityLimiter, metrics: MountMetrics, events: Events
    ) -> None:
        self.name, self.policy, self.health, self._limiter = name, policy, Health(), limiter
        self.directory: TierDirectory | None = None
        """None while there is none that is ours."""
        self._looking = Looks()
        self._grown: set[str] = set()
        self._aside = 0
        self._remover = Remover(name, policy, limiter, metrics, events, self._looking)
        self._nursery: trio.Nursery | None = None

    def hold(self, sha256: str) -> None:
        """The blob is in use from now on."""
        self.policy.hold(sha256)
        self._looking.touch(sha256)

    def let_go(self, sha256: str) -> None:
        """The blob, whose files were elsewhere, is not in use any more."""
        self._looking.touch(sha256)
        self.policy.let_go(sha256)
        if self.directory is None and not self.policy.holds(sha256):
            self.policy.drop(sha256)

    def loaded(self, local: LocalBlob) -> None:
        """The blob's files were opened, or there are none."""
        self._looking.touch(local.sha256)
        if local.fd >= 0:
            self.policy.put(local.sha256, local.size, local.cost, local.whole)
        elif not local.disputed:
            self.policy.drop(local.sha256)

    def grew(self, local: LocalBlob, loan: Reservation | None) -> None:
        """Something was written for the blob with this loan, in full or in part; by a thread that was given up it may
        be closed by now."""
        sha256 = local.sha256
        self._looking.touch(sha256)
        self._grown.add(sha256)
        if not local.closed:
            cost = local.cost if local.fd >= 0 else None
        else:
            cost = self._left(sha256)
        if cost is not None:
            grown = self.policy.put(sha256, local.size, cost, local.whole)
            if loan is not None:
                self.policy.wrote(loan, grown)

    def closed(self, local: LocalBlob) -> None:
        """The blob is not in use any more: close its files. Its room is measured when that is done."""
        sha256 = local.sha256
        changed = local.unlinked or local.damaged or sha256 in self._grown
        self._looking.touch(sha256)
        local.let_go()
        last = self.policy.holds(sha256) == 1  # else it is measured when the next one lets it go
        if self._nursery is not None and ((changed and last) or not local.ended):
            if last:
                self._grown.discard(sha256)
            self._nursery.start_soon(self._measure, local)
        else:
            self.policy.let_go(sha256)

    async def settled(self, sha256: str) -> None:
        """Wait while the blob, which is held, is being removed. One that only was to be removed stays."""
        while self.directory is not None and (done := self._remover.busy.get(sha256)) is not None:
            await done.wait()

    def taken_away(self, sha256: str, grown: int) -> None:
        """The whole file of a blob is gone; what was put aside takes ``grown`` bytes more."""
        self._looking.touch(sha256)
        self.policy.drop(sha256)
        self._set_aside(grown)

    async def measure(self, sha256: str) -> None:
        """What is there of a blob that nobody holds may have changed."""
        self._looking.touch(sha256)  # who looks already may have seen it before
        directory = self.directory
        if directory is None:
            return
        with self._looking.begin(self._remover.busy) as changed:
            found = await self._ask_disk(partial(_measured, directory, sha256))
        if found is not None and sha256 not in changed and not self.policy.holds(sha256):
            self._put(sha256, found[0])

    async def scan(self) -> None:
        """Measure every file: some may have gone, or may have lost their other name."""
        directory = self.directory
        if directory is None or not self.health.readable:
            return
        with self._looking.begin(self._remover.busy) as changed:
            found = await self._ask_disk(directory.scan)
        if found is None:
            return
        for key in found.keys() | self.policy.entries.keys():
            if key not in changed and not self.policy.holds(key):
                self._put(key, found.get(key))

    def _put(self, key: str, found: Found | None) -> None:
        if found is None:
            self.policy.drop(key)
        else:
            self.policy.put(key, found.size, found.cost, found.whole)

    def _left(self, sha256: str) -> int | None:
        """What a blob takes that nobody has open but a thread that was given up."""
        if self.directory is None or not self.directory.prompt:
            return None  # the next scan
        try:
            found = self.directory.measure(sha256)
        except OSError:
            return None
        return None if found is None else found.cost

    async def _measure(self, local: LocalBlob) -> None:
        key = local.sha256
        try:
            while not local.ended:  # noqa: ASYNC110 - a call that was given up is still at it, in its thread
                await trio.sleep(LOOK_S)
            while (directory := self.directory) is not None:
                await self.settled(key)
                with self._looking.begin(self._remover.busy) as changed:
                    found = await self._ask_disk(partial(_measured, directory, key))
                if found is None:
                    break
                if self.policy.holds(key) > 1:
                    self._grown.add(key)  # who has it open lets it be measured
                    break
                if key not in changed:  # else somebody had it open meanwhile, and left that to us
                    self._put(key, found[0])
                    break
        finally:
            self.let_go(key)

    def _set_aside(self, grown: int) -> None:
        """What is no blob takes so many bytes more."""
        self._aside += grown
        self.policy.count(grown)

    async def _in_thread(self, call: Callable[[], T]) -> T:
        return await trio.to_thread.run_sync(call, limiter=self._limiter)

    async def _ask_disk(self, call: Callable[[], T]) -> T | None:
        """In a thread. None when the disk fails: it may come back."""
        try:
            return await trio.to_thread.run_sync(call, abandon_on_cancel=True, limiter=self._limiter)
        except OSError as error:
            log.info("the cache's disk can't be asked", extra={"tier": self.name, "reason": error.strerror})
            return None


def _measured(directory: TierDirectory, sha256: str) -> list[Found | None]:
    """In a thread, see ``TierDirectory.measure``."""
    return [directory.measure(sha256)]
