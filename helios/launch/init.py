"""The first process of a container: passes signals on and reaps orphans.

A container's process 1 inherits whatever loses its parent there and has to reap it, and a signal that it has no handler
for does nothing. So a command that may be process 1 goes on in a child of it.
"""

from __future__ import annotations

import os
import signal
from typing import Final

PASSED: Final = (
    signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2,
)  # fmt: skip


def as_init(pid: int | None = None) -> None:
    """Where this is process 1 (``pid`` stands in for its pid): return in a child, and stay as its init, which ends with
    the child's exit status. Elsewhere do nothing. To be called before there are threads."""
    if (os.getpid() if pid is None else pid) != 1:
        return
    # Blocked until the child is there, so that none is lost; it gets them back as they were.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (*PASSED, signal.SIGCHLD))
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return
    os._exit(_stay(child))


def _stay(child: int) -> int:
    """Until the child ends; its exit status, or 128 + the signal that ended it."""
    while True:
        number = signal.sigwait((*PASSED, signal.SIGCHLD))
        if number != signal.SIGCHLD:
            os.kill(child, number)  # it is not reaped yet, so it is this one
            continue
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return 1  # somebody else reaped it, which nobody can
            if pid == 0:
                break
            if pid == child:
                code = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else 128 - code
