"""Which processes there should be: whatever dies whenever, the right ones are started, told, killed."""

from __future__ import annotations

import math

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from router.processes.members import Kill, Member, Members, Role, Start, Tell

GRACE_S = 45.0


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def numbers(members: Members, role: Role = Role.DATA) -> list[int]:
    return sorted(m.number for m in members.all.values() if m.role is role)


def started(processes: int = 2) -> tuple[Members, Clock]:
    clock = Clock()
    members = Members(processes, 2 * processes, GRACE_S, clock)
    assert all(isinstance(action, Start) for action in members.plan())
    for number in list(members.all):
        members.ready(number)
    assert members.complete
    assert members.plan() == []
    return members, clock


def test_a_dead_one_is_replaced_at_once_and_one_that_dies_young_again_later_and_later() -> None:
    members, clock = started(1)
    clock.now = 100
    pauses = []
    for _ in range(10):
        (number,) = numbers(members)
        members.ended(number)
        before = clock.now
        while not (begun := members.plan()):
            clock.now = max(members.next_s(), clock.now)
        assert [type(action) for action in begun] == [Start]
        pauses.append(round(clock.now - before, 3))
    assert pauses == [0, 0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0]
    clock.now += 60  # this one works
    members.ended(numbers(members)[0])
    assert [type(action) for action in members.plan()] == [Start]


def test_the_old_go_only_when_all_the_new_serve() -> None:
    members, clock = started(2)
    old = set(members.all)
    members.renew(GRACE_S)
    new = [action.member.number for action in members.plan() if isinstance(action, Start)]
    assert len(new) == 3
    for number in new[:-1]:
        members.ready(number)
        assert members.plan() == []
    members.ready(new[-1])
    assert {action.member.number for action in members.plan() if isinstance(action, Tell)} == old
    clock.now += GRACE_S
    assert {action.member.number for action in members.plan() if isinstance(action, Kill)} == old
    assert members.plan() == []


def test_a_new_configuration_that_does_not_work_leaves_the_old_one_serving() -> None:
    members, clock = started(1)
    (old,) = numbers(members)
    members.renew(GRACE_S)
    for _ in range(20):
        for action in members.plan():
            assert not isinstance(action, Tell)
            if isinstance(action, Start) and action.member.role is Role.DATA:
                members.ended(action.member.number)
        clock.now = max(clock.now, members.next_s()) if members.next_s() < math.inf else clock.now
    assert old in members.all


def test_one_that_leaves_by_itself_is_replaced_before_it_has_ended() -> None:
    members, _ = started(1)
    (old,) = numbers(members)
    members.leaves(old)
    assert [action.member.role for action in members.plan() if isinstance(action, Start)] == [Role.DATA]


def test_stopping_the_control_process_goes_last_and_a_second_time_cuts() -> None:
    members, _ = started(2)
    members.stop()
    told = members.plan()
    assert {action.member.role for action in told if isinstance(action, Tell)} == {Role.DATA}
    members.stop()
    cut = members.plan()
    assert [action.cut for action in cut if isinstance(action, Tell)] == [True, True]
    first, second = numbers(members)
    members.ended(first)
    assert members.plan() == []
    members.ended(second)
    (last,) = members.plan()
    assert isinstance(last, Tell)
    assert last.member.role is Role.CONTROL
    members.ended(last.member.number)
    assert members.over


class Anything(RuleBasedStateMachine):
    """Events in any order, with what ``plan`` asks for done at once."""

    @initialize(processes=st.integers(1, 3))
    def start(self, processes: int) -> None:
        self.clock, self.processes = Clock(), processes
        self.members = Members(processes, 2 * processes, GRACE_S, self.clock)
        self.alive: dict[int, Member] = {}
        self.told: set[int] = set()
        self.act()

    def act(self) -> None:
        for action in self.members.plan():
            member = action.member
            if isinstance(action, Start):
                assert not self.members.stopping
                assert all(m.slot != member.slot for m in self.alive.values() if m.role is member.role is Role.DATA)
                self.alive[member.number] = member
            elif isinstance(action, Tell):
                assert action.cut or member.number not in self.told
                self.told.add(member.number)
            else:
                assert member.number in self.told
                self.end(member.number)

    def end(self, number: int) -> None:
        del self.alive[number]
        self.members.ended(number)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def dies(self, data: st.DataObject) -> None:
        self.end(data.draw(st.sampled_from(sorted(self.alive))))
        self.act()

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def serves(self, data: st.DataObject) -> None:
        self.members.ready(data.draw(st.sampled_from(sorted(self.alive))))
        self.act()

    @rule(seconds=st.sampled_from([0.1, 1, 20, 60]))
    def time_passes(self, seconds: float) -> None:
        self.clock.now += seconds
        self.act()

    @rule()
    def hangs_up(self) -> None:
        if not self.members.stopping:
            self.members.renew(GRACE_S)
            self.act()

    @rule()
    def stops(self) -> None:
        self.members.stop()
        self.act()

    @invariant()
    def those_alive_are_known(self) -> None:
        if hasattr(self, "members"):
            assert set(self.members.all) == set(self.alive)

    def teardown(self) -> None:
        """Left alone it becomes complete, or, when it stops, nothing is left."""
        if not hasattr(self, "members"):
            return
        for _ in range(6):
            self.clock.now += GRACE_S
            self.act()
            for number in list(self.alive):
                self.members.ready(number)
            self.act()
        if self.members.stopping:
            assert self.members.over
        else:
            assert self.members.complete
            assert len(self.alive) == self.processes + 1


TestAnything = Anything.TestCase
TestAnything.settings = settings(max_examples=80, stateful_step_count=30)
