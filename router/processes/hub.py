"""What the supervisor does with messages: passes them on, keeps what a new process must know, sums what was counted.

A collection asks all that serve, and is over when they have answered or its time is up: of one that is silent, what it
said before counts. Who asks while one runs is served by the next, so what was counted before a question is in its
answer. One runs from time to time without being asked for: that bounds what a killed process takes along.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Set
from dataclasses import dataclass, field
from typing import Final, Protocol

from router.membership import touched
from router.processes.members import Member, Members, Role
from router.processes.messages import (
    AnyMessage,
    Applied,
    Asked,
    Collect,
    Collected,
    Counted,
    Demands,
    Deposed,
    Failed,
    FromLine,
    Gone,
    Known,
    Leaving,
    Membership,
    Owned,
    Progressed,
    Reading,
    Ready,
    Registered,
    Resolved,
    States,
    ToLine,
    Wakes,
    Wanted,
    Woken,
    WorkerState,
)
from router.processes.tally import Tally

log = logging.getLogger("helios.router")

COLLECT_S: Final = 1.0
"""How long the processes may take to say what they have counted."""
EVERY_S: Final = 10.0
"""Between collections that nobody asked for."""
HANGS_S: Final = 60.0
"""A process that owes an answer for so long, and says nothing else, hangs."""


class Sender(Protocol):
    """Sends a message to a process; one that is gone gets none."""

    def __call__(self, number: int, message: AnyMessage) -> None: ...


@dataclass(slots=True)
class _Collection:
    """One that runs. ``askers``: process and its number of the question."""

    number: int
    until: float
    missing: set[int]
    askers: list[tuple[int, int]] = field(default_factory=list)


class Hub:
    """The messages of one router. ``clock`` gives seconds."""

    def __init__(self, members: Members, send: Sender, clock: Callable[[], float]) -> None:
        self._members, self._send, self._clock = members, send, clock
        self._states: dict[str, WorkerState] = {}
        self._membership: dict[str, Membership] = {}
        """The latest of each source."""
        self._registered: dict[str, Registered] = {}
        """The registrations there are, by id."""
        self._configured: set[str] = set()
        self._version = 0
        self._owner = 0
        """The control process whose word counts, as the data processes were told; 0: none."""
        self._left: dict[str, int] = {}
        """Workers that no source knows any more, by URL, and since which version."""
        self._tally = Tally()
        self._collection: _Collection | None = None
        self._next: list[tuple[int, int]] = []
        self._collections = 0
        self._due = clock() + EVERY_S

    def started(self, member: Member) -> None:
        """Tell a new process what it has to know."""
        for known in sorted(self._membership.values(), key=lambda one: one.version):
            self._send(member.number, known)
        if self._states:
            self._send(member.number, States(self._states))
        if member.role is Role.CONTROL:
            for registered in self._registered.values():
                self._send(member.number, registered)
        else:
            self._send(member.number, Owned(self._owner))
        self._send(member.number, Known())

    def found(self) -> set[str]:
        """Workers that sources know, by URL."""
        return touched(worker for known in self._membership.values() for worker in known.workers)

    def keep(self, configured: set[str]) -> None:
        """These are the workers of the configuration; of those that nobody names nothing is known any more."""
        self._configured = configured
        known = configured | self.found()
        self._states = {url: state for url, state in self._states.items() if url in known}

    @property
    def leaving(self) -> Set[str]:
        """Workers that no source knows any more, of which some process may not have heard that."""
        return self._left.keys()

    def released(self) -> set[str]:
        """Workers that left and at which nothing will begin in any process; each is named once."""
        applied = min((m.applied for m in self._members.all.values() if m.role is Role.DATA), default=self._version)
        gone = {url for url, version in self._left.items() if version <= applied}
        for url in gone:
            del self._left[url]
        return gone

    def handle(self, member: Member, message: AnyMessage) -> None:
        """One message of a process."""
        number = member.number
        member.asked = math.inf
        match message:
            case Counted():
                self._counted(number, message)
            case Failed() | Wanted() | Asked():
                self._to_control(message)
            case Wakes():
                self._to_control(Wakes(message.models, number))
            case Demands():
                self._to_control(Demands(message.models, number))
            case ToLine():
                self._to_control(ToLine(message.words, number))
            case FromLine():
                if not self._may_decide(member):
                    pass
                elif not message.member:
                    self._pass_on(member, message, Role.DATA)
                elif message.member in self._members.all:
                    self._send(message.member, message)
            case States():
                if self._may_decide(member):
                    self._states.update(message.workers)
                    self._pass_on(member, message)
            case Membership():
                if self._may_decide(member):
                    self._moved(member, message)
            case Reading() | Progressed() | Resolved() | Woken():
                if self._may_decide(member):
                    self._pass_on(member, message, Role.DATA)
            case Registered():
                if self._may_decide(member):
                    self._register(message)
                    self._pass_on(member, message, Role.CONTROL)
            case Applied():
                member.applied = message.version
            case Collect():
                self._next.append((number, message.number))
                self._begin()
            case Ready():
                self._members.ready(number)
                self._own()
            case Leaving():
                self._members.leaves(number)

    def ended(self, member: Member) -> None:
        """A process is gone."""
        self._tally.died(member.number)
        self._answered(member.number)
        if member.role is Role.DATA:
            self._pass_on(member, Gone(member.number), Role.CONTROL)
        self._own()

    def tick(self) -> None:
        """Time has passed."""
        now = self._clock()
        if self._collection is not None and self._collection.until <= now:
            self._finish(self._collection)
        if self._due <= now:
            self._begin()

    def hanging(self) -> list[Member]:
        """Processes that don't answer any more; each is named once."""
        now = self._clock()
        found = [member for member in self._members.all.values() if now - member.asked >= HANGS_S]
        for member in found:
            member.asked = math.inf
        return found

    def next_s(self) -> float:
        """When ``tick`` has something to do."""
        return min(self._due, self._collection.until if self._collection is not None else math.inf)

    def _own(self) -> None:
        """Tell who has to know it that another control process's word counts now, if that is so."""
        control = self._members.control
        number = 0 if control is None else control.number
        if number == self._owner:
            return
        before, self._owner = self._owner, number
        if before in self._members.all:
            self._send(before, Deposed())
        for member in self._members.all.values():
            if member.role is Role.DATA:
                self._send(member.number, Owned(number))

    def _to_control(self, message: AnyMessage) -> None:
        if (control := self._members.control) is not None:
            self._send(control.number, message)

    def _may_decide(self, member: Member) -> bool:
        """Of two control processes, as there are while one takes over, the later one counts."""
        control = self._members.control
        return member.role is Role.CONTROL and (control is None or control.number <= member.number)

    def _moved(self, member: Member, message: Membership) -> None:
        before = self.found()
        self._version += 1
        numbered = Membership(message.source, message.workers, self._version)
        self._membership[message.source] = numbered
        after = self.found()
        for url in before - after:
            self._left[url] = self._version
            if url not in self._configured:
                self._states.pop(url, None)
        for url in after:
            self._left.pop(url, None)
        self._pass_on(member, numbered)

    def _register(self, message: Registered) -> None:
        if message.lease is None:
            self._registered.pop(message.identity, None)
        else:
            self._registered[message.identity] = message

    def _pass_on(self, member: Member, message: AnyMessage, role: Role | None = None) -> None:
        """Tell the others, or those of a role."""
        for other in self._members.all.values():
            if other is not member and role in (None, other.role):
                self._send(other.number, message)

    # --- collections ---

    def _begin(self) -> None:
        if self._collection is not None:
            return
        now = self._clock()
        self._collections += 1
        self._due = now + EVERY_S
        asked = {member.number for member in self._members.all.values() if member.serving}
        askers, self._next = self._next, []
        self._collection = collection = _Collection(self._collections, now + COLLECT_S, asked, askers)
        for number in list(asked):
            member = self._members.all[number]
            member.asked = min(member.asked, now)
            self._send(number, Collect(collection.number))
        if not asked:
            self._finish(collection)

    def _counted(self, number: int, message: Counted) -> None:
        self._tally.counted(number, message.families)
        if self._collection is not None and self._collection.number == message.number:
            self._answered(number)

    def _answered(self, number: int) -> None:
        collection = self._collection
        if collection is not None:
            collection.missing.discard(number)
            if not collection.missing:
                self._finish(collection)

    def _finish(self, collection: _Collection) -> None:
        self._collection = None
        if collection.missing:
            log.warning("processes did not say what they have counted", extra={"processes": len(collection.missing)})
        if collection.askers:
            text = self._tally.render()
            for process, number in collection.askers:
                self._send(process, Collected(number, text, len(collection.missing)))
        if self._next:
            self._begin()
