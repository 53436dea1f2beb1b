"""Starting keepers (heliosfs/keeper): the processes that hold native mounts, and what they inherit."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from helios.config import MountSettings
from helios.errors import Conflict
from helios.home import Home, hash_text
from helios.lockfile import held
from helios.mounts import claim, states

_LOCK_FD = 10
"""The lowest number for a claim that is inherited: above those that the new process uses."""


def start_options(settings: MountSettings, ready_fd: int) -> list[str]:
    """Options of a keeper that mounts, and says on ``ready_fd`` how it went."""
    mount = "default_permissions,max_read=1048576" + (",allow_other" if settings.allow_other else "")
    return ["--options", mount, "--ready-fd", str(ready_fd)]


@contextlib.contextmanager
def keeper_command(
    home: Home, mountpoint: Path, created: bool, worker: list[str], options: Sequence[str]
) -> Iterator[tuple[list[str], list[int]]]:
    """The command of a keeper, which takes over the claims that are made here. Raises Conflict."""
    name = f"{hash_text(str(mountpoint)):016x}"
    pid_file = home.run / "heliosfs-worker.pid"
    if held(pid_file) or any(alive for _, alive in states(home)):  # another mount of this home has it
        pid_file = home.run / f"heliosfs-worker-{name}.pid"
    state = claim(home, mountpoint)
    if state is None:
        raise Conflict(f"{mountpoint} is mounted already, or about to be")
    lock = fcntl.fcntl(state.fileno(), fcntl.F_DUPFD_CLOEXEC, _LOCK_FD)
    os.close(state.fileno())
    try:
        command = [sys.executable, "-P", "-m", "heliosfs.keeper"]
        command += ["--socket", str(home.socket(f"keeper-{name}")), *options]
        command += ["--lock-fd", str(lock), "--worker-pid-file", str(pid_file)]
        command += ["--created"] if created else []
        yield [*command, str(mountpoint), "--", *worker], [lock]
    finally:
        os.close(lock)


def succeed(home: Home, mountpoint: Path, created: bool, arguments: Sequence[str]) -> None:
    """Start a keeper that takes a mount over from the worker that asks, whose own keeper died.

    ``arguments`` are the worker's. Raises Conflict when there is another keeper already, OSError.
    """
    worker = [sys.executable, "-P", "-m", "heliosfs", *arguments]
    options = ["--take-over", "--asker", str(os.getpid())]
    with keeper_command(home, mountpoint, created, worker, options) as (command, inherited):
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "HELIOS_HOME": str(home.root)},
            pass_fds=inherited,
            start_new_session=True,
        )
