"""What keeper and worker say to each other: one JSON object a message on a SEQPACKET socket, descriptors beside it."""

from __future__ import annotations

import array
import contextlib
import json
import os
import socket
import struct
from collections.abc import Mapping, Sequence
from typing import Any, Final

MESSAGE_MAX: Final = 64 << 10
"""Longest message, in bytes."""

FDS_MAX: Final = 8
"""Most descriptors that come with a message."""

NEXT: Final = ".next"
"""What follows the name of a keeper's socket is where its successor listens until it has the mount."""

ENVIRON: Final = "HELIOS_KEEPER"
"""Names the keeper's socket in a worker's environment."""


def send(sock: socket.socket, message: Mapping[str, Any], fds: Sequence[int] = ()) -> None:
    """Send a message; an OSError means that the other side is gone or does not take it."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([json.dumps(message).encode()], rights, socket.MSG_NOSIGNAL)


def receive(sock: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """The next message and its descriptors (not inherited by children); None when the other side is gone, or says
    something that is none, or is too long.

    Raises BlockingIOError or TimeoutError when there is none yet.
    """
    fds = array.array("i")
    try:
        space = socket.CMSG_SPACE(FDS_MAX * fds.itemsize)
        data, rights, flags, _ = sock.recvmsg(MESSAGE_MAX, space, socket.MSG_CMSG_CLOEXEC)
    except ConnectionError:
        return None, []
    for level, kind, content in rights:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    message = None
    with contextlib.suppress(ValueError):
        message = json.loads(data)
    if type(message) is dict and not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        return message, list(fds)
    close(fds)
    return None, []


def peer(sock: socket.socket) -> tuple[int, int]:
    """Pid and user id of who made the other end (SO_PEERCRED); pid 0: it is in a namespace that we can't see into."""
    pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid


def close(fds: Sequence[int]) -> None:
    """Close descriptors that came with a message that nobody wants."""
    for fd in fds:
        os.close(fd)
