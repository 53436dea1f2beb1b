"""How a new keeper gets the mount of another: from that one, or, after it was killed, from the worker it left."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from typing import Any, Final

from heliosfs.keeper import kernel, wire
from heliosfs.keeper.board import Board
from heliosfs.keeper.state import Held
from heliosfs.keeper.worker import Worker

ORPHAN_S: Final = 15.0
"""How long a worker without keeper may take to find us; it tries every second or so."""

ANSWER_S: Final = 20.0


@dataclass
class Taken:
    """What was taken over."""

    held: Held
    lock_fd: int | None


def listen(path: str) -> socket.socket:
    """Listen there, in place of whoever did until now."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(f"{path}.new")
    os.chmod(f"{path}.new", 0o600)
    listener.listen(8)
    listener.setblocking(False)
    os.rename(f"{path}.new", path)
    return listener


def take_over(path: str) -> Taken:
    """Raises OSError: neither a keeper nor a worker is there, or it does not give."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(ANSWER_S)
        try:
            sock.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            return Taken(_from_worker(path), None)
        return _from_keeper(sock)


def _from_keeper(sock: socket.socket) -> Taken:
    wire.send(sock, {"hello": "successor"})
    answer, received = wire.receive(sock)
    if answer is None:
        raise ConnectionRefusedError("the running keeper does not hand over: it is ending, or belongs to somebody else")
    fds: dict[str, int] = dict(zip(answer["fds"], received, strict=True))
    worker = None
    if about := answer.get("worker"):
        worker = Worker(about["pid"], fds["pidfd"], about["started"], about["ready_at"])
        if "sock" in fds:
            worker.sock = socket.socket(fileno=fds["sock"])
            worker.sock.setblocking(False)
    listener = socket.socket(fileno=fds["listener"])
    board = Board(fds["board"])
    held = Held(answer["mountpoint"], answer["dev"], fds["fuse"], board, listener, worker)
    held.state, held.served = answer["state"], answer["served"]
    wire.send(sock, {"taken": True})
    return Taken(held, fds.get("lock"))


def _from_worker(path: str) -> Held:
    """Wait at the socket for the worker, which brings the descriptors with its hello."""
    listener = listen(path)
    end = time.monotonic() + ORPHAN_S
    while (left := end - time.monotonic()) > 0:
        listener.settimeout(left)
        sock, _ = listener.accept()
        sock.settimeout(1.0)
        message: dict[str, Any] | None
        try:
            message, fds = wire.receive(sock)
        except OSError:
            message, fds = None, []
        if message is None or len(fds) != 2 or wire.peer(sock)[1] != os.getuid():
            wire.close(fds)
            sock.close()
            continue
        sock.setblocking(False)
        listener.setblocking(False)
        now = time.monotonic()
        worker = Worker.of_peer(sock, now)
        worker.sock, worker.ready_at = sock, now if message["ready"] else None
        number = message["dev"]
        held = Held(message["mountpoint"], number, fds[0], Board(fds[1]), listener, worker)
        held.state, held.served = message["state"], bool(message["ready"])
        if kernel.connected(fds[0]):
            return held
        raise OSError(f"the worker {worker.pid} has lost its mount")
    raise TimeoutError(f"no keeper and no worker came to {path}")
