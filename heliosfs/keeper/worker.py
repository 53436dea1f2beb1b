"""A worker as the keeper sees it: a process that goes through phases, and after its hello a socket."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import time
from enum import IntEnum
from typing import Any, Final

from heliosfs.keeper import wire
from heliosfs.keeper.guest import Guest

START_S: Final = 150.0
"""How long a worker may take to be ready."""

DIE_S: Final = 5.0
"""How long a killed process may take to be gone; after that nobody waits for it any more."""

_SO_PEERPIDFD = 77


class Phase(IntEnum):
    """Where a worker is; it never goes back. All end with its process; what else ends them, and what follows:"""

    STARTING = 0  # it is ready: SERVING. After START_S, or when what waits must fail, it counts as hanging: KILLED
    SERVING = 1  # it hangs (policy.py): KILLED. It is told to go, or hangs up, as in any phase before: GOING
    GOING = 2  # after the grace: KILLED
    KILLED = 3  # after DIE_S it is dropped


class Worker:
    """``pid`` is 0 in a namespace that we can't see into; ``pidfd`` says all the same when the process is gone."""

    name = ""
    sock: socket.socket | None = None
    attached = False  # whether it has, or had, the mount's descriptor
    ready_at: float | None = None
    asked = hung = False  # why it goes, or was killed
    late = 0  # the request that is too old, if it is killed for one

    def __init__(self, pid: int, pidfd: int) -> None:
        self.pid, self.pidfd = pid, pidfd
        self.phase, self.deadline = Phase.STARTING, time.monotonic() + START_S
        self.said: dict[str, Any] = {}  # its last words

    @classmethod
    def spawn(cls, argv: list[str], keeper: str) -> Worker:
        """Start one: it inherits stdio and the environment, and has a session of its own, so that a terminal's signals
        reach the keeper alone. Raises OSError."""
        environ = {**os.environ, wire.ENVIRON: keeper}
        pid = os.posix_spawnp(argv[0], argv, environ, setsid=True, setsigdef=[signal.SIGPIPE])
        return cls(pid, os.pidfd_open(pid))

    @classmethod
    def of_peer(cls, guest: Guest) -> Worker:
        """The one at the other end of a socket, started by somebody else. Raises OSError when it is gone."""
        worker = cls(guest.pid, guest.sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD))
        worker.name = guest.name
        worker.attach(guest.sock)
        return worker

    def attach(self, sock: socket.socket) -> None:
        """It has the mount, or is about to get it through this socket."""
        self.sock, self.attached = sock, True

    def hurry(self, limit: float) -> None:
        """It must be ready by then."""
        if self.phase is Phase.STARTING:
            self.deadline = min(self.deadline, limit)

    def ready(self) -> None:
        self.ready_at = time.monotonic()
        if self.phase is Phase.STARTING:
            self.phase, self.deadline = Phase.SERVING, math.inf

    def stop(self, grace_s: float) -> None:
        """Tell it to go; where nothing can be told to it, it is killed at once."""
        self.asked = True
        self.goes(0.0 if self.sock is None else grace_s)
        with contextlib.suppress(OSError):  # it is going by itself, or does not listen
            if self.sock is not None:
                wire.send(self.sock, {"stop": True})

    def goes(self, grace_s: float) -> None:
        """Its process is about to end."""
        if self.phase < Phase.GOING:
            self.phase, self.deadline = Phase.GOING, time.monotonic() + grace_s

    def kill(self) -> bool:
        """SIGKILL, which reaches a stopped process too; False where we may not: in a namespace beside ours."""
        self.phase, self.deadline = Phase.KILLED, time.monotonic() + DIE_S
        try:
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        except OSError as error:
            return isinstance(error, ProcessLookupError)  # just gone
        return True

    def status(self) -> int | None:
        """The exit status of the ended process, -n for signal n; None when only another process can know."""
        with contextlib.suppress(ChildProcessError):
            if result := os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG):
                return result.si_status if result.si_code == os.CLD_EXITED else -result.si_status
        return None

    def hang_up(self) -> None:
        if self.sock is not None:
            self.sock.close()
            self.sock = None
