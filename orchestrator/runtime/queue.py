"""Whose turn it is: a queue of keys. No I/O; the clock is given.

A key is in it once, however often it is added. One that is being worked on is never given to somebody else; if it is
added meanwhile its turn comes again afterwards. After failures the waits of a key double, each with jitter; what is
added meanwhile brings its turn forward, but never closer to the failure than the first wait, so that a key whose work
fails *and* changes something (and so is added by its own change) does not spin. All turns together are bounded by a
rate, with a burst. The pattern is client-go's workqueue (dirty and processing sets, rate limiting).
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

import msgspec

K = TypeVar("K", bound=Hashable)


class Limits(msgspec.Struct, frozen=True):
    """Times in seconds."""

    first_s: float = 0.25
    """The wait after the first failure..."""
    most_s: float = 120.0
    """...and the longest."""
    rate: float = 200.0
    """Turns a second, once ``burst`` turns were given."""
    burst: int = 500


@dataclass(slots=True)
class _State:
    due: float | None = None
    """When its turn is; None: it is not queued."""
    working: bool = False
    again: bool = False
    """It was added while it was worked on."""
    failures: int = 0
    not_before: float = 0.0


class Queue(Generic[K]):
    """Keys and their turns. Used on one event loop."""

    def __init__(
        self, limits: Limits, clock: Callable[[], float], *, jitter: Callable[[], float] = random.random
    ) -> None:
        """``clock``: seconds that only grow; ``jitter``: 0 to 1."""
        self._limits, self._clock, self._jitter = limits, clock, jitter
        self._states: dict[K, _State] = {}
        self._heap: list[tuple[float, int, K]] = []
        self._order = 0
        self._tokens, self._filled = float(limits.burst), clock()

    def __len__(self) -> int:
        """Keys that wait for a turn, now or later."""
        return sum(state.due is not None or state.again for state in self._states.values())

    @property
    def due(self) -> int:
        """Keys whose turn would be now."""
        now = self._clock()
        return sum(state.due is not None and state.due <= now for state in self._states.values())

    @property
    def working(self) -> int:
        return sum(state.working for state in self._states.values())

    def failures(self, key: K) -> int:
        """How often in a row its work has failed."""
        state = self._states.get(key)
        return 0 if state is None else state.failures

    def add(self, key: K, after_s: float = 0.0) -> None:
        """Its turn is to come, in ``after_s`` seconds at the latest."""
        state = self._states.setdefault(key, _State())
        if state.working and after_s <= 0:
            state.again = True
            return
        due = max(self._clock() + max(0.0, after_s), state.not_before)
        if state.due is None or due < state.due:
            self._push(key, state, due)

    def take(self) -> K | None:
        """The key whose turn has been due for longest, to be worked on until ``done``; None: there is none now."""
        now = self._clock()
        self._refill(now)
        while self._heap and self._heap[0][0] <= now:
            if self._tokens < 1:
                return None
            due, _, key = self._heap[0]
            state = self._states.get(key)
            if state is None or state.due != due:  # an entry that was brought forward, or taken
                heapq.heappop(self._heap)
                continue
            heapq.heappop(self._heap)
            if state.working:  # ``done`` puts it back
                continue
            self._tokens -= 1
            state.due, state.working, state.again = None, True, False
            return key
        return None

    def done(self, key: K, *, failed: bool = False, again_in_s: float | None = None) -> None:
        """The work is over. ``failed``: it is to be done again after a growing wait, of at least ``again_in_s``;
        otherwise after ``again_in_s``, or never (None)."""
        state, now = self._states[key], self._clock()
        later, again = state.due, state.again or (state.due is not None and state.due <= now)
        state.working, state.again, state.due = False, False, None
        wanted = [] if later is None else [later]
        if failed:
            state.failures += 1
            doubled = self._limits.first_s * 2.0 ** min(state.failures - 1, 30)
            wait = min(doubled, self._limits.most_s) * (0.5 + 0.5 * self._jitter())
            state.not_before = now + max(min(wait, self._limits.first_s), again_in_s or 0.0)
            wanted.append(now if again else now + wait)
        else:
            state.failures, state.not_before = 0, 0.0
            if again:
                wanted.append(now)
            if again_in_s is not None:
                wanted.append(now + again_in_s)
        if wanted:
            self._push(key, state, max(min(wanted), state.not_before))
        else:
            del self._states[key]

    def wait_s(self) -> float | None:
        """Seconds until ``take`` may give a key; None: not before something is added or done."""
        while self._heap:
            due, _, key = self._heap[0]
            state = self._states.get(key)
            if state is not None and state.due == due and not state.working:
                now = self._clock()
                self._refill(now)
                short = max(0.0, 1 - self._tokens) / self._limits.rate
                return max(0.0, due - now, short)
            heapq.heappop(self._heap)  # an old entry, or one of a key that is worked on: ``done`` puts that back
        return None

    def _push(self, key: K, state: _State, due: float) -> None:
        state.due = due
        self._order += 1
        heapq.heappush(self._heap, (due, self._order, key))
        if len(self._heap) > 64 + 4 * len(self._states):  # mostly entries that were brought forward
            self._heap = [entry for entry in self._heap if self._live(entry)]
            heapq.heapify(self._heap)

    def _live(self, entry: tuple[float, int, K]) -> bool:
        state = self._states.get(entry[2])
        return state is not None and state.due == entry[0]

    def _refill(self, now: float) -> None:
        self._tokens = min(self._limits.burst, self._tokens + (now - self._filled) * self._limits.rate)
        self._filled = now
