"""A worker as the keeper sees it: a process, and after its hello a socket."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
from typing import Final

from heliosfs.keeper import wire

DIE_S: Final = 5.0
"""How long a killed process may take to be gone; after that nobody waits for it any more."""

_SO_PEERPIDFD = 77


class Worker:
    """Its states: started, attached (``sock``), ready (``ready_at``), told to go (``asked`` or ``hung``).

    ``pid`` is 0 in a namespace that we can't see into; ``pidfd`` says all the same when the process is gone.
    """

    def __init__(self, pid: int, pidfd: int, started: float, ready_at: float | None = None, name: str = "") -> None:
        self.pid, self.pidfd, self.started, self.ready_at, self.name = pid, pidfd, started, ready_at, name
        self.sock: socket.socket | None = None
        self.asked = self.hung = False
        self.ended: str | None = None
        self.kill_at = self.give_up_at = math.inf

    @classmethod
    def spawn(cls, argv: list[str], keeper: str, now: float) -> Worker:
        """Start one: it inherits stdio and the environment, and has a session of its own, so that a terminal's signals
        reach the keeper alone."""
        environ = {**os.environ, wire.ENVIRON: keeper}
        pid = os.posix_spawnp(argv[0], argv, environ, setsid=True, setsigdef=[signal.SIGPIPE])
        return cls(pid, os.pidfd_open(pid), now)

    @classmethod
    def of_peer(cls, sock: socket.socket, now: float, name: str = "") -> Worker:
        """The process at the other end of a socket, started by somebody else."""
        pidfd = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
        return cls(wire.peer(sock)[0], pidfd, now, name=name)

    @property
    def leaving(self) -> bool:
        return self.asked or self.hung

    def stop(self, now: float, grace_s: float) -> None:
        """Ask it to go and kill it when it does not within the grace, or at once where it can't be asked."""
        self.asked = True
        self.kill_at = min(self.kill_at, now + grace_s if self.sock else now)
        if self.sock is not None:
            with contextlib.suppress(OSError):  # it is going by itself, or does not listen
                wire.send(self.sock, {"stop": True})

    def kill(self, now: float) -> bool:
        """SIGKILL, which reaches a stopped process too; False where we may not: in a namespace beside ours."""
        self.kill_at, self.give_up_at = math.inf, now + DIE_S
        try:
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        except ProcessLookupError:
            return True
        except OSError:
            return False
        return True

    def status(self) -> int | None:
        """The exit status of the ended process, -n for signal n; None when only another process can know."""
        try:
            result = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG)
        except ChildProcessError:
            return None
        if result is None:
            return None
        return result.si_status if result.si_code == os.CLD_EXITED else -result.si_status

    def hang_up(self) -> None:
        """Close the socket."""
        if self.sock is not None:
            self.sock.close()
            self.sock = None
