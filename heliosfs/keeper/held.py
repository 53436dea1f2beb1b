"""What a keeper holds, and how it comes by it: by mounting, or from the worker that another keeper left it with."""

from __future__ import annotations

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
"""How long a keeper may take to leave the mount to its successor."""

LOOK_S: Final = 0.5
"""How often is looked whether there still is something to take over."""


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
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(ANSWER_S)
        try:
            sock.connect(path)
            wire.send(sock, {"hello": "successor"})
            answer, _ = wire.receive(sock)
            if answer is None or not answer.get("yours"):
                raise ConnectionAbortedError(f"the keeper at {path} is ending, or belongs to somebody else")
            wire.receive(sock)  # its end
        except (FileNotFoundError, ConnectionRefusedError):  # nobody listens
            pass
        except TimeoutError:
            raise ConnectionError(
                f"the keeper at {path} does not go: it has no worker to leave the mount with"
            ) from None
    return _from_worker(place, path, uids, orphan_s, asker)


def _from_worker(place: str, path: str, uids: list[int], orphan_s: float, asker: int | None) -> Held:
    """Wait at the socket for the worker, which brings the descriptors with its hello."""
    listener, end, poller = listen(path, uids), time.monotonic() + orphan_s, select.poll()
    watched = -1 if asker is None else os.pidfd_open(asker)
    for fd in (listener.fileno(), watched):
        if fd >= 0:
            poller.register(fd, select.POLLIN)
    while time.monotonic() < end:
        if [fd for fd, _ in poller.poll(LOOK_S * 1000)] == [watched] or kernel.device(place) is None:
            raise ProcessLookupError("the mount, or the worker that had it, is gone")
        if (guest := Guest.greet(listener, uids)) is None:
            continue
        if len(guest.fds) == 2 and kernel.connected(guest.fds[0]):
            about, (fuse_fd, board_fd) = guest.about, guest.fds
            worker = Worker.of_peer(guest)
            if about["ready"]:
                worker.ready()
            board = Board(board_fd)
            return Held(about["mountpoint"], about["dev"], fuse_fd, board, listener, worker, about["state"])
        guest.dismiss()
    raise TimeoutError(f"no keeper and no worker came to {path}")
