"""What counts as being under way where nobody sees the end: never too few readings later, never for ever."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from helios.config import WorkerSettings
from router.picker.ledger import LAG_S, Ledger
from router.picker.subset import Subset
from router.worker_metrics import WorkerMetrics
from router.workers import Worker, Workers


class Scene:
    def __init__(self, hold_s: float = 60.0) -> None:
        self.now, self.outlived, self.freed = 100.0, 0, 0
        self.workers = Workers([WorkerSettings(model="m", url="http://10.0.0.1:80")], lambda: self.now)
        (self.worker,) = self.workers.all
        self.ledger = Ledger(hold_s, self._outlived, self._freed)

    def _outlived(self) -> None:
        self.outlived += 1

    def _freed(self, worker: Worker) -> None:
        self.freed += 1

    def begin(self, count: int) -> None:
        for _ in range(count):
            self.ledger.add(self.worker, self.now, self.workers.lease(self.worker, 10))

    def reads(self, running: int, waiting: int = 0, sent: int | None = None) -> None:
        sent = self.worker.in_flight if sent is None else sent
        self.worker.metrics = WorkerMetrics(self.now, sent, running, waiting, 0.0)
        self.ledger.tick(self.now)


def test_a_reading_ends_what_is_too_many_the_oldest_first() -> None:
    scene = Scene()
    scene.begin(3)
    scene.now += 1
    scene.begin(2)
    scene.now += 1
    scene.reads(3, 1)
    assert (scene.worker.in_flight, scene.freed) == (4, 1)
    scene.reads(0)
    assert (scene.worker.in_flight, len(scene.ledger)) == (0, 0)
    scene.reads(0)
    assert (scene.freed, scene.outlived) == (5, 0)


def test_one_reading_counts_once_and_what_was_just_begun_not_at_all() -> None:
    scene = Scene()
    scene.begin(4)
    scene.now += LAG_S / 2
    scene.reads(0)
    assert scene.worker.in_flight == 4
    scene.now += LAG_S
    scene.reads(2)
    assert scene.worker.in_flight == 2
    for _ in range(5):
        scene.now += 1
        scene.ledger.tick(scene.now)
    assert scene.worker.in_flight == 2


def test_what_others_send_there_hides_ends_until_the_longest_time() -> None:
    scene = Scene(hold_s=30)
    scene.begin(2)
    scene.now += 10
    scene.begin(1)
    scene.reads(50)
    assert scene.worker.in_flight == 3
    scene.now += 21
    scene.ledger.tick(scene.now)
    assert (scene.worker.in_flight, scene.outlived) == (1, 2)


def test_of_several_processes_each_ends_its_part() -> None:
    scene = Scene()
    scene.begin(10)
    scene.now += 1
    scene.reads(20, sent=40)  # a quarter of what the router has there is of this process
    assert scene.worker.in_flight == 5


@given(st.lists(st.tuples(st.sampled_from(["begin", "read", "wait"]), st.integers(0, 20)), max_size=60))
def test_nothing_is_ended_twice_and_everything_in_the_end(steps: list[tuple[str, int]]) -> None:
    scene = Scene()
    for what, number in steps:
        if what == "begin":
            scene.begin(number)
        elif what == "read":
            scene.reads(number)
            assert scene.worker.in_flight >= 0
        scene.now += number / 10
        scene.ledger.tick(scene.now)
        assert len(scene.ledger) == scene.worker.in_flight == scene.worker.leases
    scene.now += 61
    scene.ledger.tick(scene.now)
    assert (len(scene.ledger), scene.worker.in_flight, scene.worker.load.tokens) == (0, 0, 0)


@given(st.lists(st.text(max_size=30), max_size=5), st.text(max_size=30))
def test_a_subset_never_allows_what_it_does_not_name(named: list[str], endpoint: str) -> None:
    names: Any = {one.strip() for one in named}
    host = endpoint.rpartition(":")[0]
    if Subset(named).has(endpoint):
        assert {endpoint, host, host.strip("[]")} & names
