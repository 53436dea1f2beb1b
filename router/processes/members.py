"""Which processes there should be, and which of them should go: the supervisor's decisions, without I/O.

An epoch is one configuration. Its data processes and its control process are started; when all of them serve, those of
earlier epochs are told to stop, so a new configuration that does not work leaves the old one serving. Who ends without
having been told is replaced at once, and with growing pauses while those that replace it die young. Who was told and
does not go within the grace is killed. To stop, the data processes go first: the control process judges workers for
them until the last has ended.

``plan`` says what to do now; events only note what has happened.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Final

YOUNG_S: Final = 10.0
"""A process that ends before it is so old has not worked."""
PAUSE_S: Final = 0.1
"""Before a second process in a row that died young is replaced; doubled for each further one."""
LONGEST_PAUSE_S: Final = 10.0


class Role(Enum):
    CONTROL = "control"
    DATA = "data"


@dataclass(slots=True)
class Member:
    """A process. ``slot``: its place on the board; ``since``, ``kill_at``: in the clock's seconds."""

    number: int
    role: Role
    slot: int
    epoch: int
    since: float
    applied: int = 0
    """Version of the membership that it goes by."""
    asked: float = math.inf
    """Since when it owes an answer."""
    serving: bool = False
    leaving: bool = False
    kill_at: float = math.inf


@dataclass(frozen=True, slots=True)
class Start:
    """Start the process; it is a member already."""

    member: Member


@dataclass(frozen=True, slots=True)
class Tell:
    """Tell the process to stop; ``cut``: at once."""

    member: Member
    cut: bool = False


@dataclass(frozen=True, slots=True)
class Kill:
    """The process was told and did not go."""

    member: Member


Action = Start | Tell | Kill


@dataclass(slots=True)
class _Place:
    """What is wanted of a role, and how often in a row it ended young."""

    wanted: int
    young: int = 0
    not_before: float = -math.inf


class Members:
    """The processes of one router. ``slots`` bounds how many data processes there are at a time."""

    def __init__(self, processes: int, slots: int, grace_s: float, clock: Callable[[], float]) -> None:
        self._clock, self._grace_s = clock, grace_s
        self._places = {Role.CONTROL: _Place(1), Role.DATA: _Place(processes)}
        self._free = list(range(slots))
        self._numbers = 0
        self.all: dict[int, Member] = {}
        """By number, which is never given twice."""
        self.epoch = self._proven = 0
        """The latest configuration, and the latest of which all served."""
        self.stopping = self._cutting = False

    # --- what has happened ---

    def ready(self, number: int) -> None:
        """The process serves."""
        member = self.all.get(number)
        if member is not None:
            member.serving = True

    def leaves(self, number: int) -> None:
        """The process accepts no more, though it was not told."""
        member = self.all.get(number)
        if member is not None and not member.leaving:
            self._leave(member)

    def ended(self, number: int) -> Member | None:
        """The process is gone; its slot is free when the caller has cleared it, which it does before ``plan``."""
        member = self.all.pop(number, None)
        if member is None:
            return None
        if member.role is Role.DATA:
            self._free.append(member.slot)
        if not member.leaving:
            self._count(self._places[member.role], self._clock() - member.since)
        return member

    def renew(self, grace_s: float) -> None:
        """There is a new configuration: all are to be replaced."""
        self.epoch += 1
        self._grace_s = grace_s
        for place in self._places.values():
            place.young, place.not_before = 0, -math.inf

    def stop(self) -> None:
        """All are to end; the second time at once."""
        self._cutting = self.stopping
        self.stopping = True

    # --- what follows ---

    def plan(self) -> list[Action]:
        """What is to be done now."""
        now = self._clock()
        actions: list[Action] = self._stop() if self.stopping else self._keep(now)
        for member in self.all.values():
            if member.kill_at <= now:
                member.kill_at = math.inf
                actions.append(Kill(member))
        return actions

    def next_s(self) -> float:
        """When ``plan`` has something to do again though nothing happens; infinity for never."""
        times = [member.kill_at for member in self.all.values()]
        if not self.stopping:
            times += [place.not_before for role, place in self._places.items() if self._missing(role)]
        return min(times, default=math.inf)

    @property
    def complete(self) -> bool:
        """Whether all of the present epoch serve."""
        return all(sum(m.serving for m in self._current(role)) >= place.wanted for role, place in self._places.items())

    @property
    def over(self) -> bool:
        return self.stopping and not self.all

    @property
    def control(self) -> Member | None:
        """The control process whose word counts: the latest one that serves."""
        able = [m for m in self.all.values() if m.role is Role.CONTROL and m.serving]
        return max(able, key=lambda m: m.number, default=None)

    def _current(self, role: Role) -> list[Member]:
        return [m for m in self.all.values() if m.role is role and m.epoch == self.epoch and not m.leaving]

    def _missing(self, role: Role) -> int:
        missing = self._places[role].wanted - len(self._current(role))
        return min(missing, len(self._free)) if role is Role.DATA else missing

    def _keep(self, now: float) -> list[Action]:
        actions: list[Action] = []
        for role, place in self._places.items():
            if now >= place.not_before:
                actions += [Start(self._add(role, now)) for _ in range(self._missing(role))]
        if self.complete:
            self._proven = self.epoch
        # What an epoch in between has, which never was complete, would only keep the latest one from its slots.
        wanted = (self._proven, self.epoch)
        old = [m for m in self.all.values() if m.epoch not in wanted and not m.leaving]
        return actions + [self._tell(member) for member in old]

    def _stop(self) -> list[Action]:
        data = [m for m in self.all.values() if m.role is Role.DATA]
        going = data or list(self.all.values())
        actions: list[Action] = [self._tell(member) for member in going if not member.leaving]
        if self._cutting:
            self._cutting = False
            actions += [Tell(member, cut=True) for member in data]
        return actions

    def _add(self, role: Role, now: float) -> Member:
        self._numbers += 1
        slot = self._free.pop(0) if role is Role.DATA else -1
        member = self.all[self._numbers] = Member(self._numbers, role, slot, self.epoch, now)
        return member

    def _tell(self, member: Member) -> Tell:
        self._leave(member)
        return Tell(member)

    def _leave(self, member: Member) -> None:
        member.leaving, member.kill_at = True, self._clock() + self._grace_s

    def _count(self, place: _Place, lived: float) -> None:
        """One of the role has ended by itself."""
        place.young = place.young + 1 if lived < YOUNG_S else 0
        pause = PAUSE_S * 2 ** min(place.young - 2, 16) if place.young > 1 else 0.0
        place.not_before = self._clock() + min(pause, LONGEST_PAUSE_S)
