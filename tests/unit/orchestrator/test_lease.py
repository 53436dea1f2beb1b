"""Elections: at no moment do two act, whatever their clocks say and whatever becomes of their calls."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from helios.errors import UsageError
from orchestrator.runtime.lease import Claim, Election, Times

TIMES = Times(lease_s=15.0, renew_s=10.0, retry_s=2.0)


class World:
    """One true time, and the record that all see."""

    def __init__(self) -> None:
        self.now = 0.0
        self.lease: dict | None = None
        self.version = 0

    def write(self, claim: Claim) -> dict | None:
        """The record after a compare-and-swap; None: it was another one."""
        present = "" if self.lease is None else self.lease["metadata"]["resourceVersion"]
        if claim.version != present:
            return None
        self.version += 1
        self.lease = {"metadata": {"resourceVersion": str(self.version)}, "spec": claim.spec}
        return self.lease


class Candidate:
    """Its clock begins anywhere, and goes a little wrong; its wall clock is simply wrong."""

    def __init__(self, world: World, name: str, offset: float, rate: float) -> None:
        self.world, self.sent = world, None
        self.election = Election(name, TIMES, lambda: offset + world.now * rate, lambda: 1e9 + offset)

    def look(self) -> None:
        self.election.saw(self.world.lease)

    def begin(self) -> None:
        self.sent = self.election.claim()

    def end(self, *, arrives: bool, answered: bool) -> None:
        claim, self.sent = self.sent, None
        if claim is None or not arrives:
            return
        lease = self.world.write(claim)
        if lease is not None and answered:
            self.election.won(claim, lease)


def test_the_first_leads_and_renews_and_another_follows_when_it_is_silent():
    world = World()
    one, two = Candidate(world, "one", 0, 1), Candidate(world, "two", 500, 1)
    for each in (one, two):
        each.look()
    one.begin()
    one.end(arrives=True, answered=True)
    assert one.election.remaining_s() == 10
    two.look()
    assert two.election.claim() is None
    world.now = 9
    one.begin()
    one.end(arrives=True, answered=True)
    world.now = 16
    two.look()
    assert two.election.claim() is None, "it was renewed: seen now"
    world.now = 20
    assert one.election.remaining_s() == 0, "it stopped by itself"
    world.now = 31
    two.look()
    two.begin()
    two.end(arrives=True, answered=True)
    assert two.election.remaining_s() == 10
    assert world.lease["spec"]["leaseTransitions"] == 1


def test_a_lease_that_is_given_back_is_taken_at_once():
    world = World()
    one, two = Candidate(world, "one", 0, 1), Candidate(world, "two", 0, 1)
    one.look()
    one.begin()
    one.end(arrives=True, answered=True)
    world.write(one.election.release())
    assert one.election.remaining_s() == 0
    two.look()
    assert two.election.claim() is not None


def test_a_record_that_was_deleted_under_its_holder_is_not_taken_before_that_has_stopped():
    world = World()
    one, two = Candidate(world, "one", 0, 1), Candidate(world, "two", 0, 1)
    one.look()
    one.begin()
    one.end(arrives=True, answered=True)
    two.look()
    world.lease = None
    two.look()
    assert two.election.claim() is None
    world.now = 15
    two.look()
    assert two.election.claim() is not None


@pytest.mark.parametrize("times", [(15, 15, 2), (15, 10, 5), (15, 10, 0), (10, 15, 2)])
def test_times_that_cannot_work_are_refused(times):
    with pytest.raises(UsageError, match="2 x retry < renew < lease"):
        Election("a", Times(*times), lambda: 0, lambda: 0)


@pytest.mark.parametrize(
    "spec", [None, {}, {"holderIdentity": None}, {"leaseDurationSeconds": "x", "holderIdentity": ""}]
)
def test_a_record_without_sense_is_free(spec):
    election = Election("a", TIMES, lambda: 0, lambda: 0)
    election.saw({"metadata": {"resourceVersion": "7"}, "spec": spec})
    assert election.claim().version == "7"


class Elections(RuleBasedStateMachine):
    """Calls end long after they began, get lost before or after they were performed; clocks go by 1% wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        rates = [(0.0, 1.0), (700.0, 1.01), (-90.0, 0.99)]
        self.all = [Candidate(self.world, f"c{at}", *rate) for at, rate in enumerate(rates)]
        for each in self.all:
            each.look()

    who = st.integers(0, 2)

    @rule(who=who)
    def look(self, who: int) -> None:
        self.all[who].look()

    @rule(who=who)
    def begin(self, who: int) -> None:
        if self.all[who].sent is None:
            self.all[who].begin()

    @rule(who=who, arrives=st.booleans(), answered=st.booleans())
    def end(self, who: int, arrives: bool, answered: bool) -> None:
        self.all[who].end(arrives=arrives, answered=answered)

    @rule(who=who)
    def renew(self, who: int) -> None:
        self.begin(who)
        self.end(who, True, True)

    @rule(seconds=st.sampled_from([0.1, 1.0, 4.0, 9.9, 15.2]))
    def time_passes(self, seconds: float) -> None:
        self.world.now += seconds

    @rule(who=who)
    def release(self, who: int) -> None:
        claim = self.all[who].election.release()
        if claim is not None:
            self.world.write(claim)
            self.all[who].look()

    @invariant()
    def at_most_one_acts(self) -> None:
        assert sum(each.election.remaining_s() > 0 for each in self.all) <= 1

    def teardown(self) -> None:
        """Somebody leads again, once all is well."""
        for each in self.all:
            each.sent = None
        for _ in range(40):
            self.world.now += 1
            for each in self.all:
                each.look()
                each.begin()
                each.end(arrives=True, answered=True)
        assert sum(each.election.remaining_s() > 0 for each in self.all) == 1


TestElections = Elections.TestCase
TestElections.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
