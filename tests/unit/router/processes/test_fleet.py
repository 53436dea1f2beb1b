"""The administration's view in the control process: it counts nothing itself, and rows of the board change hands."""

from __future__ import annotations

import pytest

from helios.config import WorkerSettings
from helios.errors import NotFound
from router.fleet import described
from router.processes.board import LOADS, Board
from router.processes.fleet import Fleet
from router.processes.sharing import Sharing, worker_row
from router.resilience.cells import COLUMNS
from router.resilience.guard import Guard
from router.workers import Worker, Workers

A, B = "http://a:1", "http://b:1"


class Scene:
    def __init__(self) -> None:
        self.board = Board.make(2, LOADS + COLUMNS)
        sharing = Sharing(self.board, self.board, 0)
        self.workers = Workers(
            (),
            lambda: 0.0,
            sharing.watched,
            guard=lambda url: Guard(url, clock=lambda: 0.0, cells=sharing.watched(url)),
        )
        self.told: list[tuple[str, bool]] = []
        self.fleet = Fleet(self.workers, self.note)

    def note(self, worker: Worker) -> None:
        self.told.append((worker.url, worker.cordoned))

    def names(self, *urls: str) -> None:
        self.workers.apply("file", [WorkerSettings(model="m", url=url) for url in urls])

    def draining(self) -> list[tuple[str, int]]:
        return [(worker.url, worker.in_flight) for worker in self.fleet.draining]


def test_a_worker_that_left_drains_as_long_as_any_process_has_requests_there() -> None:
    scene = Scene()
    scene.names(A, B)
    row = scene.board.row(worker_row(A), 1)
    row.begin(10)
    assert [worker.in_flight for worker in scene.fleet.all] == [1, 0]
    scene.names()
    assert scene.draining() == [(A, 1)]
    row.end(10)
    assert scene.draining() == []


def test_a_row_that_is_given_to_another_worker_says_nothing_of_the_one_that_left() -> None:
    scene = Scene()
    scene.names(A)
    scene.board.row(worker_row(A), 1).begin(10)
    scene.names()
    (worker,) = scene.fleet.draining
    scene.board.clear(1)
    assert scene.board.release(worker_row(A))
    scene.board.row(worker_row(B), 1).begin(5)
    assert (worker.in_flight, worker.load.tokens, scene.draining()) == (0, 0, [])


def test_a_worker_that_comes_back_drains_no_more() -> None:
    scene = Scene()
    scene.names(A)
    scene.board.row(worker_row(A), 1).begin(10)
    scene.names()
    scene.names(A)
    assert scene.draining() == []
    assert [worker.in_flight for worker in scene.fleet.all] == [1]


def test_what_any_process_holds_against_a_worker_is_seen_and_goes_with_it() -> None:
    scene = Scene()
    scene.names(A, B)
    sharing = Sharing(scene.board, scene.board, 1)
    there = Guard(A, clock=lambda: 0.0, random=lambda: 0.0, cells=sharing.standing(A))
    for _ in range(5):
        there.breaker.leave(there.breaker.enter(), ok=False)
    Guard(B, clock=lambda: 0.0, random=lambda: 0.0, cells=sharing.standing(B)).eject("slow")
    found = [described(one, 0.0, identity="", lease_s=None, draining=False) for one in scene.fleet.all]
    assert [(one["breaker"], one["ejected_s"]) for one in found] == [("open", None), ("closed", 30.0)]
    sharing.load(A).begin(1)
    scene.names(B)
    scene.board.clear(1)
    assert scene.board.release(worker_row(A))
    scene.names(A, B)
    assert [worker.guard.breaker.closed for worker in scene.fleet.all] == [True, True]


def test_cordoning_is_told() -> None:
    scene = Scene()
    scene.names(A, B)
    scene.fleet.cordon(A)
    scene.fleet.uncordon(A)
    assert scene.told == [(A, True), (A, False)]
    scene.board.row(worker_row(B), 1).begin(1)
    scene.names(A)
    scene.fleet.cordon(B)  # it gets nothing anyway
    assert len(scene.told) == 2
    with pytest.raises(NotFound):
        scene.fleet.cordon("http://c:1")
