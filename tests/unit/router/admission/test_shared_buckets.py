"""Limits that several processes share: together they give what one gives, whoever reads, writes and dies when."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from router.admission.buckets import Charge, LocalLimits
from router.admission.sums import COLUMNS, Sums
from router.processes.board import Board
from router.processes.sharing import Sharing
from tests.support.interleaving import Stage, Watched

PROCESSES = 3
LIMIT = 60.0


class Scene:
    """Processes with a mapping of the limits' memory each."""

    def __init__(self, stage: Stage | None = None, rows: int = 100) -> None:
        self.now, self.stage = 1000.0, stage
        self.board = Board.make(PROCESSES, COLUMNS, rows)
        self.limits = [self.start(slot) for slot in range(PROCESSES)]
        self.taken: list[tuple[float, float]] = []

    def start(self, slot: int) -> LocalLimits:
        sharing = Sharing(self.board, Board(self.board.fd), slot)

        def sums(name: str) -> Sums | None:
            found = sharing.sums(name)
            if found is None or self.stage is None:
                return found
            return Sums(Watched(self.stage, found.taken), Watched(self.stage, found.low), slot)

        return LocalLimits(lambda: self.now, PROCESSES, sums)

    def take(self, slot: int, amount: float, used: float = 1.0) -> None:
        """A request that uses this part of what was estimated."""
        if self.limits[slot].try_take([charge(amount)]) is None:
            self.taken.append((self.now, amount * used))
            if used < 1:
                self.limits[slot].settle([charge(amount * used - amount)])

    def within(self, beyond: float = 0.0) -> None:
        """Over any window no more was taken than what a full bucket holds, what flows in, and so much beyond."""
        for i, (begin, _) in enumerate(self.taken):
            for j in range(i, len(self.taken)):
                window = self.taken[j][0] - begin
                assert sum(n for _, n in self.taken[i : j + 1]) <= LIMIT * (1 + window / 60) + beyond + 1e-6

    def close(self) -> None:
        os.close(self.board.fd)


def charge(amount: float, limit: float = LIMIT) -> Charge:
    return Charge("the tenant a", "tokens", limit, amount)


asks = st.tuples(st.integers(0, PROCESSES - 1), st.floats(0.5, 60), st.floats(0, 1), st.floats(0, 60))


@given(st.lists(asks, max_size=30))
@hypothesis_settings(max_examples=40)
def test_processes_that_take_turns_give_what_one_gives(steps: list[tuple[int, float, float, float]]) -> None:
    scene, alone = Scene(), LocalLimits(lambda: scene.now)
    for slot, amount, used, pause in steps:
        scene.now += pause
        wanted = [charge(amount)]
        refusals = [limits.try_take(wanted) for limits in (alone, scene.limits[slot])]
        assert (refusals[0] is None) == (refusals[1] is None)
        if refusals[0] is not None and refusals[1] is not None:
            assert refusals[0].wait_s == pytest.approx(refusals[1].wait_s, abs=1e-6)
        else:
            for limits in (alone, scene.limits[slot]):
                limits.settle([charge(amount * used - amount)])
    scene.close()


rounds = st.lists(
    st.tuples(st.floats(0, 70), st.lists(st.tuples(st.floats(1, 30), st.floats(0.2, 1)), min_size=3, max_size=9)),
    min_size=1, max_size=6,
)  # fmt: skip


@given(steps=rounds, seed=st.integers(0, 1 << 32))
@hypothesis_settings(max_examples=25, deadline=None)
def test_in_whatever_order_they_read_and_write_no_more_passes_than_one_request_for_each_further_process(
    steps: list[tuple[float, list[tuple[float, float]]]], seed: int
) -> None:
    stage = Stage(seed, deaths=0.02)
    scene = Scene(stage)

    def process(slot: int, requests: list[tuple[float, float]]) -> Callable[[], None]:
        def play() -> None:
            for amount, used in requests:
                scene.take(slot, amount, used)

        return play

    for pause, requests in steps:
        scene.now += pause
        stage.dead.clear()
        stage.run(*(process(slot, requests[slot::PROCESSES]) for slot in range(PROCESSES)))
        for slot in stage.dead:
            scene.limits[slot] = scene.start(slot)
    largest = max(amount for _, requests in steps for amount, _ in requests)
    scene.within((PROCESSES - 1) * largest)
    scene.now += 1e5  # and whatever happened, it is whole again
    for limits in scene.limits:
        assert limits.try_take([charge(LIMIT / PROCESSES)]) is None
    assert all(limits.try_take([charge(1)]) is not None for limits in scene.limits)
    scene.close()


def test_what_a_process_has_used_stays_used_when_it_dies() -> None:
    scene = Scene()
    scene.take(1, 50)
    scene.board.clear(2)  # another one
    scene.limits[1] = scene.start(1)
    refusals = [limits.try_take([charge(20)]) for limits in scene.limits]
    assert [round(one.wait_s) for one in refusals if one is not None] == [10, 10, 10]
    scene.now += 10
    assert scene.limits[1].try_take([charge(20)]) is None
    scene.close()


def test_where_there_is_no_room_for_a_bucket_each_process_keeps_its_part() -> None:
    scene = Scene(rows=1)
    assert scene.limits[0].try_take([charge(10)]) is None
    other = Charge("the tenant b", "tokens", LIMIT, 20)
    for limits in scene.limits:
        assert limits.try_take([other]) is None  # a third of it
        assert limits.try_take([other]) is not None
    scene.close()
