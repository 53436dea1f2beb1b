"""Ranges of bytes, filled by threads in parallel and ahead of who uses them, delivered in order.

The user's thread opens ranges (which may allocate), as many as ``ahead_bytes`` has room for, and cuts them into parts.
Threads fill the parts, first come first served, so the range that is waited for is always the one that is worked at.
A range that was delivered belongs to the user. At most ``max(ahead_bytes, the largest range)`` bytes are open and not
delivered, and at least one range is. Parts of one range never overlap, and a range is delivered once all of its parts
are filled: so nobody reads what somebody writes.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

from helios.errors import DeadlineExceeded

log = logging.getLogger("vllm.helios")

END_S: Final = 10.0
"""How long threads may take to end their parts when the user has had enough, in seconds; then they are left alone."""


class Destination(Protocol):
    """Where one range's bytes go."""

    @property
    def nbytes(self) -> int: ...

    def ready(self) -> bool:
        """Whether all of it is there without being filled."""

    def fill(self, start: int, stop: int) -> None:
        """Make these bytes of the range be there. Blocks; threads call it at the same time for different parts."""


D = TypeVar("D", bound=Destination)


@dataclass(frozen=True, slots=True)
class Limits:
    """``ahead_bytes`` and ``part_bytes`` in bytes; ``stall_s``: seconds after which no part having been filled is an
    error: sources have deadlines of their own, a hung disk has none."""

    threads: int
    ahead_bytes: int
    part_bytes: int
    stall_s: float


def deliver(
    ranges: Iterable[tuple[int, Callable[[], D]]], limits: Limits, clock: Callable[[], float] = time.monotonic
) -> Generator[D, None, None]:
    """Open, fill and yield ranges in order; each is given by its bytes and by what opens it.

    Raises what ``fill`` raised first, DeadlineExceeded. Closing the generator ends the threads.
    """
    left = deque(ranges)
    crew = _Crew(limits, clock)
    opened: deque[tuple[int, D]] = deque()
    ahead = 0

    def open_more() -> None:
        nonlocal ahead
        while left and (not opened or ahead + left[0][0] <= limits.ahead_bytes):
            nbytes, open_ = left.popleft()
            destination = open_()
            opened.append((nbytes, destination))
            ahead += nbytes
            if not destination.ready():  # a thread would only keep the user's from the interpreter
                crew.add(destination)

    try:
        open_more()
        while opened:
            nbytes, destination = opened.popleft()
            crew.wait(destination)
            ahead -= nbytes
            open_more()
            yield destination
            del destination  # its memory is the user's alone
    finally:
        crew.end()


class _Crew:
    """The threads, which begin when there is something to do, and what that is."""

    def __init__(self, limits: Limits, clock: Callable[[], float]) -> None:
        self._limits, self._clock = limits, clock
        self._change = threading.Condition()
        self._parts: deque[tuple[Destination, int, int]] = deque()
        self._unfilled: dict[int, int] = {}  # parts, by the id of a destination that is alive
        self._filled = 0
        self._error: BaseException | None = None
        self._ended = False
        self._threads: list[threading.Thread] = []

    def add(self, destination: Destination) -> None:
        """Have a range filled."""
        if not self._threads:
            for number in range(self._limits.threads):
                thread = threading.Thread(target=self._run, name=f"helios-loader-{number}", daemon=True)
                thread.start()
                self._threads.append(thread)
        parts = _cut(destination.nbytes, self._limits.part_bytes)
        with self._change:
            self._unfilled[id(destination)] = len(parts)
            self._parts.extend((destination, start, stop) for start, stop in parts)
            self._change.notify_all()

    def wait(self, destination: Destination) -> None:
        """Wait until a range is filled. Raises what any ``fill`` raised, DeadlineExceeded."""
        with self._change:
            seen, since = self._filled, self._clock()
            while self._error is None and self._unfilled.get(id(destination)):
                self._change.wait(min(1.0, self._limits.stall_s))
                if self._filled != seen:
                    seen, since = self._filled, self._clock()
                elif self._clock() - since > self._limits.stall_s:
                    raise DeadlineExceeded(
                        f"nothing of the weights could be read for {self._limits.stall_s:g} s",
                        hint="Look at the disk, or at the mount (helios status) and its log.",
                    )
            if self._error is not None:
                raise self._error
            self._unfilled.pop(id(destination), None)

    def end(self) -> None:
        """Begin no part any more, and wait for those under way."""
        with self._change:
            self._ended = True
            self._parts.clear()
            self._change.notify_all()
        until = time.monotonic() + END_S
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        if hung := sum(thread.is_alive() for thread in self._threads):
            log.warning("%d threads still wait for the disk; they are left alone", hung)

    def _run(self) -> None:
        while True:
            with self._change:
                while not self._parts and not self._ended:
                    self._change.wait()  # until add() or end(), which always comes
                if self._ended:
                    return
                destination, start, stop = self._parts.popleft()
            try:
                destination.fill(start, stop)
            except BaseException as error:
                with self._change:
                    self._error = self._error or error
                    self._parts.clear()
                    self._change.notify_all()
                return
            with self._change:
                self._filled += 1
                if id(destination) in self._unfilled:
                    self._unfilled[id(destination)] -= 1
                self._change.notify_all()
            del destination


def _cut(nbytes: int, part_bytes: int) -> Sequence[tuple[int, int]]:
    return [(start, min(start + part_bytes, nbytes)) for start in range(0, nbytes, part_bytes)]
