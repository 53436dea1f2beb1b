"""``helios umount``: what this home mounted goes, whatever becomes of the processes that serve it."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import Final

from helios import mounting, mounts
from helios.errors import Conflict, NotFound, Unavailable
from helios.home import Home
from helios.lockfile import held
from helios.mounts import FSTYPE, MountEntry, MountState, canonical, find_mount, state_of, state_path
from helios.process import ProcessId

DIE_S: Final = 5.0
"""How long a killed process may take to be gone once its mount was aborted, in seconds."""


def stop(home: Home, path: Path, timeout_s: float = mounting.STOP_S) -> Path:
    """Unmount what this home mounted at ``path`` and wait until its daemon is gone.

    A process that does not even end by SIGKILL, because it waits inside the kernel, keeps nothing mounted and nobody
    waiting; Unavailable then says which. Also raises NotFound when nothing is mounted there, Conflict when it is not a
    mount of this home.
    """
    mountpoint = canonical(path)
    entry, state = find_mount(mountpoint), state_of(home, mountpoint)
    if state is None:
        if held(state_path(home, mountpoint)):
            raise Conflict(f"{mountpoint} is just being mounted", hint="Try again in a moment.")
        if entry is None:
            raise NotFound(f"nothing is mounted at {mountpoint}")
        raise Conflict(
            f"what is mounted at {mountpoint} ({entry.fstype}) is no mount of {home.root}",
            hint="Set HELIOS_HOME to the one that mounted it.",
        )
    if held(state_path(home, mountpoint)):
        if left := _end(state, timeout_s):
            _let_go(mountpoint, entry, left)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(state.pid, 0)  # it may be our own child
    mounting.sweep(home, mountpoint)
    return mountpoint


def _end(state: MountState, timeout_s: float) -> list[ProcessId]:
    """End the processes of a mount; returns those that do not."""
    if state.worker is None:
        return [] if state.process.end(timeout_s) else [state.process]
    if state.process.send(signal.SIGTERM) and not state.process.wait(timeout_s):
        state.worker.send(signal.SIGKILL)  # its keeper does not answer, and it would start another one
    left = [] if state.process.end(0.0) else [state.process]
    # a killed one may take a moment to be gone
    return left if state.worker.wait(mounting.LOCK_S) else [*left, state.worker]


def _let_go(mountpoint: Path, entry: MountEntry | None, left: list[ProcessId]) -> None:
    """Take the mount from processes that do not end. Raises Unavailable when they still don't."""
    aborted = False
    if entry is not None and entry.fstype == FSTYPE and find_mount(mountpoint) == entry:
        aborted = mounts.abort(entry.device)  # before its number may be another mount's
        mounts.detach(mountpoint, force=True)
        aborted |= os.geteuid() == 0
    if left := [process for process in left if not process.wait(DIE_S)]:
        pids = " and ".join(f"process {process.pid}" for process in left)
        told = "who was waiting for it got an error" if aborted else "who waits for it does so until then"
        raise Unavailable(
            f"{mountpoint} is unmounted, but its {pids} can't be ended, not even by SIGKILL; {told}",
            hint="It waits inside the kernel, most likely for a disk that hangs, and has the cache until it ends.",
        )
