"""File descriptors of this process: how many connections they allow, and what says that none is left.

A client's connection takes one, and its request another one, at a worker. To be out of them is this process's trouble:
it says nothing of a worker, and must not be held against one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import socket
from typing import Final

from helios.errors import UsageError

EACH: Final = 2
"""Descriptors of a client's connection: its own, and its worker's."""
RESERVE: Final = 64
"""Those that no client gets: what the process has of its own, its checks of workers, clients that are turned away."""
OUT: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
"""What the kernel says when it has nothing left for this process, or for any."""


class OutOfDescriptors(Exception):
    """Something could not be asked, because this process has no descriptor left."""


def raise_limit() -> None:
    """Raise the soft limit to the hard one, here and for the processes that are started after."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(OSError, ValueError):  # beyond what the kernel allows anybody: the soft one stays
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def most_connections(configured: int) -> int:
    """Connections that clients may have to this process: as ``configured``, or, for 0, as many as can be served.

    Raises UsageError where the limit of descriptors does not allow so many.
    """
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    allowed = (limit - RESERVE) // EACH if limit != resource.RLIM_INFINITY else 1 << 30
    hint = "Raise the hard limit of open files (ulimit -Hn, LimitNOFILE= of systemd)"
    if allowed < 1:
        raise UsageError(f"{limit} open files are too few for a router, which needs {RESERVE + EACH}", hint=f"{hint}.")
    if configured < 0:
        raise UsageError(
            f"router.max_connections must not be less than 0, not {configured}",
            hint="0 means as many as the limit of open files allows.",
        )
    if configured > allowed:
        raise UsageError(
            f"router.max_connections = {configured} needs {configured * EACH + RESERVE} open files, and the limit is "
            f"{limit}",
            hint=f"{hint}, or set {allowed} or less.",
        )
    return configured or allowed


def exhausted(error: BaseException) -> bool:
    """Whether this error of a connection says that we are out of descriptors, and nothing of its other end."""
    if isinstance(error, socket.gaierror):  # which does not say that a file or a socket could not be opened
        return not _left()
    return isinstance(error, OSError) and error.errno in OUT


def _left() -> bool:
    try:
        os.close(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        return error.errno not in OUT
    return True
