"""A keeper that takes over from a worker that is gone again before it is greeted."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

from heliosfs.keeper.board import Board
from heliosfs.keeper.held import Held
from heliosfs.keeper.keeper import Keeper
from heliosfs.keeper.place import Settings
from heliosfs.keeper.worker import Worker


class Ticked(Exception):
    """The loop was reached."""


def test_a_worker_that_hangs_up_before_it_is_greeted_takes_no_keeper_down(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        board = stack.enter_context(contextlib.closing(Board.create()))
        stack.enter_context(ours)
        pidfd = os.pidfd_open(os.getpid())
        stack.callback(os.close, pidfd)
        worker = Worker(0, pidfd)
        worker.attach(ours)
        theirs.close()
        settings = Settings(str(tmp_path / "k.sock"), [], [os.getuid()], None, 10.0, 60.0, 5.0)
        keeper = Keeper(settings, Held(str(tmp_path), "0:0", -1, board, listener, worker), -1, lambda *_: None)

        def tick(now: float) -> None:
            raise Ticked

        keeper._tick = tick  # type: ignore[method-assign]
        with contextlib.suppress(Ticked):
            keeper.run()
            raise AssertionError("it ended")
