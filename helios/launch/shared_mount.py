"""The mount at ``$HELIOS_HOME/mnt`` that ``quickstart`` and ``serve`` share: the first mounts, the last unmounts.

Whoever uses it holds ``run/mnt.users`` under a shared flock, which the kernel drops for the dead; the last one out is
the one that gets it exclusively, and unmounts if one of us mounted (``run/mnt.json`` names that mount). A run that was
killed leaves a mount behind; the next one uses it, or repairs it if its daemon died, and unmounts it at its end.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from helios import mounting, unmounting
from helios.decoding import from_json
from helios.errors import Conflict, DeadlineExceeded
from helios.home import Home
from helios.mounts import MountState, canonical, state_of

LOCK_S: Final = mounting.START_S + mounting.STOP_S
"""How long another run may take to mount or to unmount, in seconds."""

CLAIM_S: Final = 10.0
"""How long somebody else may have the mount's claim who doesn't serve it, in seconds."""


class _Mounted(msgspec.Struct, frozen=True):
    """Which mount it was: its keeper may be another process by now."""

    mountpoint: str
    since: float


@contextlib.contextmanager
def shared_mount(home: Home) -> Iterator[MountState]:
    """Use the home's mount for the time of the context; raises what ``helios.mounting`` raises."""
    home.ensure_run()
    users = os.open(home.run / "mnt.users", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        _lock(users, fcntl.LOCK_SH)
        yield _find_or_mount(home)
    finally:
        try:
            with contextlib.suppress(BlockingIOError):  # somebody else uses it still
                fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _unmount_if_ours(home)
        finally:
            os.close(users)


def mountpoint(home: Home) -> Path:
    return canonical(home.root / "mnt")


def _find_or_mount(home: Home) -> MountState:
    starting = os.open(home.run / "mnt.start", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        _lock(starting, fcntl.LOCK_EX)
        path = mountpoint(home)
        end = time.monotonic() + CLAIM_S
        while True:
            state = state_of(home, path)
            if state is not None and mounting.lives(home, path, state):
                return state
            try:
                state = mounting.start(home, mounting.prepare(home, path), {})
                break
            except Conflict:  # what was killed has its claim for a moment yet, or its worker takes another keeper
                if time.monotonic() > end:
                    raise
                time.sleep(0.05)
        _record(home).write_bytes(msgspec.json.encode(_Mounted(state.mountpoint, state.since)))
        return state
    finally:
        os.close(starting)


def _unmount_if_ours(home: Home) -> None:
    state = state_of(home, mountpoint(home))
    try:
        ours = from_json(_record(home).read_bytes(), _Mounted)
    except (FileNotFoundError, msgspec.DecodeError):
        return  # a user mounted it: it stays
    if state is not None and _Mounted(state.mountpoint, state.since) == ours:
        unmounting.stop(home, mountpoint(home))
    _record(home).unlink(missing_ok=True)


def _record(home: Home) -> Path:
    return home.run / "mnt.json"


def _lock(fd: int, kind: int) -> None:
    deadline = time.monotonic() + LOCK_S
    while True:
        try:
            return fcntl.flock(fd, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise DeadlineExceeded(f"another run took longer than {LOCK_S:.0f} s to mount or unmount") from None
            time.sleep(0.05)
