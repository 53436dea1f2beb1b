"""Moving blobs between two tiers, in the background: up what is used again and again, down what has to leave.

One blob at a time goes each way. A copy is made from the file, never from a handle, so who has the blob open notices
nothing: the old file goes when nobody holds it any more. Waits go in one direction only: a promotion waits for room in
the faster tier, that for a demotion, that for room in the slower one, which is made at once.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from helios.errors import IntegrityError
from helios.metrics import MountMetrics
from heliosfs.tiers.moves import doubles, downward, upward
from heliosfs.tiers.moving import Stopped, room_for
from heliosfs.tiers.policy import Verdict
from heliosfs.tiers.removing import Evicted
from heliosfs.tiers.tier import LOOK_S, MOVING, Tier

log = logging.getLogger("heliosfs.tiers")

DECLINED_S: Final = 60.0
"""A blob that could not be brought up is not looked at again for this long, in seconds."""


class Mover:
    """Moves blobs between a faster and a slower tier; ``moved`` waits until something was removed, or a moment."""

    def __init__(self, fast: Tier, slow: Tier, metrics: MountMetrics, moved: Callable[[], Awaitable[None]]) -> None:
        self._fast, self._slow, self._metrics, self._moved = fast, slow, metrics, moved
        self.halted = False
        """Nothing is brought up while this is set, and a copy under way ends."""
        self.copying = 0

    async def run(self) -> None:
        """Bring up what deserves it, and remove what is in both, until cancelled."""
        fast, slow = self._fast, self._slow
        declined: dict[str, float] = {}
        while True:
            await trio.sleep(LOOK_S)
            if self.halted or not (fast.health.writable and slow.health.writable):
                continue
            for tier, keys in zip((fast, slow), doubles(fast.policy, slow.policy), strict=True):
                tier.remove(tier.policy.leave(keys), "moved", Evicted())
            now = fast.policy.history.clock()
            declined = {key: until for key, until in declined.items() if until > now}
            key = next((key for key in upward(fast.policy, slow.policy) if key not in declined), None)
            if key is not None and not await self._up(key):
                declined[key] = now + DECLINED_S

    async def _up(self, key: str) -> bool:
        """Copy a blob up. Its other copy goes when nobody has it open."""
        fast, slow = self._fast, self._slow
        slow.policy.hold(key)
        try:
            return await self._bring(
                key, slow, fast, "promotion", lambda: not self.halted and key not in fast.policy.entries
            )
        except IntegrityError as error:
            log.error("a cached file is damaged; it is fetched again", extra={"tier": slow.name, "reason": str(error)})
        finally:
            slow.policy.let_go(key)
        slow.remove(slow.policy.leave([key]), "damaged", Evicted())
        return False

    async def down(self, key: str) -> None:
        """A blob is to leave the faster tier for want of room: copy it if it is worth it, unless somebody opens it."""
        fast, slow = self._fast, self._slow
        directory, above, below = fast.directory, fast.policy, slow.policy
        if directory is None or not slow.health.writable or not downward(key, above, below):
            return

        def still() -> bool:
            return not above.holds(key) and key not in below.entries

        try:
            if not await trio.to_thread.run_sync(directory.is_open, key):
                await self._bring(key, fast, slow, "demotion", still)
        except OSError as error:
            log.info("a blob can't be looked at", extra={"blob": key, "tier": fast.name, "reason": error.strerror})
        except IntegrityError as error:
            log.error("a cached file is damaged; it is removed", extra={"tier": fast.name, "reason": str(error)})

    async def _bring(self, key: str, source: Tier, to: Tier, move: str, still: Callable[[], bool]) -> bool:
        """Copy a whole blob from one tier to the other, if there is room for it; returns whether it is there now.

        Raises IntegrityError when the file there is damaged.
        """
        directory, entry, wish = source.directory, source.policy.entries.get(key), key + MOVING
        if directory is None or entry is None:
            return False
        size, need, group = entry.size, room_for(entry.size), source.policy.group(key)
        to.policy.hold(wish)
        self.copying += 1
        try:
            while (answer := to.ask(wish, size, need, group, blob=key)).verdict is Verdict.WAIT:
                await self._moved()
            loan = to.policy.ticket(wish)
            if answer.verdict is not Verdict.GRANTED or loan is None or not still():
                return False
            if not await to.receive(directory, key, size, loan, still):
                return False
        except Stopped:
            return False
        except OSError as error:
            fields = {"blob": key, "from": source.name, "to": to.name, "reason": error.strerror}
            log.warning("a blob can't be moved to another tier", extra=fields)
            return False
        finally:
            self.copying -= 1
            to.end(wish)
            to.policy.let_go(wish)
        self._metrics.cache_moves.labels(move).inc()
        self._metrics.cache_moved_bytes.labels(move).inc(size)
        log.info("moved", extra={"blob": key, "bytes": size, "from": source.name, "to": to.name})
        return True
