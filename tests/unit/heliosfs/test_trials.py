"""Who is to blame for a worker's death: workers that die of some requests, a kernel that sends again what they had."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heliosfs.fuse import trials
from heliosfs.fuse.ledger import Ledger
from heliosfs.fuse.trials import Delivery, Trials
from heliosfs.keeper.board import DELIVERY_ROWS, Board

TICK_S = 0.05


class Kind(Enum):
    """What becomes of a request's handler."""

    QUICK = "answers at its next tick"
    SLOW = "answers after some ticks"
    POISON = "ends the process at its next tick"
    LATE = "ends the process after some ticks"


@dataclass
class Request:
    unique: int
    kind: Kind
    ticks: int = 1
    resent: bool = False
    came: float = 0.0
    answer: str = ""
    alone: int = 0
    """Deaths of workers that had nothing else under way."""


@dataclass
class Machine:
    """A kernel and its workers, with a clock of ticks. The board is a real one."""

    board: Board = field(default_factory=Board.create)
    requests: dict[int, Request] = field(default_factory=dict)
    now: float = 0.0
    deaths: int = 0

    def send(self, kind: Kind, ticks: int = 1) -> Request:
        request = Request(2 * len(self.requests) + 2, kind, ticks, came=self.now)
        self.requests[request.unique] = request
        return request

    def waiting(self) -> list[Request]:
        return [request for request in self.requests.values() if not request.answer]

    def start(self) -> None:
        """A worker comes: what the last one took is sent again."""
        self.board.generation += 1
        self.trials = Trials(Ledger(self.board, self.board.generation))
        self.under_way: dict[int, float] = {}
        self.ends = dict[int, float]()  # of requests that are alone
        again = [request for request in self.waiting() if request.resent]
        guilty = self.trials.judge([request.unique for request in again])
        for unique in guilty:
            self.requests[unique].answer = "EIO"
        for request in again:
            if request.unique not in guilty:
                self.take(request)
        self.trials.begin()

    def take(self, request: Request) -> None:
        request.resent = True
        if self.trials.admit(request.unique, str(request.unique).encode()):
            self.under_way[request.unique] = self.now

    def tick(self) -> None:
        """What the worker does, until it dies or has nothing more to do now."""
        self.now += TICK_S
        for unique, end in list(self.ends.items()):
            if self.now >= end:
                self.trials.enough(unique)
                del self.ends[unique]
        while (held := self.trials.next()) is not None:
            self.under_way[int(held)] = self.now
            if self.trials.alone:
                self.ends[self.trials.alone] = self.now + self.trials.share_s()
        for request in self.waiting():
            if not request.resent:
                self.take(request)
        for unique, began in list(self.under_way.items()):
            request = self.requests[unique]
            if self.now < began + request.ticks * TICK_S:
                continue
            if request.kind in (Kind.POISON, Kind.LATE):
                self.die()
                return
            request.answer = "bytes"
            del self.under_way[unique]
            self.trials.done(unique)

    def die(self, late: int = 0, *, crash: bool = True) -> None:
        self.deaths += crash
        if len(self.under_way) == 1:
            self.requests[next(iter(self.under_way))].alone += crash
        self.board.crashes += crash
        self.board.late = late
        self.start()

    def run(self, ticks: int = 20_000) -> None:
        """Until everything is answered."""
        while self.waiting():
            self.tick()
            ticks -= 1
            assert ticks, f"never answered: {self.waiting()[:3]}"


@pytest.fixture
def machine() -> Machine:
    machine = Machine()
    machine.start()
    return machine


@pytest.mark.parametrize("place", range(4))
def test_others_are_cleared_when_one_dies_alone(machine: Machine, place: int) -> None:
    slow = [machine.send(Kind.SLOW, 80) for _ in range(place)]
    poison = machine.send(Kind.POISON)
    slow += [machine.send(Kind.SLOW, 80) for _ in range(place, 3)]
    quick = [machine.send(Kind.QUICK, 2) for _ in range(3)]
    machine.run()
    assert poison.answer == "EIO"
    assert {request.answer for request in (*slow, *quick)} == {"bytes"}
    assert machine.deaths == 3


def test_a_request_that_is_never_alone_ends_all_the_same(machine: Machine) -> None:
    """It dies later than anybody waits for it, and another one never ends."""
    poison, stuck = machine.send(Kind.LATE, 400), machine.send(Kind.SLOW, 10**6)
    while not poison.answer:
        machine.tick()
    assert (poison.answer, machine.deaths) == ("EIO", trials.COMPANY)
    assert stuck.answer == "EIO", "nobody can tell which"


def test_kills_are_no_strikes_however_many(machine: Machine) -> None:
    request = machine.send(Kind.SLOW, 20)
    for _ in range(20):
        machine.tick()
        machine.die(crash=False)
    machine.run()
    assert request.answer == "bytes"


def test_the_one_that_is_too_old_is_to_blame_alone(machine: Machine) -> None:
    stuck, others = machine.send(Kind.SLOW, 10**6), []
    for _ in range(3):
        others.append(machine.send(Kind.SLOW, 200))
        for _ in range(150):
            machine.tick()
        machine.die(late=stuck.unique)
    assert stuck.answer == "EIO"
    machine.run()
    assert {request.answer for request in others} == {"bytes"}
    assert not Ledger(machine.board, 0).deliveries()


def test_a_crash_with_nothing_under_way_blames_nobody(machine: Machine) -> None:
    """It came while all were held back, before the first one began."""
    poison, quick = machine.send(Kind.POISON), machine.send(Kind.QUICK, 3)
    machine.tick()
    machine.tick()
    for _ in range(20):
        machine.die()
    assert Ledger(machine.board, 0).deliveries() == {
        request.unique: Delivery(1, held=True) for request in (poison, quick)
    }
    machine.run()
    assert (poison.answer, quick.answer) == ("EIO", "bytes")


def test_more_requests_than_rows(machine: Machine) -> None:
    """Those that the board has no room for count as under way: nobody is then alone, so nobody is blamed too soon."""
    poison = machine.send(Kind.POISON)
    quick = [machine.send(Kind.QUICK, 2) for _ in range(DELIVERY_ROWS + 100)]
    machine.run()
    assert poison.answer == "EIO"
    assert {request.answer for request in quick} == {"bytes"}
    assert not Ledger(machine.board, 0).deliveries()


def test_one_that_is_sent_again_while_it_is_held_back_is_begun_once(machine: Machine) -> None:
    machine.send(Kind.POISON)
    quick = machine.send(Kind.QUICK, 5)
    machine.tick()
    machine.tick()
    held = machine.trials
    assert not held.admit(quick.unique, b"again")
    begun = []
    while held.on:
        while (request := held.next()) is not None:
            begun.append(request)
        held.done(held.alone)
    assert sorted(begun) == [b"2", b"again"]


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just(Kind.QUICK), st.integers(1, 3)),
        st.tuples(st.just(Kind.SLOW), st.integers(4, 200)),
        st.tuples(st.just(Kind.POISON), st.just(1)),
        st.tuples(st.just(Kind.LATE), st.integers(2, 6)),
        st.tuples(st.just("ticks"), st.integers(1, 60)),
        st.tuples(st.just("kill"), st.just(0)),
    ),
    max_size=30,
)


@given(STEPS)
@settings(max_examples=100, deadline=None)
def test_only_the_poison_is_eio_and_nobody_starves(steps: list[tuple[Kind | str, int]]) -> None:
    machine = Machine()
    machine.start()
    for step, number in steps:
        if isinstance(step, Kind):
            machine.send(step, number)
        elif step == "ticks":
            for _ in range(number):
                machine.tick()
        else:
            machine.die(crash=False)
    machine.run()
    poison = {request.unique for request in machine.requests.values() if request.kind in (Kind.POISON, Kind.LATE)}
    assert {unique for unique, request in machine.requests.items() if request.answer == "EIO"} == poison
    assert not Ledger(machine.board, 0).deliveries(), "nothing is left on the board"
    assert machine.deaths <= 10 * len(poison)
    machine.board.close()


@given(st.integers(1, 40), st.integers(0, 20))
@settings(max_examples=20, deadline=None)
def test_what_is_new_waits_for_a_bounded_time(slow: int, quick: int) -> None:
    """Nothing is poison: one crash by chance, under a load that takes for ever."""
    machine = Machine()
    machine.start()
    for _ in range(slow):
        machine.send(Kind.SLOW, 10**6)
    machine.tick()
    machine.die()
    machine.tick()
    new = [machine.send(Kind.QUICK) for _ in range(quick)]
    begin = machine.now
    while any(not request.answer for request in new):
        machine.tick()
    # shares that are shorter than a tick take one
    assert machine.now - begin <= trials.TRIAL_S + (slow + 2) * TICK_S
    machine.board.close()
