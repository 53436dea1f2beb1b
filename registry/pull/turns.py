"""Turns: a bounded number of places, and who is let in next where several wait: what matters more, then who came first.

What matters is asked when a place is given away, so a class that somebody gives counts for all who wait.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from registry.pull.upstream import Stopped

LOOK_S: Final = 0.2
"""How often somebody who waits looks whether it is to stop, in seconds."""

Rank = Callable[[], int]
"""How much somebody's work matters: 0 the most. It must not wait for a turn."""


class _Waiting:
    def __init__(self, rank: Rank) -> None:
        self.rank, self.turn = rank, threading.Event()


class Turns:
    """``count`` places. Threads share one. A lower class waits for as long as a higher one wants all places."""

    def __init__(self, count: int) -> None:
        self._lock = threading.Lock()
        self._free = count
        self._waiting: list[_Waiting] = []

    @contextmanager
    def turn(self, rank: Rank, stop: threading.Event) -> Iterator[None]:
        """A place while the context lasts. Raises Stopped where ``stop`` is set before it is one's turn."""
        self._take(rank, stop)
        try:
            yield
        finally:
            self._give()

    def _take(self, rank: Rank, stop: threading.Event) -> None:
        with self._lock:
            if self._free:  # then nobody waits
                self._free -= 1
                return
            me = _Waiting(rank)
            self._waiting.append(me)
        while not me.turn.wait(LOOK_S):
            if stop.is_set():
                with self._lock:
                    if me.turn.is_set():
                        return  # just now: whoever has it looks at ``stop`` itself
                    self._waiting.remove(me)
                raise Stopped

    def _give(self) -> None:
        """Hand the place to whoever waits and matters most; of equals the first that came."""
        with self._lock:
            if not self._waiting:
                self._free += 1
                return
            chosen = min(self._waiting, key=lambda each: each.rank())
            self._waiting.remove(chosen)
            chosen.turn.set()
