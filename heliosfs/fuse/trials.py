"""Who is to blame for a worker's death, found out by handling what it had under way one by one. No I/O in here.

After a crash the kernel sends again all that was taken and not answered (RESEND). One of those requests may be what
brought the worker down; the others must not suffer for it. So what was under way then is *suspect*, and the next worker
handles its suspects in turn, one alone, the others and everything new held back, which the board says of each before
the first one begins. If the worker dies again, the kernel sends the same ones again, and those that were not held back
are those that were under way:

    one alone         it did it: a strike; nobody else is suspect any more
    several           each of them is more suspect, nobody is cleared
    none, or a kill   nothing is learnt

The third strike that a request got alone, or after two others, is its end: EIO. One that dies so late that others were
always under way with it ends, with these, after ``COMPANY`` strikes.

A request has a share of ``TRIAL_S`` alone; then it may go on, and the next begins. So what is new waits for so long at
most, and only after a crash. Nothing of it begins before the worker says so (``begin``), and until then what is
new passes. The one that began last goes first in the next worker, because most deaths come at once:
where it dies again, it was alone.

A request that the keeper found too old (``late``) is to blame for that, whoever was under way beside it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import Final, NamedTuple, Protocol

TRIAL_S: Final = 5.0
"""How long requests wait for suspects that are handled alone, all of them together, in seconds."""

STRIKES: Final = 3
COMPANY: Final = 10


class Delivery(NamedTuple):
    """What is known of a request that a worker took: ``strikes``, whether it is ``held`` back, and which ``turn`` it
    had to begin in its last worker (0: none)."""

    strikes: int = 0
    held: bool = False
    turn: int = 0


NEW: Final = Delivery()


class Records(Protocol):
    """What outlives the worker. ``unique`` is without the resend bit; a request without a record is ``NEW``."""

    @property
    def crashed(self) -> bool:
        """Whether the last worker did."""

    @property
    def late(self) -> int:
        """The request for whose age the keeper ended it, else 0."""

    def deliveries(self) -> dict[int, Delivery]:
        """What is known."""

    def deliver(self, unique: int, delivery: Delivery) -> None:
        """Know this; without room for one more it is forgotten."""


class Trials:
    """One worker's. ``judge`` comes first; then ``admit``, ``next`` and ``share_s`` are asked by the thread that takes
    requests, the others by any."""

    def __init__(self, records: Records) -> None:
        self._records, self._lock = records, threading.Lock()
        self._strikes: dict[int, int] = {}  # of suspects that are not answered
        self._order: deque[int] = deque()  # in which they begin
        self._held: dict[int, bytes] = {}
        self._alone = self._turns = self._count = 0
        self._again: frozenset[int] = frozenset()
        self._begun = False

    def judge(self, again: Sequence[int]) -> set[int]:
        """What the kernel sent again, all of it, before any of it begins; returns what is to be EIO."""
        known = self._records.deliveries()
        found = {unique: known.get(unique, NEW) for unique in again}
        strikes = {unique: delivery.strikes for unique, delivery in found.items()}
        loose = sorted((unique for unique in found if not found[unique].held), key=lambda each: found[each].turn)
        guilty: set[int] = set()
        if self._records.crashed and loose:
            blamed = [self._records.late] if self._records.late in loose else loose
            alone = len(blamed) == 1
            if alone:
                strikes = {unique: strikes[unique] for unique in blamed}
            for unique in blamed:
                strikes[unique] += 1
            guilty = {unique for unique in blamed if strikes[unique] >= (STRIKES if alone else COMPANY)}
        order = [*loose[-1:], *loose[:-1], *(unique for unique in found if found[unique].held)]
        self._order.extend(each for each in order if strikes.get(each) and each not in guilty)
        self._strikes = {unique: strikes[unique] for unique in self._order}
        self._count, self._again = len(self._order), frozenset(again)
        for unique in known.keys() - self._strikes.keys():
            self._records.deliver(unique, NEW)
        for unique, count in self._strikes.items():
            self._records.deliver(unique, Delivery(count, held=True))
        return guilty

    def begin(self) -> None:
        """The first may begin. Any thread."""
        self._begun = True

    @property
    def on(self) -> bool:
        """Whether there is anything to ask ``next`` for, or soon will be."""
        return bool(self._order or self._held or self._alone)

    def admit(self, unique: int, request: bytes | memoryview) -> bool:
        """Whether a request that came may begin; else it is kept, and comes from ``next``. One that is sent again
        replaces what is kept."""
        with self._lock:
            suspect = unique in self._strikes
            passes = unique not in self._order if suspect else not (self._begun or unique in self._again)
            if passes or not self.on:
                return True
            if not suspect:
                self._records.deliver(unique, Delivery(held=True))
            self._held[unique] = bytes(request)
            return False

    def next(self) -> bytes | None:
        """A request that may begin now; None while one is alone, and when there is none."""
        while True:
            with self._lock:
                if self._alone or not self._begun:
                    return None
                unique = self._order.popleft() if self._order else next(iter(self._held), 0)
                request = self._held.pop(unique, None)
                if request is not None:
                    self._turns += 1
                    strikes = self._strikes.get(unique, 0)
                    self._records.deliver(unique, Delivery(strikes, turn=self._turns) if strikes else NEW)
                    self._alone = unique if strikes else 0
                    return request
                if not unique:
                    return None
                self._forget(unique)  # it did not come, after all

    @property
    def alone(self) -> int:
        """The request that is alone, else 0."""
        return self._alone

    def share_s(self) -> float:
        """How long it may be that, in seconds: the first one, which is the likeliest, has half of all the time."""
        return TRIAL_S if self._count == 1 else TRIAL_S / 2 / (1 if self._turns == 1 else self._count - 1)

    def done(self, unique: int) -> bool:
        """A request was answered; says whether another may begin for that."""
        if unique not in self._strikes:
            return False
        with self._lock:
            self._forget(unique)
            return self._end(unique)

    def enough(self, unique: int) -> bool:
        """Its share is over; says whether another may begin for that."""
        with self._lock:
            return self._end(unique)

    def _end(self, unique: int) -> bool:
        if self._alone != unique:
            return False
        self._alone = 0
        return True

    def _forget(self, unique: int) -> None:
        if self._strikes.pop(unique, None) is not None:
            self._records.deliver(unique, NEW)
