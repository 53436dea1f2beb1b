"""Processes with a queue that one of them owns, and the supervisor's channels between them, which tests drive."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

from router.admission.line_owner import LineOwner
from router.admission.line_there import Bounds, There
from router.admission.line_words import FromOwner, ToOwner
from router.admission.queue import Claim, Full, Room, Ticket

MODELS = ("m", "n")


class Request:
    """One request at a process: it waits, is at a worker, or has come to an end, which it does once."""

    def __init__(self, member: Member, model: str, name: str) -> None:
        self.member, self.model, self.name = member, model, name
        self.ticket: Ticket | None = None
        self.outcome = ""

    def called(self) -> None:
        self.becomes("called")
        self.member.begin(self)

    def waits_for(self, waking: bool) -> None: ...

    def pushed_out(self) -> None:
        self.becomes("pushed out")

    def refused(self) -> None:
        self.becomes("refused")

    def becomes(self, outcome: str) -> None:
        assert not self.outcome, f"{self.name} is {self.outcome} already, and {outcome}"
        self.outcome = outcome
        self.member.site.log.append((outcome, self.name))

    @property
    def waits(self) -> bool:
        return not self.outcome and self.ticket is not None


class Member:
    """A process that relays. What it says stands in ``up`` until it is delivered, what it is told in ``down``."""

    def __init__(self, site: Site, number: int) -> None:
        self.site, self.number = site, number
        self.up: deque[ToOwner] = deque()
        self.down: deque[Callable[[], None]] = deque()
        self.requests: list[Request] = []
        self.at_worker: list[Request] = []
        self.stopped = False
        self.line = There(
            Bounds(site.most, 1 << 20, 2, site.may_wait), site.free, lambda model, queue: None,
            lambda: site.now, self.up.append,
        )  # fmt: skip

    def comes(self, model: str, tenant: str = "t", rank: int = 1, cost: float = 1.0, size: int = 1) -> Request:
        """As ``Entry.gate`` and ``wait`` do it."""
        self.site.count += 1
        request, claim = Request(self, model, f"{tenant}{self.site.count}"), Claim(tenant, rank, 1.0, cost, size)
        self.requests.append(request)
        if self.site.free(model) and not self.line.waits(model):
            self.line.passed(model, claim)
            request.becomes("passed")
            self.begin(request)
            return request
        try:
            request.ticket = self.line.push(model, request, claim)
        except Full:
            request.becomes("refused")
        return request

    def leaves(self, request: Request) -> None:
        assert request.ticket is not None
        self.line.leave(request.model, request.ticket)
        request.becomes("left")

    def begin(self, request: Request) -> None:
        self.at_worker.append(request)
        self.site.in_flight[request.model] += 1
        assert self.site.in_flight[request.model] <= self.site.per_worker

    def ends(self, request: Request) -> None:
        self.at_worker.remove(request)
        self.site.in_flight[request.model] -= 1
        self.line.freed(cast(Any, SimpleNamespace(names={request.model}, pinned=set())))

    @property
    def waiting(self) -> list[Request]:
        return [one for one in self.requests if one.waits]


class Control:
    """A control process. What it is told stands in ``inbox``, what it says in ``out``."""

    def __init__(self, site: Site, number: int) -> None:
        self.number = number
        self.inbox: deque[Callable[[LineOwner], None]] = deque()
        self.out: deque[tuple[int, list[FromOwner]]] = deque()
        self.line = LineOwner(
            Room(site.most, 1 << 20), lambda model: site.per_worker - site.in_flight[model],
            site.may_wait, lambda member, words: self.out.append((member, words)), lambda: site.now,
        )  # fmt: skip


class Site:
    def __init__(
        self, members: int = 2, per_worker: int = 1, most: int = 100, *, owned: bool = True,
        limits: dict[str, int] | None = None,
    ) -> None:  # fmt: skip
        """``most`` may wait, for all models; ``limits``: for one."""
        self.limits = limits or {}
        self.now, self.count, self.numbers = 1000.0, 0, 0
        self.per_worker, self.most = per_worker, most
        self.in_flight = dict.fromkeys(MODELS, 0)
        self.log: list[tuple[str, str]] = []
        self.members: list[Member] = []
        self.controls: list[Control] = []
        for _ in range(members):
            self.joins()
        if owned:
            self.takes_over()
            self.later(0.5)

    def may_wait(self, model: str) -> float:
        return self.limits.get(model, math.inf)

    def free(self, model: str) -> bool:
        return self.in_flight[model] < self.per_worker

    # --- processes come and go ---

    def joins(self) -> Member:
        self.numbers += 1
        member = Member(self, self.numbers)
        self.members.append(member)
        self._owned(member)
        return member

    def dies(self, member: Member) -> None:
        self.members.remove(member)
        while member.up:  # its last words
            self.deliver_up(member)
        for request in member.at_worker:
            self.in_flight[request.model] -= 1
        for request in member.waiting:
            request.becomes("died")
        for control in self.controls:
            control.inbox.append(lambda line: line.gone(member.number))

    def takes_over(self) -> Control:
        self.numbers += 1
        before = self.owner
        self.controls.append(Control(self, self.numbers))
        if before is not None:
            before.inbox.append(lambda line: line.deposed())
        for member in self.members:
            self._owned(member)
        return self.controls[-1]

    def control_dies(self) -> None:
        self.controls.pop()
        for member in self.members:
            self._owned(member)

    def _owned(self, member: Member) -> None:
        known = self.owner is not None
        member.down.append(lambda: member.line.owned(known))

    @property
    def owner(self) -> Control | None:
        return self.controls[-1] if self.controls else None

    # --- messages ---

    def deliver_up(self, member: Member) -> None:
        word, owner = member.up.popleft(), self.owner
        if owner is not None:
            owner.inbox.append(lambda line: line.hear(member.number, [word]))

    def deliver_down(self, member: Member) -> None:
        member.down.popleft()()

    def deliver_in(self, control: Control) -> None:
        control.inbox.popleft()(control.line)

    def deliver_out(self, control: Control) -> None:
        number, words = control.out.popleft()
        if control is not self.owner:
            return
        for member in self.members:
            if number in (0, member.number):
                for word in words:
                    member.down.append(lambda member=member, word=word: member.line.hear(word))  # type: ignore[misc]

    def deliver_all(self) -> None:
        """Until nothing is under way any more, but to processes that are stopped."""
        moved = True
        while moved:
            moved = False
            for member in self.members:
                while member.up and not member.stopped:
                    self.deliver_up(member)
                    moved = True
            for control in list(self.controls):
                while control.inbox:
                    self.deliver_in(control)
                    moved = True
                while control.out:
                    self.deliver_out(control)
                    moved = True
            for member in self.members:
                while member.down and not member.stopped:
                    self.deliver_down(member)
                    moved = True

    def tick(self) -> None:
        for member in self.members:
            if not member.stopped:
                member.line.tick()
        for control in self.controls:
            control.line.tick()

    def later(self, seconds: float) -> None:
        """Time passes, and everything is delivered at once."""
        self.deliver_all()
        for _ in range(round(seconds / 0.1)):
            self.now += 0.1
            self.tick()
            self.deliver_all()

    def called(self) -> list[str]:
        """Who was called, in order."""
        return [name for outcome, name in self.log if outcome == "called"]
