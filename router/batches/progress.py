"""Which requests of a batch are done: all below a number, and some ahead of it.

Requests are begun in order and end in any; nobody begins one that is ``WINDOW`` beyond the first that has not ended,
so what is ahead is a short list, however long the batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

WINDOW: Final = 256


class Progress:
    """Requests count from 0. ``completed`` of them were answered with success, ``failed`` otherwise."""

    def __init__(self, below: int = 0, ahead: Iterable[int] = (), completed: int = 0, failed: int = 0) -> None:
        self.below, self.ahead = below, set(ahead)
        self.completed, self.failed = completed, failed

    def done(self, number: int) -> bool:
        return number < self.below or number in self.ahead

    def may_begin(self, number: int) -> bool:
        """Whether it is near enough to the first that is not done."""
        return number < self.below + WINDOW

    def finish(self, number: int, *, good: bool) -> None:
        """A request is done; each is once."""
        assert not self.done(number)
        self.ahead.add(number)
        while self.below in self.ahead:
            self.ahead.remove(self.below)
            self.below += 1
        if good:
            self.completed += 1
        else:
            self.failed += 1

    def copy(self) -> Progress:
        """What it is now."""
        return Progress(self.below, self.ahead, self.completed, self.failed)
