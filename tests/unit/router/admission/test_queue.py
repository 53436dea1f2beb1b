"""The queue: fair between tenants, in order for each, bounded, and nobody is lost or left behind in it."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from router.admission.queue import MAX_RETRY_S, Claim, FairQueue, Full, Room, Ticket


class Owner:
    def __init__(self, name: object = "") -> None:
        self.name = name
        self.out = False

    def called(self) -> None: ...

    def waits_for(self, waking: bool) -> None: ...

    def pushed_out(self) -> None:
        assert not self.out
        self.out = True

    def refused(self) -> None: ...


class Clock:
    now = 50.0

    def __call__(self) -> float:
        return self.now


def claim(tenant: str = "a", cost: float = 10, *, rank: int = 1, weight: float = 1, size: int = 1) -> Claim:
    return Claim(tenant, rank, weight, cost, size)


def queue(requests: int = 1000, size: int = 1 << 30) -> FairQueue:
    return FairQueue(Room(requests, size), Clock())


def served(line: FairQueue) -> list[Claim]:
    order = []
    while (ticket := line.pop()) is not None:
        order.append(ticket.claim)
    return order


costs = st.lists(st.floats(1, 1000), min_size=1, max_size=25)


@given(costs, costs, st.sampled_from([0.5, 1, 4]), st.sampled_from([1, 3]), st.randoms())
def test_tenants_that_wait_get_their_shares(first, second, weight_a, weight_b, rng) -> None:
    """SFQ's bound (Goyal et al., theorem 1), over every interval in which both wait."""
    line = queue()
    claims = [claim("a", cost, weight=weight_a) for cost in first] + [claim("b", c, weight=weight_b) for c in second]
    rng.shuffle(claims)
    for one in claims:
        line.push(Owner(), one)
    left = {"a": len(first), "b": len(second)}
    got = [(0.0, 0.0)]
    for one in served(line):
        if not all(left.values()):
            break
        left[one.tenant] -= 1
        a, b = got[-1]
        share = one.cost / one.weight
        got.append((a + share, b) if one.tenant == "a" else (a, b + share))
    bound = max(first) / weight_a + max(second) / weight_b + 1e-6
    differences = [a - b for a, b in got]
    assert max(differences) - min(differences) <= bound


def test_who_was_idle_has_saved_up_nothing() -> None:
    line = queue()
    for _ in range(100):
        line.passed(claim("busy", 10))
    for tenant in ("busy", "busy", "idle", "idle", "idle", "idle"):
        line.push(Owner(), claim(tenant, 10))
    order = [one.tenant for one in served(line)]
    assert order[:4].count("busy") >= 1
    assert order[:4] != ["idle"] * 4


def test_what_was_taken_before_the_queue_began_counts() -> None:
    line = queue()
    line.passed(claim("greedy", 1000))
    line.push(Owner(), claim("greedy", 10))
    for _ in range(3):
        line.push(Owner(), claim("modest", 10))
    assert [one.tenant for one in served(line)] == ["modest", "modest", "modest", "greedy"]


def test_who_leaves_costs_his_tenant_nothing() -> None:
    line = queue()
    gone = [line.push(Owner(), claim("a", 10_000)) for _ in range(5)]
    line.push(Owner("a"), claim("a", 10))
    line.push(Owner("b"), claim("b", 10))
    line.push(Owner("b"), claim("b", 10))
    for ticket in gone:
        line.leave(ticket)
        line.leave(ticket)
    assert [one.tenant for one in served(line)] == ["a", "b", "b"]


def test_classes_come_first_and_a_tenant_s_requests_are_in_order() -> None:
    line = queue()
    tickets = {name: line.push(Owner(name), claim("a", 1, rank=rank)) for name, rank in
               [("low", 2), ("n1", 1), ("n2", 1), ("high", 0)]}  # fmt: skip
    assert [line.ahead(tickets[name]) for name in ("high", "n1", "n2", "low")] == [0, 1, 2, 3]
    order = []
    while (ticket := line.pop()) is not None:
        order.append(ticket.owner.name)  # type: ignore[attr-defined]
    assert order == ["high", "n1", "n2", "low"]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 3), st.integers(0, 2)), min_size=1, max_size=20))
def test_a_place_is_what_it_is_said_to_be(entries) -> None:
    line = queue()
    tickets = [line.push(Owner(), claim(tenant, cost * 7 + i / 64, rank=rank)) for i, (tenant, cost, rank)
               in enumerate(entries)]  # fmt: skip
    said = {id(ticket): line.ahead(ticket) for ticket in tickets}
    popped = 0
    while (ticket := line.pop()) is not None:
        # Among equal tags any order is right: those are not counted as being ahead.
        assert said[id(ticket)] <= popped
        popped += 1


def test_when_it_is_full_who_has_most_loses_the_last() -> None:
    line = queue(requests=4)
    greedy = [Owner(i) for i in range(4)]
    for owner in greedy:
        line.push(owner, claim("greedy"))
    line.push(Owner(), claim("modest"))
    assert [owner.out for owner in greedy] == [False, False, False, True]
    line.push(Owner(), claim("modest"))
    assert greedy[2].out
    with pytest.raises(Full):
        line.push(Owner(), claim("modest"))  # they have the same
    with pytest.raises(Full):
        line.push(Owner(), claim("other", rank=2))  # a lower class pushes nobody out
    line.push(Owner(), claim("other", rank=0))
    assert len(line) == 4


def test_a_weight_is_a_share_of_the_room() -> None:
    line = queue(requests=4)
    heavy = [Owner() for _ in range(3)]
    for owner in heavy:
        line.push(owner, claim("heavy", weight=3))
    line.push(Owner(), claim("light"))
    with pytest.raises(Full):
        line.push(Owner(), claim("light"))
    assert not any(owner.out for owner in heavy)


def test_bytes_are_bounded_over_all_models() -> None:
    room = Room(100, 10)
    one, other = FairQueue(room, Clock()), FairQueue(room, Clock())
    victim = Owner()
    one.push(Owner(), claim("a", size=4))
    one.push(victim, claim("a", size=4))
    other.push(Owner(), claim("b", size=5))
    assert victim.out
    with pytest.raises(Full):
        other.push(Owner(), claim("c", size=11))
    assert (room.requests, room.bytes) == (2, 9)


def test_when_to_come_back_follows_from_how_fast_it_drains() -> None:
    clock = Clock()
    line = FairQueue(Room(100, 100), clock)
    assert line.retry_after_s(0) == MAX_RETRY_S
    for _ in range(600):
        clock.now += 0.5
        line.passed(claim())
    assert line.retry_after_s(0) == 1
    assert line.retry_after_s(19) == pytest.approx(10, abs=1)
    assert line.retry_after_s(10_000) == MAX_RETRY_S
    clock.now += 3600
    assert line.retry_after_s(0) == MAX_RETRY_S


def test_the_rate_is_right_from_the_start() -> None:
    clock = Clock()
    line = FairQueue(Room(100, 100), clock)
    for _ in range(20):
        clock.now += 0.5
        line.passed(claim())
    assert line.retry_after_s(19) == pytest.approx(10, abs=2)


def test_tenants_that_come_and_go_are_forgotten() -> None:
    line = queue()
    for number in range(5000):
        line.passed(claim(f"t{number}", 5))
    assert len(line._classes[1].flows) < 600


waits = st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 100), st.integers(0, 1)), min_size=1, max_size=20)


@given(waits)
def test_the_order_that_is_told_is_the_order_in_which_they_go(those: list[tuple[str, int, int]]) -> None:
    line = queue()
    tickets = [line.push(Owner(), claim(tenant, cost, rank=rank)) for tenant, cost, rank in those]
    order = line.order()
    # Among equal tags the flow that is known longest goes first, which nobody is told: positions are of tags.
    assert sorted(map(id, order)) == sorted(map(id, tickets))
    assert [t.claim.rank for t in order] == sorted(t.claim.rank for t in tickets)
    for tenant in "abc":
        for rank in (0, 1):
            mine = [t for t in order if (t.claim.tenant, t.claim.rank) == (tenant, rank)]
            assert mine == [t for t in tickets if (t.claim.tenant, t.claim.rank) == (tenant, rank)]
    first = line.call()
    assert first is not None
    assert line._room.requests == len(those), "he keeps his part of the room"
    line.back(first)
    assert line.order() == order
    assert line.first() is first


@given(waits, st.data())
def test_who_comes_back_goes_first_and_others_as_they_would_have(those: list[tuple[str, int, int]], data) -> None:
    one, two = queue(), queue()
    for line in (one, two):
        for number, (tenant, cost, rank) in enumerate(those):
            line.push(Owner(number), claim(tenant, cost, rank=rank))
    for _ in range(data.draw(st.integers(0, len(those) - 1))):
        assert one.pop().owner.name == two.pop().owner.name  # type: ignore[union-attr]
    ticket = one.call()
    assert ticket is not None
    one.back(ticket)
    assert [one.pop().owner.name for _ in range(len(one))] == [two.pop().owner.name for _ in range(len(two))]  # type: ignore[union-attr]
    assert one._room.requests == 0


def test_who_is_not_able_to_go_is_passed_over() -> None:
    line = queue()
    first, second, third = (line.push(Owner(), claim(tenant)) for tenant in "aab")
    assert line.call(lambda ticket: ticket is not first) is second
    assert line.call(lambda ticket: ticket is not first) is third
    assert line.call(lambda ticket: ticket is not first) is None
    assert line.call() is first


def test_who_is_said_again_has_his_place_by_when_he_came_and_needs_no_room() -> None:
    line = queue(requests=2)
    late, later = (line.push(Owner(), claim(), since) for since in (20.0, 30.0))
    early = line.push(Owner(), claim(), 10.0, again=True)
    assert line.order() == [early, late, later]
    with pytest.raises(Full):
        line.push(Owner(), claim())


def test_sums_count_as_those_that_they_are_of() -> None:
    line = queue()
    line.passed(claim("a", 100), 20)
    line.push(Owner(), claim("a"))
    line.push(Owner(), claim("b"))
    assert [one.tenant for one in served(line)] == ["b", "a"]
    assert line.retry_after_s(10) < MAX_RETRY_S


class QueueModel(RuleBasedStateMachine):
    """Against a list: who is in, who went, and how much room they take."""

    @initialize(requests=st.integers(1, 6), size=st.integers(5, 40))
    def begin(self, requests: int, size: int) -> None:
        self.room = Room(requests, size)
        self.lines = [FairQueue(self.room, Clock()) for _ in range(2)]
        self.inside: list[tuple[int, Ticket, Owner]] = []
        self.popped: list[tuple[int, Ticket]] = []
        self.count = 0

    @rule(which=st.integers(0, 1), tenant=st.sampled_from("abc"), rank=st.integers(0, 2), cost=st.floats(1, 50),
          size=st.integers(0, 12))  # fmt: skip
    def somebody_comes(self, which: int, tenant: str, rank: int, cost: float, size: int) -> None:
        owner = Owner()
        try:
            ticket = self.lines[which].push(owner, claim(tenant, cost, rank=rank, size=size))
        except Full:
            assert not owner.out
        else:
            self.inside.append((which, ticket, owner))
        self.inside = [one for one in self.inside if not one[2].out]

    @precondition(lambda self: self.inside)
    @rule(data=st.data())
    def somebody_leaves(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self.inside))
        self.inside.remove(one)
        self.lines[one[0]].leave(one[1])

    @rule(which=st.integers(0, 1))
    def somebody_is_served(self, which: int) -> None:
        mine = [one for one in self.inside if one[0] == which]
        ticket = self.lines[which].pop()
        assert (ticket is None) == (not mine)
        if ticket is None:
            return
        assert ticket.claim.rank == min(one[1].claim.rank for one in mine)
        same = [one[1] for one in mine if (one[1].claim.tenant, one[1].claim.rank)
                == (ticket.claim.tenant, ticket.claim.rank)]  # fmt: skip
        assert ticket is same[0]
        self.inside = [one for one in self.inside if one[1] is not ticket]

    @invariant()
    def the_books_are_right(self) -> None:
        if not hasattr(self, "room"):
            return
        assert self.room.requests == len(self.inside) <= self.room.max_requests
        assert self.room.bytes == sum(one[1].claim.size for one in self.inside) <= self.room.max_bytes
        for which, line in enumerate(self.lines):
            mine = {id(one[1]) for one in self.inside if one[0] == which}
            assert {id(ticket) for ticket in line.tickets()} == mine
            assert len(line) == len(mine)


TestQueue = QueueModel.TestCase
TestQueue.settings = settings(max_examples=40, stateful_step_count=40)


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.floats(1, 100), st.booleans()), max_size=60))
def test_nobody_waits_for_ever(steps) -> None:
    """Virtual time never goes back, so a tenant's tag is reached however others come."""
    line = queue()
    times = []
    for tenant, cost, pop in steps:
        line.push(Owner(), claim(tenant, cost))
        if pop:
            line.pop()
            times.append(line._classes[1].virtual)
    assert all(a <= b for a, b in pairwise(times))
