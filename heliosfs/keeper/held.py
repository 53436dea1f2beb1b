"""What a keeper holds, and how it comes by it: by mounting, or from the worker that another keeper left it with."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from typing import Any, Final, NamedTuple

from heliosfs.keeper import kernel, wire
from heliosfs.keeper.board import Board
from heliosfs.keeper.guest import Guest, listen
from heliosfs.keeper.log import log
from heliosfs.keeper.worker import Worker

ANSWER_S: Final = 20.0
"""How long a keeper may take to answer its successor."""


class Held(NamedTuple):
    """All that there is of a mount outside the kernel, as it was come by."""

    mountpoint: str
    device: str
    fuse_fd: int
    board: Board
    listener: socket.socket
    worker: Worker | None = None
    state: Any = None
    """What the worker said when it was ready."""


def mount(place: str, options: str, path: str, uids: list[int]) -> Held:
    """Mount at a place, and listen at a path. Raises OSError."""
    listener = listen(path, uids)
    os.rename(path + wire.NEXT, path)
    try:
        fuse_fd, device = kernel.mount(place, options)
    except OSError:
        os.unlink(path)
        raise
    board = Board.create()
    board.mounted_ns = time.time_ns()
    log("info", "mounted", mountpoint=place, dev=device)
    return Held(place, device, fuse_fd, board, listener)


def take_over(place: str, path: str, uids: list[int], orphan_s: float, asker: int | None = None) -> Held:
    """Take the mount at a place, which belongs to a socket, from its worker, once there is no other keeper.

    ``asker``: the pid of that worker, where it started us; nobody else has the mount.

    Raises ConnectionError when a keeper is there and stays, another OSError when nobody brings the mount:
    ProcessLookupError when nobody will, since it is gone or the worker is.
    """
    with listen(path, uids) as listener, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as last:
        last.settimeout(ANSWER_S)
        try:
            last.connect(path)
            wire.send(last, {"hello": "successor"})
            if not _stays(last):
                raise ConnectionAbortedError(f"the keeper at {path} is ending, or belongs to somebody else")
            held = _from_worker(place, listener, uids, orphan_s, asker, last)
            with contextlib.suppress(ConnectionError):  # it is gone, or has said no
                wire.send(last, {"have": True})
            _stays(last)
        except (FileNotFoundError, ConnectionRefusedError):  # nobody listens
            held = _from_worker(place, listener, uids, orphan_s, asker, None)
        except (TimeoutError, BlockingIOError):
            raise ConnectionError(f"the keeper at {path} does not go: no worker of its brings the mount here") from None
    os.rename(path + wire.NEXT, path)
    return held


def _stays(last: socket.socket) -> bool:
    """Whether the last keeper is there, and waits until we have the mount; else it is gone.

    Raises ConnectionError when it does not wait any more.
    """
    answer, _ = wire.receive(last)
    if answer is not None and not answer.get("yours"):
        raise ConnectionError("the keeper goes on: its worker did not bring the mount here in time")
    return answer is not None


def _from_worker(
    place: str, listener: socket.socket, uids: list[int], orphan_s: float, asker: int | None, last: socket.socket | None
) -> Held:
    """Wait for the worker, which brings the descriptors with its hello."""
    end, poller = time.monotonic() + orphan_s, select.poll()
    watched, told = -1 if asker is None else os.pidfd_open(asker), -1 if last is None else last.fileno()
    for fd in (listener.fileno(), watched, told):
        if fd >= 0:
            poller.register(fd, select.POLLIN)
    while time.monotonic() < end:
        ready = [fd for fd, _ in poller.poll(500)]  # ms: then it may have been unmounted
        if last is not None and told in ready and not _stays(last):
            poller.unregister(last)
            last = None
        if ready == [watched] or kernel.device(place) is None:
            raise ProcessLookupError("the mount, or the worker that had it, is gone")
        if (guest := Guest.greet(listener, uids)) is None:
            continue
        if len(guest.fds) == 2 and kernel.connected(guest.fds[0]):
            about, (fuse_fd, board_fd) = guest.about, guest.fds
            worker = Worker.of_peer(guest)
            if about["ready"]:
                worker.ready()
            board = Board(board_fd)
            return Held(about["mountpoint"], about["dev"], fuse_fd, board, listener.dup(), worker, about["state"])
        guest.dismiss()
    raise (OSError if last is None else TimeoutError)("no worker came with the mount")
