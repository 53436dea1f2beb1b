"""What a keeper holds, and how it comes by it: by mounting, from another keeper, from the worker that one left."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import sys
import time
from dataclasses import dataclass
from typing import Any, Final

from heliosfs.keeper import kernel, wire
from heliosfs.keeper.board import Board
from heliosfs.keeper.worker import Worker

ANSWER_S: Final = 20.0
"""How long a keeper may take to hand over."""

LOOK_S: Final = 0.5
"""How often is looked whether there still is something to take over."""


def log(level: str, message: str, **fields: object) -> None:
    """A line as helios.logs writes it."""
    now = time.time()
    stamp = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(now))}.{int(now % 1 * 1000):03d}Z"
    line = {"time": stamp, "level": level, "logger": "heliosfs.keeper", "message": message, **fields}
    with contextlib.suppress(OSError):  # the log's disk is full: that ends no mount
        print(json.dumps(line), file=sys.stderr, flush=True)


@dataclass
class Held:
    """What goes to a successor. ``state``: what the worker said when it was ready; ``served``: one was, ever."""

    mountpoint: str
    device: str
    fuse_fd: int
    board: Board
    listener: socket.socket
    worker: Worker | None = None
    state: Any = None
    served: bool = False
    lock_fd: int | None = None

    def give(self, successor: socket.socket) -> bool:
        """Offer everything; says whether it was taken: without its confirmation all stays as it is. Raises OSError."""
        fds = {"fuse": self.fuse_fd, "board": self.board.fd, "listener": self.listener.fileno()}
        message = {"mountpoint": self.mountpoint, "dev": self.device, "state": self.state, "served": self.served}
        if (worker := self.worker) is not None:
            about = {"pid": worker.pid, "started": worker.started, "ready_at": worker.ready_at, "name": worker.name}
            message["worker"] = about
            fds |= {"pidfd": worker.pidfd} | ({"sock": worker.sock.fileno()} if worker.sock else {})
        if self.lock_fd is not None:
            fds["lock"] = self.lock_fd
        wire.send(successor, {**message, "fds": list(fds)}, list(fds.values()))
        answer, unwanted = wire.receive(successor)
        wire.close(unwanted)
        return bool(answer and answer.get("taken"))


def listen(path: str, mode: int) -> socket.socket:
    """Listen there, in place of whoever did until now."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(f"{path}.new")
    os.chmod(f"{path}.new", mode)
    listener.listen(8)
    listener.setblocking(False)
    os.rename(f"{path}.new", path)
    return listener


def mount(place: str, options: str, path: str, mode: int) -> Held:
    """Mount at a place, and listen at a path. Raises OSError."""
    listener = listen(path, mode)
    try:
        fuse_fd = kernel.mount(place, options)
        device = kernel.device(place)
        if device is None:
            raise FileNotFoundError(f"the new mount is not in /proc/self/mountinfo as {place}")
    except OSError:
        os.unlink(path)
        raise
    board = Board.create()
    board.mounted_ns = time.time_ns()
    log("info", "mounted", mountpoint=place, dev=device)
    return Held(place, device, fuse_fd, board, listener)


class Moot(OSError):
    """There is nothing to take over any more: the mount is gone, or somebody else has come to see to the place."""


def take_over(place: str, path: str, mode: int, uids: list[int], orphan_s: float, asker: int | None = None) -> Held:
    """Take the mount at a place, which belongs to a socket, from its keeper or from the worker that was left alone.

    ``asker``: the pid of that worker, where it started us; nobody else has the mount.

    Raises ConnectionError when a keeper is there and does not give, another OSError when nobody brings it: Moot when
    nobody will.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(ANSWER_S)
        try:
            sock.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            return _from_worker(place, path, mode, uids, orphan_s, asker)
        try:
            return _from_keeper(sock)
        except TimeoutError:
            raise ConnectionError(f"the keeper at {path} does not answer") from None


def _from_keeper(sock: socket.socket) -> Held:
    wire.send(sock, {"hello": "successor"})
    answer, received = wire.receive(sock)
    if answer is None:
        raise ConnectionRefusedError("the running keeper does not hand over: it is ending, or belongs to somebody else")
    fds: dict[str, int] = dict(zip(answer["fds"], received, strict=True))
    held = Held(
        answer["mountpoint"], answer["dev"], fds["fuse"], Board(fds["board"]), socket.socket(fileno=fds["listener"])
    )
    held.state, held.served, held.lock_fd = answer["state"], answer["served"], fds.get("lock")
    if about := answer.get("worker"):
        held.worker = Worker(pidfd=fds["pidfd"], **about)
        if "sock" in fds:
            held.worker.sock = socket.socket(fileno=fds["sock"])
            held.worker.sock.setblocking(False)
    wire.send(sock, {"taken": True})
    return held


def _from_worker(place: str, path: str, mode: int, uids: list[int], orphan_s: float, asker: int | None) -> Held:
    """Wait at the socket for the worker, which brings the descriptors with its hello."""
    watched = None if asker is None else _watch(asker)
    try:
        return _met(place, path, listen(path, mode), uids, time.monotonic() + orphan_s, watched)
    finally:
        if watched is not None:
            os.close(watched)


def _met(place: str, path: str, listener: socket.socket, uids: list[int], end: float, watched: int | None) -> Held:
    ours, poller = _inode(path), select.poll()
    for fd in [listener.fileno()] if watched is None else [listener.fileno(), watched]:
        poller.register(fd, select.POLLIN)
    while (left := end - time.monotonic()) > 0:
        if kernel.device(place) is None or _inode(path) != ours:
            raise Moot("nobody needs another keeper any more")
        came = [fd for fd, _ in poller.poll(min(left, LOOK_S) * 1000)]
        if came and listener.fileno() not in came:
            raise Moot("the worker that had the mount is gone")
        try:
            sock, _ = listener.accept()
        except BlockingIOError:
            continue
        sock.settimeout(1.0)
        try:
            message, fds = wire.receive(sock)
        except OSError:
            message, fds = None, []
        if message is None or len(fds) != 2 or wire.peer(sock)[1] not in uids or not kernel.connected(fds[0]):
            wire.close(fds)
            sock.close()
            continue
        for each in (sock, listener):
            each.setblocking(False)
        now = time.monotonic()
        worker = Worker.of_peer(sock, now, str(message.get("name", "")))
        worker.sock, worker.ready_at = sock, now if message["ready"] else None
        held = Held(message["mountpoint"], message["dev"], fds[0], Board(fds[1]), listener, worker)
        held.state, held.served = message["state"], bool(message["ready"])
        return held
    raise TimeoutError(f"no keeper and no worker came to {path}")


def _watch(pid: int) -> int:
    """A descriptor that is readable when the process is gone. Raises Moot when it is already."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        raise Moot("the worker that had the mount is gone") from None


def _inode(path: str) -> int | None:
    try:
        return os.lstat(path).st_ino
    except FileNotFoundError:
        return None
