"""Processes named so that a reused pid is never mistaken for them: the pid and when it started.

What runs is written under ``$HELIOS_HOME/run/``; whoever reads such a record later must know whether that very process
still lives before signalling it.
"""

from __future__ import annotations

import os
import select
import signal
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ProcessId:
    """A process: ``pid`` and ``start``, its start as ``<boot id>:<clock ticks since boot>`` (proc(5), field 22)."""

    pid: int
    start: str

    @classmethod
    def of(cls, pid: int) -> ProcessId | None:
        """The living process with this pid, or None (a zombie no longer lives)."""
        start = _start(pid)
        return None if start is None else cls(pid, start)

    @classmethod
    def current(cls) -> ProcessId:
        """This process."""
        start = _start(os.getpid())
        if start is None:
            raise RuntimeError("/proc is not mounted, so processes can't be told apart")
        return cls(os.getpid(), start)

    def alive(self) -> bool:
        return _start(self.pid) == self.start

    def send(self, sig: signal.Signals) -> bool:
        """Signal the process if it still lives; says whether it did. Never reaches a later owner of the pid."""
        try:
            fd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return False
        try:
            if not self.alive():
                return False
            signal.pidfd_send_signal(fd, sig)
        except ProcessLookupError:
            return False
        finally:
            os.close(fd)
        return True

    def wait(self, timeout_s: float) -> bool:
        """Wait until the process, which need not be a child, has ended; says whether it has."""
        try:
            fd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return True
        try:
            if not self.alive():
                return True
            poller = select.poll()
            poller.register(fd, select.POLLIN)
            return bool(poller.poll(max(0.0, timeout_s) * 1000))
        finally:
            os.close(fd)

    def end(self, grace_s: float) -> bool:
        """SIGTERM, then after ``grace_s`` seconds SIGKILL; says whether it is gone."""
        end = time.monotonic() + grace_s
        if not self.send(signal.SIGTERM) or self.wait(end - time.monotonic()):
            return True
        self.send(signal.SIGKILL)
        return self.wait(5.0)


def _start(pid: int) -> str | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
        fields = stat[stat.rindex(b")") + 2 :].split()  # the name may hold blanks and brackets
    except (FileNotFoundError, ProcessLookupError, ValueError):
        return None
    if fields[0] in (b"Z", b"X"):
        return None
    return f"{_boot_id()}:{int(fields[19])}"


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
