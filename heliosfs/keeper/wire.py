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
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([json.dumps(message).encode()], rights, socket.MSG_NOSIGNAL)


def receive(sock: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """The next message and its descriptors (not inherited by children); None when the other side is gone.

    Raises BlockingIOError or TimeoutError when there is none yet, ProtocolError.
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
    if not data:
        return None, []
    try:
        message = json.loads(data)
    except ValueError:
        message = None
    if type(message) is dict and not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        return message, list(fds)
    close(fds)
    raise ProtocolError(f"not a message of keeper and worker, or too long: {data[:100]!r}")


def peer(sock: socket.socket) -> tuple[int, int]:
    """Pid and user id of who made the other end (SO_PEERCRED); pid 0: it is in a namespace that we can't see into."""
    pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid


def hung_up(sock: socket.socket) -> bool:
    """Whether the other side is gone; what it said before is not touched."""
    try:
        return not sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True


def close(fds: Sequence[int]) -> None:
    """Close descriptors that came with a message that nobody wants."""
    for fd in fds:
        os.close(fd)
