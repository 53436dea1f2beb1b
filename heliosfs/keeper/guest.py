"""Whoever comes to the keeper's socket: a worker, or the keeper that takes over."""

from __future__ import annotations

import contextlib
import os
import socket
from typing import Any, Final

from heliosfs.keeper import wire

HELLO_S: Final = 1.0
"""How long a guest may take to say hello. Nothing else is done meanwhile: only allowed users are listened to."""


def listen(path: str, uids: list[int]) -> socket.socket:
    """Listen beside that path, for these users; it is to be renamed to it once the mount is ours."""
    listener, beside = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET), path + wire.NEXT
    with contextlib.suppress(FileNotFoundError):  # of one that became no keeper
        os.unlink(beside)
    listener.bind(beside)
    os.chmod(beside, 0o600 if uids == [os.getuid()] else 0o666)
    listener.listen(8)
    listener.setblocking(False)
    return listener


class Guest:
    """Somebody who has said hello, and waits for the answer; ``fds`` came with it."""

    def __init__(self, sock: socket.socket, about: dict[str, Any], fds: list[int]) -> None:
        self.sock, self.about, self.fds = sock, about, fds
        self.pid, _ = wire.peer(sock)
        self.hello, self.name = str(about.get("hello")), str(about.get("name", ""))

    @classmethod
    def greet(cls, listener: socket.socket, uids: list[int]) -> Guest | None:
        """The next one; None: there is nobody, or nobody who may come and says something."""
        with contextlib.suppress(OSError):  # gone again, silent, or not understood
            with listener.accept()[0] as sock:
                sock.settimeout(HELLO_S)
                message, fds = wire.receive(sock) if wire.peer(sock)[1] in uids else (None, [])
                if message is not None:
                    sock.setblocking(False)
                    return cls(sock.dup(), message, fds)
        return None

    def dismiss(self) -> None:
        """Hang up; what it brought goes, too."""
        self.sock.close()
        wire.close(self.fds)
