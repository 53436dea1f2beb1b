"""Requests move from commit to commit: by steps, back when it gets worse, and never to workers that are not there."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from msgspec.structs import replace

from orchestrator.api.service import Rollout
from orchestrator.reconcile.rollout import (
    Seen,
    State,
    Weighted,
    Wish,
    advance,
    carried,
    normalised,
    workers,
)

A, B, C = "a" * 40, "b" * 40, "c" * 40
GOOD = Seen(100, True, True, 3, 50, 0.5, 200.0)
ROLLOUT = Rollout(steps=[10, 50, 100], step_seconds=60, min_requests=20, progress_deadline_seconds=600)


def weights(state):
    return {one.commit: one.weight for one in state.revisions}


def at_10(rollout=ROLLOUT):
    state = State((Weighted(A, 90, 0.0), Weighted(B, 10, 0.0)))
    return state, Wish(B, rollout)


def test_the_first_commit_has_everything_at_once():
    step = advance(State(), Wish(A, ROLLOUT), {}, 5.0)
    assert weights(step.state) == {A: 100}
    assert step.capacity == {A: 100}


def test_new_workers_come_up_before_requests_move():
    step = advance(State((Weighted(A, 100, 0.0),)), Wish(B, ROLLOUT), {A: GOOD}, 100.0)
    assert weights(step.state) == {A: 100, B: 0}
    assert step.capacity == {A: 100, B: 10}
    assert [note.reason for note in step.notes] == ["RolloutStarted"]
    again = advance(step.state, Wish(B, ROLLOUT), {A: GOOD, B: Seen(9, True, True)}, 200.0)
    assert weights(again.state) == {A: 100, B: 0}
    ready = advance(step.state, Wish(B, ROLLOUT), {A: GOOD, B: Seen(10, True, True)}, 200.0)
    assert weights(ready.state) == {A: 90, B: 10}


def test_the_next_step_waits_for_its_time_its_workers_and_enough_requests():
    state, wish = at_10()
    for now, b in ((59, GOOD), (60, replace(GOOD, supports=49)), (60, replace(GOOD, requests=19))):
        step = advance(state, wish, {A: GOOD, B: b}, float(now))
        assert weights(step.state) == {A: 90, B: 10}
        assert step.capacity == {A: 90, B: 50}
        assert step.again_s
    step = advance(state, wish, {A: GOOD, B: GOOD}, 60.0)
    assert weights(step.state) == {A: 50, B: 50}
    assert A in step.hold, "its workers stay until routers have heard of it"
    late = advance(state, wish, {A: GOOD, B: replace(GOOD, requests=0)}, 600.0)
    assert weights(late.state) == {A: 50, B: 50}, "few requests say nothing, and it goes on at the deadline"


@pytest.mark.parametrize(
    ("b", "why"),
    [
        (replace(GOOD, error_percent=2.6), "2.6% of its requests fail, 0.5%"),
        (replace(GOOD, ttft_ms=301.0), "301 ms, the old commit's 200 ms"),
    ],
)
def test_what_gets_worse_is_rolled_back_and_not_tried_again(b: Seen, why: str):
    state, wish = at_10()
    step = advance(state, wish, {A: GOOD, B: b}, 30.0)
    assert weights(step.state) == {A: 100, B: 0}
    assert (step.state.refused, step.phase) == (B, "RolledBack")
    assert why in step.notes[0].message
    gone = advance(step.state, wish, {A: GOOD}, 1000.0)
    assert weights(gone.state) == {A: 100}
    assert gone.phase == "RolledBack"
    other = advance(gone.state, replace(wish, target=C), {A: GOOD}, 1001.0)
    assert weights(other.state) == {A: 100, C: 0}


def test_what_is_as_good_as_allowed_goes_on():
    state, wish = at_10()
    edge = replace(GOOD, error_percent=2.5, ttft_ms=300.0)
    assert weights(advance(state, wish, {A: GOOD, B: edge}, 60.0).state) == {A: 50, B: 50}
    few = replace(GOOD, error_percent=100.0, requests=19)
    assert advance(state, wish, {A: GOOD, B: few}, 30.0).state.refused is None
    enough = replace(few, requests=20)
    assert advance(state, wish, {A: GOOD, B: enough}, 30.0).state.refused == B


def test_the_way_back_goes_as_far_as_the_old_workers_carry_and_is_forced_at_last():
    state = State((Weighted(A, 50, 0.0), Weighted(B, 50, 0.0)))
    wish, bad, half = Wish(B, ROLLOUT), replace(GOOD, error_percent=50.0), replace(GOOD, supports=66)
    step = advance(state, wish, {A: half, B: bad}, 10.0)
    assert weights(step.state) == {A: 66, B: 34}
    assert step.capacity[A] == 100
    assert step.phase == "RollingBack"
    forced = advance(step.state, wish, {A: half, B: bad}, 70.0)
    assert weights(forced.state) == {A: 100, B: 0}


def test_a_new_commit_that_never_gets_ready_is_given_up():
    state = State((Weighted(A, 100, 0.0), Weighted(B, 0, 100.0)))
    assert advance(state, Wish(B, ROLLOUT), {A: GOOD}, 699.0).state.refused is None
    step = advance(state, Wish(B, ROLLOUT), {A: GOOD}, 700.0)
    assert (step.state.refused, weights(step.state)) == (B, {A: 100})


def test_a_third_commit_in_the_middle_takes_the_place_of_the_second():
    state, _ = at_10()
    step = advance(state, Wish(C, ROLLOUT), {A: GOOD, B: GOOD}, 30.0)
    assert weights(step.state) == {A: 100, B: 0}
    step = advance(step.state, Wish(C, ROLLOUT), {A: GOOD, B: GOOD}, 31.0)
    assert weights(step.state) == {A: 100, B: 0, C: 0}
    assert step.capacity[C] == 10


def test_going_back_to_the_old_commit_asks_nobody_for_proof():
    state = State((Weighted(A, 50, 0.0), Weighted(B, 50, 0.0)))
    step = advance(state, Wish(A, ROLLOUT), {A: replace(GOOD, ttft_ms=900.0), B: GOOD}, 5.0)
    assert weights(step.state) == {A: 100, B: 0}
    assert step.state.refused is None


def test_asleep_a_new_commit_takes_over_at_once():
    state = State((Weighted(A, 100, 0.0),))
    step = advance(state, Wish(B, ROLLOUT, asleep=True), {}, 100.0)
    assert weights(advance(step.state, Wish(B, ROLLOUT, asleep=True), {}, 100.0).state) == {B: 100}


def test_recreate_ends_the_old_workers_first_and_brings_them_back_if_need_be():
    wish = Wish(B, replace(ROLLOUT, strategy="Recreate"))
    step = advance(State((Weighted(A, 100, 0.0),)), wish, {A: GOOD}, 100.0)
    assert step.capacity == {A: 0, B: 0}
    step = advance(step.state, wish, {A: Seen(pods=True)}, 110.0)
    assert step.capacity == {A: 0, B: 0}
    step = advance(step.state, wish, {}, 120.0)
    assert step.capacity == {A: 0, B: 100}
    done = advance(step.state, wish, {B: GOOD}, 300.0)
    assert weights(done.state) == {B: 100}
    failed = advance(step.state, wish, {B: Seen(pods=True)}, 700.0)
    assert (failed.state.refused, weights(failed.state)) == (B, {A: 100, B: 0})
    assert failed.capacity == {A: 0, B: 0}
    assert advance(failed.state, wish, {}, 710.0).capacity == {A: 100, B: 0}


def test_an_explicit_split_waits_for_its_workers_and_adds_up():
    wish = Wish(A, ROLLOUT, {A: 2, B: 1})
    step = advance(State((Weighted(A, 100, 0.0),)), wish, {A: GOOD}, 10.0)
    assert (weights(step.state), step.capacity) == ({A: 100, B: 0}, {A: 100, B: 33})
    step = advance(step.state, wish, {A: GOOD, B: GOOD}, 20.0)
    assert weights(step.state) == {A: 67, B: 33}
    back = advance(step.state, Wish(A, ROLLOUT), {A: GOOD, B: GOOD}, 30.0)
    assert weights(back.state) == {A: 100, B: 0}


def test_sums():
    assert normalised({A: 1, B: 1, C: 1}) == {A: 34, B: 33, C: 33}
    assert normalised({A: 0}) == {}
    assert [workers(share, 3) for share in (0, 1, 33, 34, 100)] == [0, 1, 1, 2, 3]
    assert carried({"prefill": 1, "decode": 4}, {"prefill": 2, "decode": 4}) == 50
    assert carried({}, {"both": 0}) == 100


class Rollouts(RuleBasedStateMachine):
    """Prefill and decode workers of each commit, that come when they like; some commits are bad, some never start."""

    @initialize(
        steps=st.lists(st.integers(1, 99), max_size=3, unique=True), strategy=st.sampled_from(["Shift", "Recreate"])
    )
    def begin(self, steps, strategy):
        rollout = replace(ROLLOUT, steps=[*sorted(steps), 100], strategy=strategy)
        self.wish, self.state, self.now = Wish(A, rollout), State(), 1000.0
        self.needed = {"prefill": 1, "decode": 2}
        self.count: dict[str, dict[str, int]] = {}
        self.ready: dict[str, dict[str, int]] = {}
        self.ended_at: dict[str, float] = {}
        self.bad: set[str] = set()
        self.dead: set[str] = set()
        self.turn()

    def seen(self):
        found = {}
        for commit, counts in self.count.items():
            ready = self.ready[commit]
            needed = {role: 0 if self.wish.asleep else count for role, count in self.needed.items()}
            found[commit] = Seen(
                carried(ready, needed), all(ready.values()), any(counts.values()), None, 30,
                9.0 if commit in self.bad else 0.0, 100.0,
            )  # fmt: skip
        return found

    def turn(self):
        before, seen = self.state, self.seen()
        step = advance(before, self.wish, seen, self.now)
        assert step == advance(before, self.wish, seen, self.now)
        assert sum(weights(step.state).values()) == 100
        gone = set(weights(before)) - set(weights(step.state))
        assert not any(any(self.count.get(commit, {}).values()) for commit in gone), "it has workers"
        shift = self.wish.rollout.strategy == "Shift" or bool(normalised(self.wish.split))
        back = self.wish.target in (before.refused, step.state.refused)
        for one in step.state.revisions:
            more = one.weight > before.weight(one.commit)
            if shift and more and before.revisions and not self.wish.asleep:
                carries = seen.get(one.commit, Seen()).supports >= one.weight
                left = max(other.since for other in before.revisions)
                forced = self.now - (step.state.refused_at if back else left) >= ROLLOUT.step_seconds
                assert carries or forced, "its workers don't carry that"
            if shift:
                assert step.capacity[one.commit] >= one.weight
        for commit in [*self.count, *step.capacity]:
            share = step.capacity.get(commit, 0)
            wanted = {r: 0 if self.wish.asleep else workers(share, n) for r, n in self.needed.items()}
            there = self.count.get(commit, dict.fromkeys(self.needed, 0))
            if commit in step.hold:
                wanted = {role: max(wanted[role], there[role]) for role in wanted}
            self.count[commit] = wanted
            self.ready[commit] = {role: min(n, self.ready.get(commit, {}).get(role, 0)) for role, n in wanted.items()}
        self.state = step.state
        return step

    @rule(seconds=st.sampled_from([1, 11, 60, 130, 700]))
    def later(self, seconds):
        self.now += seconds
        self.turn()

    @rule(commit=st.sampled_from([A, B, C]), role=st.sampled_from(["prefill", "decode"]))
    def a_worker_gets_ready(self, commit, role):
        if commit in self.count and commit not in self.dead:
            self.ready[commit][role] = min(self.count[commit][role], self.ready[commit][role] + 1)
        self.turn()

    @rule(commit=st.sampled_from([A, B, C]))
    def a_worker_fails(self, commit):
        if commit in self.ready:
            self.ready[commit] = dict.fromkeys(self.needed, 0)
        self.turn()

    @rule(commit=st.sampled_from([A, B, C]))
    def another_target(self, commit):
        self.wish = replace(self.wish, target=commit)
        self.turn()

    @rule(split=st.dictionaries(st.sampled_from([A, B, C]), st.integers(0, 5)))
    def a_split(self, split):
        self.wish = replace(self.wish, split=split)
        self.turn()

    @rule(asleep=st.booleans())
    def sleeps(self, asleep):
        self.wish = replace(self.wish, asleep=asleep)
        self.turn()

    @rule(prefill=st.integers(1, 3), decode=st.integers(1, 7))
    def demand(self, prefill, decode):
        self.needed = {"prefill": prefill, "decode": decode}
        self.turn()

    @rule(commit=st.sampled_from([B, C]), how=st.sampled_from(["bad", "dead", "good"]))
    def a_commit_is(self, commit, how):
        for kind in ("bad", "dead"):
            (getattr(self, kind).add if how == kind else getattr(self, kind).discard)(commit)

    def teardown(self):
        """Left alone it comes to an end: one commit, or the split, and no more moves."""
        if not hasattr(self, "state"):
            return
        for _ in range(60):
            for commit, counts in self.count.items():
                if commit not in self.dead:
                    self.ready[commit] = dict(counts)
            self.now += 61
            step = self.turn()
        goal = normalised(self.wish.split)
        if self.dead or (self.wish.split and not goal):
            return
        if goal:
            assert weights(step.state) == goal
            return
        assert len(step.state.revisions) == 1, step
        assert step.state.heaviest in (
            {self.wish.target} if step.phase == "Complete" else {A, B, C} - {self.wish.target}
        )
        assert (step.phase == "RolledBack") == (step.state.refused == self.wish.target)


Rollouts.TestCase.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
test_rollouts = Rollouts.TestCase
