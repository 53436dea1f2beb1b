"""Rows of workers that come and go as quickly as they like: nobody counts in a row that is another's."""

from __future__ import annotations

import os
from collections import deque

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from helios.config import WorkerSettings
from router.processes.board import LOADS, Board, Row
from router.processes.hub import Hub
from router.processes.members import Members, Role
from router.processes.messages import AnyMessage, Applied, Membership
from router.processes.sharing import Sharing, worker_row
from router.processes.vacating import Vacating
from router.resilience.cells import COLUMNS
from router.workers import Lease, Workers

URLS = ["http://a:1", "http://b:1", "http://c:1"]
some = st.sets(st.sampled_from(URLS))


def named(urls: set[str]) -> list[WorkerSettings]:
    return [WorkerSettings(model="m", url=url) for url in sorted(urls)]


class Process:
    """A data process: what it has not read yet, its workers and what is under way there."""

    def __init__(self, board: Board, slot: int) -> None:
        self.inbox: deque[Membership] = deque()
        self.workers = Workers((), lambda: 0.0, Sharing(board, board, slot).load)
        self.leases: list[tuple[str, Lease]] = []
        """With the workers' URLs."""


class ComingAndGoing(RuleBasedStateMachine):
    """A control process whose word reaches two data processes late, and a supervisor that acts at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.board = Board.make(4, LOADS + COLUMNS)
        self.members = Members(2, 4, 10, lambda: 0.0)
        self.members.plan()
        for number in self.members.all:
            self.members.ready(number)
        data = [member for member in self.members.all.values() if member.role is Role.DATA]
        self.processes = {member.number: Process(Board(self.board.fd), member.slot) for member in data}
        self.hub = Hub(self.members, self.send, lambda: 0.0)
        self.vacating = Vacating(self.members, self.hub, lambda url: self.board.release(worker_row(url)), set())
        # It names workers before the supervisor has heard of it, and begins nothing there.
        self.control = Workers((), lambda: 0.0, Sharing(self.board, self.board, 0).watched)
        self.unread: deque[Membership] = deque()

    def send(self, number: int, message: AnyMessage) -> None:
        if isinstance(message, Membership) and number in self.processes:
            self.processes[number].inbox.append(message)

    @rule(urls=some)
    def a_source_says(self, urls: set[str]) -> None:
        self.control.apply("file", named(urls))
        self.unread.append(Membership("file", named(urls)))

    @rule()
    def the_supervisor_hears(self) -> None:
        control = self.members.control
        assert control is not None
        while self.unread:
            self.hub.handle(control, self.unread.popleft())

    @rule(which=st.integers(0, 1))
    def a_process_hears(self, which: int) -> None:
        number, process = list(self.processes.items())[which]
        if process.inbox:
            message = process.inbox.popleft()
            process.workers.apply(message.source, message.workers)
            self.hub.handle(self.members.all[number], Applied(message.version))

    @rule()
    def the_supervisor_acts(self) -> None:
        self.vacating.step()

    @rule(which=st.integers(0, 1), url=st.sampled_from(URLS))
    def a_request_begins(self, which: int, url: str) -> None:
        process = list(self.processes.values())[which]
        worker = process.workers.at(url)
        if worker is not None and not worker.draining:
            process.leases.append((url, process.workers.lease(worker, 7)))

    @rule(which=st.integers(0, 1))
    def a_request_ends(self, which: int) -> None:
        process = list(self.processes.values())[which]
        if process.leases:
            process.leases.pop(0)[1].end()

    @invariant()
    def every_row_in_use_is_its_workers(self) -> None:
        for process in self.processes.values():
            for worker in (*process.workers.all, *process.workers.draining):
                assert isinstance(worker.load, Row)
                assert self.board.holds(worker.load, worker_row(worker.url)), worker.url

    @invariant()
    def the_control_process_sees_what_is_under_way(self) -> None:
        urls = [url for process in self.processes.values() for url, _ in process.leases]
        for worker in self.control.all:
            assert worker.in_flight == urls.count(worker.url)

    def teardown(self) -> None:
        """Who left and has nothing under way has no row in the end."""
        self.a_source_says(set())
        self.the_supervisor_hears()
        for which, process in enumerate(self.processes.values()):
            while process.inbox:
                self.a_process_hears(which)
            while process.leases:
                self.a_request_ends(which)
        self.the_supervisor_acts()
        assert [self.board.find(worker_row(url)) for url in URLS] == [None] * len(URLS)
        os.close(self.board.fd)


TestComingAndGoing = ComingAndGoing.TestCase
TestComingAndGoing.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


def test_one_that_comes_back_and_leaves_again_at_once_is_waited_for_anew() -> None:
    scene = ComingAndGoing()
    scene.a_source_says({URLS[0]})
    scene.the_supervisor_hears()
    scene.a_process_hears(0), scene.a_process_hears(1)
    scene.a_request_begins(0, URLS[0])
    scene.a_source_says(set())
    scene.the_supervisor_hears()
    scene.a_process_hears(0), scene.a_process_hears(1)
    scene.the_supervisor_acts()  # the row stays for the request
    scene.a_source_says({URLS[0]}), scene.a_source_says(set())
    scene.the_supervisor_hears()  # of both at once
    scene.a_process_hears(0)  # of the first
    scene.a_request_ends(0)
    scene.the_supervisor_acts()
    scene.a_request_begins(0, URLS[0])
    scene.every_row_in_use_is_its_workers()
    scene.teardown()


def test_who_watches_a_row_sees_the_one_that_its_name_has_now() -> None:
    board = Board.make(2, LOADS + COLUMNS)
    watched = Sharing(board, board, 0).watched("http://a:1")
    assert (watched.requests, watched.ints[0], list(watched.every(0))) == (0, 0, [0, 0])
    board.row(worker_row("http://a:1"), 1).begin(5)
    assert (watched.requests, watched.tokens) == (1, 5)
    board.clear(1)
    assert board.release(worker_row("http://a:1"))
    board.row(worker_row("http://b:1"), 1).begin(9)  # where the first one was
    assert watched.requests == 0
    board.row(worker_row("http://a:1"), 1).begin(3)
    assert (watched.requests, watched.tokens) == (1, 3)
    os.close(board.fd)
