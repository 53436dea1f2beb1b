"""The worker's side of the keeper: where its descriptors come from, and what the two tell each other.

Watch ``Attachment`` for reading (it has ``fileno``), then call ``event`` until it returns None:

    attachment = await trio.to_thread.run_sync(attach)
    … serve …
    attachment.ready(state)
    while True:
        await trio.lowlevel.wait_readable(attachment)
        while (event := attachment.event()) is not None: …

After ``Event.LOST`` the mount goes on without a keeper; ``reconnect`` every second offers it to a new one.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Mapping
from enum import Enum, auto
from typing import Any, Final

from helios.errors import DeadlineExceeded, Unavailable
from heliosfs.keeper import wire
from heliosfs.keeper.board import Board

ATTACH_S: Final = 30.0
"""How long the keeper may take to be there and to answer, in seconds; in a pod it may start after the worker."""

NAME: Final = "HELIOS_WORKER"
"""Names this worker in the environment: one with another name takes the mount over (in a pod: the pod's uid)."""

RETRY_S: Final = 0.1
SEND_S: Final = 1.0
"""How long the keeper may take to accept a connection or a message, in seconds."""


class Event(Enum):
    """What the keeper says."""

    STOP = auto()
    """Answer what was taken, flush, call ``ended``, exit with 0. Another worker may follow at once."""
    KEEPER = auto()
    """Another keeper holds the mount now: ``keeper`` changed."""
    LOST = auto()
    """The keeper is gone: ``reconnect``."""


class Attachment:
    """A worker's tie to its keeper. The descriptors are the worker's own, and close with it."""

    def __init__(self, path: str, sock: socket.socket, welcome: Mapping[str, Any], fds: list[int]) -> None:
        self._path, self._sock = path, sock
        self.fuse_fd, board_fd = fds
        """``fuse_fd``: the connection to the kernel, blocking or not as the last one wanted it."""
        self.board = Board(board_fd)
        self.mountpoint = str(welcome["mountpoint"])
        self.device = str(welcome["dev"])
        """``major:minor`` of the mount."""
        self.generation = int(welcome["generation"])
        self.keeper = wire.peer(sock)[0]
        """The keeper's pid; 0: in a namespace that this process can't see into."""
        self.external = bool(welcome.get("external"))
        """Whether somebody else than the keeper started this process, and will start the next keeper."""
        self._ready: dict[str, object] = {"ready": False, "state": None}

    def fileno(self) -> int:
        """The socket to watch; another one after ``reconnect``."""
        return self._sock.fileno()

    @property
    def dropped(self) -> bool:
        """Whether the keeper gave up on this process. It must not touch the mount any more."""
        return self.board.generation != self.generation

    def ready(self, state: object = None) -> None:
        """Say that the mount is served; ``state`` (for JSON) goes to whoever started the keeper."""
        self._ready = {"ready": True, "state": state}
        self._say(self._ready)

    def failed(self, code: str, message: str, hint: str | None = None) -> None:
        """Say why a worker that was never ready is about to exit; it goes to whoever started the keeper."""
        self._say({"failed": {"code": code, "message": message, "hint": hint}})

    def ended(self, reason: str) -> None:
        """Say why the worker is about to exit with 0: ``unmounted`` (the keeper ends too), ``stopped``."""
        self._say({"ended": reason})

    def event(self) -> Event | None:
        """What the keeper said next; None: nothing yet. Never waits."""
        try:
            message, fds = wire.receive(self._sock)
        except BlockingIOError:
            return None
        wire.close(fds)
        if message is None:
            return Event.LOST
        if "keeper" in message:
            self.keeper, self.external = wire.peer(self._sock)[0], bool(message.get("external"))
            return Event.KEEPER
        if message.get("stop"):
            return Event.STOP
        raise Unavailable(f"the keeper said {message!r}", hint="Keeper and worker must be of versions that fit.")

    def reconnect(self) -> bool:
        """After LOST: offer the mount to a new keeper, or else to the old one, which is still there if there is no new
        one; says whether one listens. Takes up to two seconds.

        That keeper answers with Event.KEEPER, or hangs up (LOST again) because it has a mount of its own.
        """
        return self._offer(self._path + wire.NEXT) or self._offer(self._path)

    def _offer(self, path: str) -> bool:
        try:
            sock = _connect(path)
        except OSError:
            return False
        about = {"mountpoint": self.mountpoint, "dev": self.device, "generation": self.generation}
        try:
            wire.send(sock, {**_hello(), **about, **self._ready}, [self.fuse_fd, self.board.fd])
        except OSError:
            sock.close()
            return False
        sock.setblocking(False)
        self._sock.close()
        self._sock = sock
        return True

    def close(self) -> None:
        """Hang up and close the descriptors."""
        self._sock.close()
        self.board.close()
        os.close(self.fuse_fd)

    def _say(self, message: Mapping[str, object]) -> None:
        try:
            wire.send(self._sock, message)
        except ConnectionError:
            return  # the next event is LOST


def attach(path: str | None = None, timeout_s: float = ATTACH_S) -> Attachment:
    """Connect to the keeper at a socket ($HELIOS_KEEPER), say hello and receive the mount. Blocks.

    A keeper answers when the last worker is gone. Raises DeadlineExceeded, Unavailable.
    """
    path = path or os.environ.get(wire.ENVIRON, "")
    if not path:
        raise Unavailable(f"{wire.ENVIRON} is not set", hint="`helios mount` starts the keeper, which sets it.")
    end = time.monotonic() + timeout_s
    while True:
        try:
            sock = _connect(path)
        except OSError as error:
            if time.monotonic() + RETRY_S > end:
                raise DeadlineExceeded(f"there is no keeper at {path}: {error.strerror or error}") from None
            time.sleep(RETRY_S)
            continue
        try:
            sock.settimeout(max(RETRY_S, end - time.monotonic()))
            welcome: dict[str, Any] | None = None
            fds: list[int] = []
            with contextlib.suppress(ConnectionError):  # it hung up at once
                wire.send(sock, _hello())
                welcome, fds = wire.receive(sock)
            if welcome is None or len(fds) != 2:
                raise Unavailable(
                    f"the keeper at {path} does not want this worker",
                    hint="It wants the one that it started, or with --external those of an allowed user.",
                )
            sock.setblocking(False)
            return Attachment(path, sock, welcome, fds)
        except TimeoutError:
            sock.close()
            raise DeadlineExceeded(f"the keeper at {path} did not answer in {timeout_s:.0f} s") from None
        except BaseException:
            sock.close()
            raise


def _hello() -> dict[str, object]:
    return {"hello": 1, "name": os.environ.get(NAME, "")}


def _connect(path: str) -> socket.socket:
    """Raises OSError when nobody listens there, or somebody else does."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.settimeout(SEND_S)
    try:
        sock.connect(path)
        if (uid := wire.peer(sock)[1]) not in (0, os.getuid()):
            raise PermissionError(f"the socket {path} belongs to user {uid}")
    except BaseException:
        sock.close()
        raise
    return sock
