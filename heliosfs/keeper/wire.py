"""What keeper and worker say to each other: one JSON object a message on a SEQPACKET socket, descriptors beside it."""

from __future__ import annotations

import array
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

ENVIRON: Final = "HELIOS_KEEPER"
"""Names the keeper's socket in a worker's environment."""


class ProtocolError(OSError):
    """The other side said something that is not in the protocol."""


def send(sock: socket.socket, message: Mapping[str, Any], fds: Sequence[int] = ()) -> None:
    """Send a message; an OSError means that the other side is gone or does not take it."""
    data = json.dumps(message).encode()
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([data], rights, socket.MSG_NOSIGNAL)


def receive(sock: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """The next message and its descriptors (not inherited by children); None when the other side is gone.

    Raises BlockingIOError or TimeoutError when there is none yet, ProtocolError.
    """
    fds = array.array("i")
    try:
        data, rights, flags, _ = sock.recvmsg(
            MESSAGE_MAX, socket.CMSG_SPACE(FDS_MAX * fds.itemsize), socket.MSG_CMSG_CLOEXEC
        )
    except ConnectionError:
        return None, []
    for level, kind, content in rights:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    if not data:
        return None, []
    try:
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise ProtocolError("a message of keeper and worker is too long")
        message = json.loads(data)
        if type(message) is not dict:
            raise ProtocolError(f"not a message of keeper and worker: {data[:100]!r}")
    except ValueError:
        close(fds)
        raise ProtocolError(f"not a message of keeper and worker: {data[:100]!r}") from None
    except ProtocolError:
        close(fds)
        raise
    return message, list(fds)


def peer(sock: socket.socket) -> tuple[int, int]:
    """Pid and user id of who made the other end (SO_PEERCRED)."""
    pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid


def close(fds: Sequence[int]) -> None:
    """Close descriptors that came with a message that nobody wants."""
    for fd in fds:
        os.close(fd)
