"""How a mount goes from keeper to keeper, and a worker that is gone again before it is greeted."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliosfs.keeper import held as held_module
from heliosfs.keeper import wire
from heliosfs.keeper.board import Board
from heliosfs.keeper.guest import Guest
from heliosfs.keeper.held import Held, take_over
from heliosfs.keeper.keeper import HANDING_S, Keeper
from heliosfs.keeper.place import Settings
from heliosfs.keeper.worker import Worker


class Ticked(Exception):
    """The loop was reached."""


class Kept(NamedTuple):
    keeper: Keeper
    theirs: socket.socket
    """The worker's end."""


@contextlib.contextmanager
def keeping(directory: Path) -> Iterator[Kept]:
    """A keeper that came by its mount with a worker."""
    with contextlib.ExitStack() as stack:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        board = stack.enter_context(contextlib.closing(Board.create()))
        stack.enter_context(ours)
        stack.enter_context(theirs)
        pidfd = os.pidfd_open(os.getpid())
        stack.callback(os.close, pidfd)
        worker = Worker(0, pidfd)
        worker.attach(ours)
        settings = Settings(str(directory / "k.sock"), [], [os.getuid()], None, 10.0, 60.0, 5.0)
        yield Kept(
            Keeper(settings, Held(str(directory), "0:0", -1, board, listener, worker), -1, lambda *_: None), theirs
        )


def test_a_worker_that_hangs_up_before_it_is_greeted_takes_no_keeper_down(tmp_path: Path) -> None:
    with keeping(tmp_path) as (keeper, theirs):
        theirs.close()

        def tick(now: float) -> None:
            raise Ticked

        keeper._tick = tick  # type: ignore[method-assign]
        with contextlib.suppress(Ticked):
            keeper.run()
            raise AssertionError("it ended")


@given(st.lists(st.sampled_from(["say", "look", "late"]), max_size=6))
def test_one_of_keeper_and_successor_is_keeper_whenever_the_deadline_passes(steps: list[str]) -> None:
    """``say``: the successor says that it has the mount; ``look``, ``late``: the keeper's turn, before and after."""
    with tempfile.TemporaryDirectory() as directory, keeping(Path(directory)) as (keeper, theirs):
        now, worker = time.monotonic(), keeper.held.worker
        assert worker is not None
        keeper.held.board.loop_ns = keeper.held.board.channel_ns = time.monotonic_ns()
        worker.ready()
        keeper._place.take(worker)
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        near.setblocking(False)
        with near, far:
            far.settimeout(10)
            guest = Guest(near, {"hello": "successor"}, [])
            keeper._guests.append(guest)
            keeper._turn(guest, now)
            assert held_module._stays(far)
            assert wire.receive(theirs) == (None, []), "the worker is to go there"
            for step in [*steps, "late"]:
                if step == "say":
                    with contextlib.suppress(BrokenPipeError):
                        wire.send(far, {"have": True})
                elif guest in keeper._guests and not keeper._gone:
                    keeper._turn(guest, now + (HANDING_S if step == "late" else 0.0))
            if keeper._gone:
                near.close()
                assert not held_module._stays(far)
            else:
                with contextlib.suppress(BrokenPipeError):
                    wire.send(far, {"have": True})
                with pytest.raises(ConnectionError, match="goes on"):
                    held_module._stays(far)


def test_a_keeper_that_does_not_answer_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped, with so many at its socket that no more can come: the mount must not be taken for nobody's."""
    monkeypatch.setattr(held_module, "ANSWER_S", 0.1)
    path = str(tmp_path / "k.sock")
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        listener.bind(path)
        listener.listen(0)
        for _ in range(3):
            with pytest.raises(ConnectionError, match="does not go"):
                take_over(str(tmp_path), path, [os.getuid()], 0.1)
            full = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            full.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                full.connect(path)
