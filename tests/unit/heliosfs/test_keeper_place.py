"""The place for the keeper's worker, and the phases that a worker goes through."""

from __future__ import annotations

import contextlib
import math
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliosfs.keeper.board import Board
from heliosfs.keeper.held import Held
from heliosfs.keeper.place import Place, Settings
from heliosfs.keeper.worker import Phase, Worker


@contextlib.contextmanager
def process() -> Iterator[Worker]:
    """A worker that does nothing."""
    with subprocess.Popen(["sleep", "600"]) as child:
        pidfd = os.pidfd_open(child.pid)
        try:
            yield Worker(child.pid, pidfd)
        finally:
            child.kill()
            os.close(pidfd)


class Taken(NamedTuple):
    place: Place
    worker: Worker
    ours: socket.socket
    theirs: socket.socket


@pytest.fixture
def taken(tmp_path: Path) -> Iterator[Taken]:
    """A place without patience, and its worker, which has not said hello."""
    with contextlib.ExitStack() as stack:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        stack.enter_context(theirs)
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        board = stack.enter_context(contextlib.closing(Board.create()))
        board.init_len = 40
        settings = Settings(str(tmp_path / "k.sock"), [], [os.getuid()], None, 10.0, 0.0, 5.0)
        held = Held(str(tmp_path), "0:0", -1, board, listener)
        place = Place(settings, held, lambda *_: None, lambda *_: None)
        worker = stack.enter_context(process())
        place.take(worker)
        ours.setblocking(False)
        stack.enter_context(ours)
        yield Taken(place, worker, ours, theirs)


def test_requests_are_not_refused_while_a_worker_that_hung_up_may_still_read(taken: Taken) -> None:
    place, worker, ours, theirs = taken
    assert -1 in place.handlers(), "nobody has the descriptor, and there is no patience left"
    worker.attach(ours)
    assert -1 not in place.handlers()
    theirs.close()
    place.handlers()[ours.fileno()]()
    assert (worker.sock, worker.phase) == (None, Phase.GOING)
    assert -1 not in place.handlers(), "its process is there"


@pytest.mark.parametrize("data", [b"no json", b"[]", b"{" + b" " * (64 << 10) + b"}"])
def test_who_says_what_is_no_message_is_taken_for_one_that_hung_up(taken: Taken, data: bytes) -> None:
    place, worker, ours, theirs = taken
    worker.attach(ours)
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    theirs.send(data)
    place.handlers()[ours.fileno()]()
    assert (worker.sock, worker.phase) == (None, Phase.GOING)


@given(st.lists(st.sampled_from(["ready", "stop", "goes", "kill"]), max_size=8))
def test_a_worker_never_goes_back(steps: list[str]) -> None:
    with process() as worker:
        for step in steps:
            before = worker.phase
            {"ready": worker.ready, "kill": worker.kill}.get(step, lambda step=step: getattr(worker, step)(5.0))()
            assert worker.phase >= before
            assert (worker.phase is Phase.SERVING) == (worker.deadline == math.inf), "every other phase has an end"
            assert worker.phase >= Phase.GOING or not worker.asked
