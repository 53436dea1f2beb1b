"""Which blobs a tier keeps: admission, reservations, eviction. No I/O in here, and the caller's clock.

Blobs are valued as in LRFU (D. Lee et al., "LRFU: A Spectrum of Policies that Subsumes the Least Recently Used and
Least Frequently Used Policies", IEEE Transactions on Computers 50(12), 2001): every use weighs one and half as much
``HALF_LIFE_S`` later. The weight is multiplied by what fetching the blob again costs for each byte of room it takes, a
request's latency included, as Greedy-Dual-Size-Frequency does (L. Cherkasova, HP Labs report HPL-98-69R1, 1998), so
that small files stay. A blob that would have to push out one of more worth is not taken in (the idea of TinyLFU:
G. Einziger et al., ACM Transactions on Storage 13(4), 2017). Uses are remembered longer than blobs, so a refused one
gets in when it is asked for often enough. Uses are counted in history.py, for all tiers of a node.
tests/unit/heliosfs/test_policy_traces.py compares this with others.

Room is *used* (on the disk, by what the caller measured), *reserved* (promised to what is being written) or free. What
must go *leaves*: its room counts as coming, and is promised to the reservation that waits for it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Final

from heliosfs.tiers.history import History

LOW: Final = 0.95
"""Low watermark, as a share of the limit: how far a tier that went over its bounds is emptied."""


class Priority(IntEnum):
    """Lower classes go first; ``PINNED`` never goes. None pushes out a higher class than its own."""

    SCRATCH = 0
    NORMAL = 1
    CRITICAL = 2
    PINNED = 3


class Verdict(Enum):
    """What is answered to a wish for room."""

    GRANTED = "granted"
    WAIT = "others have to go first"
    TOO_LARGE = "it does not fit beside what is pinned, open or more important"
    NOT_WORTH = "what would have to go is used more"


@dataclass(frozen=True, slots=True)
class Bounds:
    """``limit``: most bytes used (None: no limit); ``min_free``: share of the filesystem's bytes that stays free."""

    limit: int | None = None
    min_free: float = 0.0


@dataclass(frozen=True, slots=True)
class Disk:
    """A filesystem's free and total bytes, as its user may use them."""

    free: int
    total: int


@dataclass(slots=True)
class Entry:
    """A blob that is here, whole or in part. ``cost``: the bytes of room that it takes, and that removing it frees."""

    size: int
    cost: int
    whole: bool = True
    leaving: bool = False
    stuck: bool = False
    """It could not be removed; it is left alone until it is measured again."""


@dataclass(slots=True, eq=False)
class Reservation:
    """``left``: bytes that were promised and are not written yet."""

    left: int
    parent: Reservation | None = None
    open: bool = True


@dataclass(frozen=True, slots=True)
class Answer:
    verdict: Verdict
    victims: tuple[str, ...] = ()
    """What goes for it, in this order; already marked as leaving."""


class Policy:
    """The state of one tier and its decisions; the same calls give the same answers."""

    def __init__(self, bounds: Bounds, history: History) -> None:
        self.bounds, self.history = bounds, history
        self.entries: dict[str, Entry] = {}
        self.used = self.reserved = self.leaving = 0
        """Bytes."""
        self._holds: dict[str, int] = {}
        self._classes: Mapping[str, Priority] = {}
        self._groups: dict[str, str] = {}
        self._tickets: dict[str, tuple[Reservation, bool]] = {}
        history.join(self)

    # --- what is here ---

    def put(self, key: str, size: int, cost: int, whole: bool = True) -> int:
        """The blob is here and takes ``cost`` bytes now; returns by how much that is more than before."""
        entry = self.entries.get(key)
        if entry is None:
            entry = self.entries[key] = Entry(size, 0)
        grown = cost - entry.cost
        entry.size, entry.cost, entry.whole, entry.stuck = size, cost, whole, False
        self.used += grown
        if entry.leaving:
            self.leaving += grown
        return grown

    def drop(self, key: str) -> None:
        """The blob is not here any more."""
        entry = self.entries.pop(key, None)
        if entry is None:
            return
        self.used -= entry.cost
        if entry.leaving:
            self.leaving -= entry.cost
        if key not in self._holds:
            self._groups.pop(key, None)

    def count(self, cost: int) -> None:
        """What is no blob, but lies in the tier, takes this many bytes more."""
        self.used += cost

    # --- how it is used ---

    def use(self, key: str, group: str = "") -> None:
        """The blob was opened; ``group`` names the model it was opened for."""
        self._groups[key] = group
        self.history.use(key)

    def belongs(self, key: str, group: str) -> None:
        """The blob, which is held, was opened for this model; another tier counts the use."""
        self._groups[key] = group

    def group(self, key: str) -> str:
        """The model that the blob was opened for last, as far as known."""
        return self._groups.get(key, "")

    def knows(self, key: str) -> bool:
        """Whether the blob is here or held."""
        return key in self.entries or key in self._holds

    def hold(self, key: str) -> None:
        """Somebody has the blob open, fills or measures it: it stays."""
        self._holds[key] = self._holds.get(key, 0) + 1

    def let_go(self, key: str) -> None:
        """The opposite of ``hold``."""
        self._holds[key] -= 1
        if not self._holds[key]:
            del self._holds[key]
            if key not in self.entries:
                self._groups.pop(key, None)

    @property
    def held(self) -> int:
        """Blobs that somebody holds."""
        return len(self._holds)

    def holds(self, key: str) -> int:
        """How many hold the blob."""
        return self._holds.get(key, 0)

    def classify(self, classes: Mapping[str, Priority]) -> None:
        """The classes of blobs, all of them; others are ``NORMAL``. The mapping is kept as it is, and follows whoever
        changes it."""
        self._classes = classes

    def priority(self, key: str) -> Priority:
        return self._classes.get(key, Priority.NORMAL)

    # --- room ---

    def room(self, disk: Disk) -> int:
        """Bytes that are neither used nor promised nor to stay free; negative when there are too few."""
        room = disk.free - math.ceil(self.bounds.min_free * disk.total)
        if self.bounds.limit is not None:
            room = min(room, self.bounds.limit - self.used)
        return room - self.reserved

    def ask(
        self, key: str, size: int, need: int, disk: Disk, group: str = "", group_need: int = 0, blob: str = ""
    ) -> Answer:
        """May ``need`` bytes be written for the blob of ``size`` bytes? Asked again, it answers for the same wish.

        ``blob`` is whose uses and class count where ``key`` names but the wish: a copy that another tier gives.
        ``group_need``: bytes that the whole model needs, this blob included. A model that does not fit pushes nothing
        out: it may take what is free. Granted: ``ticket`` has the reservation until ``end``.
        """
        found = self._tickets.get(key)
        if found is not None:
            ticket, granted = found
            if granted:
                return Answer(Verdict.GRANTED)
            if ticket.left <= self.room(disk) + ticket.left:
                self._tickets[key] = (ticket, True)
                return Answer(Verdict.GRANTED)
            if self.leaving:
                return Answer(Verdict.WAIT)
            self.end(key)  # what left gave less than it seemed to take
        if need <= 0 or need <= self.room(disk):
            self._tickets[key] = (self._reserve(max(need, 0)), True)
            return Answer(Verdict.GRANTED)
        lacking = need - self.room(disk) - self.leaving
        victims: list[str] = []
        if lacking > 0:
            priority = self.priority(blob or key)
            order = self._order(priority, group)
            if max(need, group_need) - need + lacking > sum(self.entries[other].cost for other in order):
                return Answer(Verdict.TOO_LARGE)
            victims = self._enough(order, lacking)
            worth = self.history.worth(blob or key, size)
            if any(self.priority(v) == priority and self._value(v) > worth for v in victims):
                return Answer(Verdict.NOT_WORTH)
            self._leave(victims)
        self._tickets[key] = (self._reserve(need), False)
        return Answer(Verdict.WAIT, tuple(victims))

    def ticket(self, key: str) -> Reservation | None:
        """The blob's reservation, once it was granted."""
        ticket, granted = self._tickets.get(key, (None, False))
        return ticket if granted else None

    def wants(self, key: str) -> bool:
        """Whether room was promised to the blob, or granted."""
        return key in self._tickets

    def waiting(self, key: str) -> bool:
        """Whether the blob was promised room that others have to leave first."""
        return key in self._tickets and not self._tickets[key][1]

    def end(self, key: str) -> None:
        """The wish is over: fulfilled or given up."""
        found = self._tickets.pop(key, None)
        if found is not None:
            self.close(found[0])

    def borrow(self, need: int, disk: Disk) -> Reservation | None:
        """Room for something small, where it is free; nothing goes for it."""
        return self._reserve(need) if need <= self.room(disk) else None

    def split(self, reservation: Reservation, part: int) -> Reservation:
        """A part of a reservation, at most what is left of it; ``close`` gives back what was not written."""
        part = min(part, reservation.left)
        reservation.left -= part
        return Reservation(part, reservation)

    def wrote(self, reservation: Reservation, count: int) -> None:
        """``count`` bytes of the reservation are used now, as ``put`` was told."""
        count = min(max(count, 0), reservation.left)
        reservation.left -= count
        self.reserved -= count

    def close(self, reservation: Reservation) -> None:
        """Nothing more is written for it."""
        if not reservation.open:
            return
        reservation.open = False
        if reservation.parent is not None and reservation.parent.open:
            reservation.parent.left += reservation.left
        else:
            self.reserved -= reservation.left
        reservation.left = 0

    def trim(self, disk: Disk) -> tuple[str, ...]:
        """What goes because the tier is over its bounds, down to the low watermark."""
        over = -self.room(disk) - self.leaving
        if over <= 0:
            return ()
        slack = 0.01 * disk.total * bool(self.bounds.min_free)
        if self.bounds.limit is not None and self.used + self.reserved - self.leaving > self.bounds.limit:
            slack = max(slack, (1 - LOW) * self.bounds.limit)
        victims = self._enough(self._order(Priority.CRITICAL), over + int(slack))
        self._leave(victims)
        return tuple(victims)

    def choose(self, keys: Iterable[str]) -> tuple[tuple[str, ...], dict[str, str]]:
        """Of blobs that somebody wants gone: those that go, marked as leaving; of those that stay the reason."""
        go, kept = [], {}
        for key in keys:
            entry = self.entries.get(key)
            if entry is None or entry.leaving:
                continue
            if self.priority(key) is Priority.PINNED:
                kept[key] = "pinned"
            elif key in self._holds:
                kept[key] = "in use"
            else:
                go.append(key)
        self._leave(go)
        return tuple(go), kept

    def leave(self, keys: Iterable[str]) -> tuple[str, ...]:
        """Blobs of which nothing is lost here, because they are elsewhere or damaged: those that go, whatever their
        class, marked as leaving. What is held stays."""
        entries = self.entries
        go = tuple(k for k in keys if k in entries and not entries[k].leaving and k not in self._holds)
        self._leave(go)
        return go

    def condemn(self, key: str) -> bool:
        """The blob must go, whatever its class; False where it is not here or goes already."""
        entry = self.entries.get(key)
        if entry is None or entry.leaving:
            return False
        self._leave([key])
        return True

    def ended(self, key: str, *, gone: bool) -> None:
        """A leaving blob is gone, or it stays after all: because somebody opened it, or it could not be removed."""
        entry = self.entries.get(key)
        if entry is None or not entry.leaving:
            return
        if gone:
            self.drop(key)
            return
        self.leaving -= entry.cost
        entry.leaving = False
        entry.stuck = key not in self._holds

    # --- inside ---

    def _reserve(self, count: int) -> Reservation:
        self.reserved += count
        return Reservation(count)

    def _leave(self, keys: Iterable[str]) -> None:
        for key in keys:
            entry = self.entries[key]
            entry.leaving = True
            self.leaving += entry.cost

    def _order(self, most: Priority, group: str = "") -> list[str]:
        """What may go, the first to go first: by class, then by value; siblings in ``group`` stay."""
        found = [
            (self.priority(key), self._value(key), key)
            for key, entry in self.entries.items()
            if entry.cost
            and not (entry.leaving or entry.stuck)
            and key not in self._holds
            and self.priority(key) <= min(most, Priority.CRITICAL)
            and not (group and self._groups.get(key) == group)
        ]
        return [key for _, _, key in sorted(found)]

    def _enough(self, order: list[str], lacking: int) -> list[str]:
        freed = itertools.accumulate((self.entries[key].cost for key in order), initial=0)
        return [key for key, before in zip(order, freed, strict=False) if before < lacking]

    def _value(self, key: str) -> float:
        return self.history.worth(key, self.entries[key].size)
