"""What a mount's daemon is to do, and its claim on the mount point."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from helios import mounts
from helios.config import Config
from helios.errors import Conflict
from helios.home import Home, hash_text
from helios.lockfile import LockFile


@dataclass(frozen=True)
class Plan:
    """What to mount where. ``mountpoint`` is canonical and empty; ``created``: it was made for this mount."""

    mountpoint: Path
    config: Config
    home: Home
    environ: Mapping[str, str]
    created: bool = False
    log: str | None = None
    portable: str = "pyfuse3 mounts alone"
    """Why the mount is not a native one, where it is not."""

    @property
    def cache(self) -> Path:
        """The local tier's directory."""
        configured = self.config.mount.cache
        return Path(os.path.abspath(configured)) if configured else self.home.cache

    @property
    def l2(self) -> Path | None:
        """The second tier's directory, if there is one."""
        configured = self.config.mount.l2
        return Path(os.path.abspath(configured)) if configured else None

    @property
    def name(self) -> str:
        """A short name that no other mount has."""
        return f"{hash_text(str(self.mountpoint)):016x}"


@contextlib.contextmanager
def claimed(plan: Plan) -> Iterator[LockFile]:
    """The claim on the mount point of a daemon that mounts by itself."""
    with contextlib.ExitStack() as stack:
        state_file = mounts.claim(plan.home, plan.mountpoint)
        if state_file is None:
            raise Conflict(f"{plan.mountpoint} is mounted already, or about to be")
        stack.callback(state_file.release)
        if plan.created:
            stack.callback(_remove_directory, plan.mountpoint)
        stack.enter_context(_pid_file(plan))
        yield state_file


@contextlib.contextmanager
def _pid_file(plan: Plan) -> Iterator[None]:
    """``heliosfs-worker.pid``; a second mount of the same home has its own name in it."""
    run = plan.home.run
    held = LockFile.acquire(run / "heliosfs-worker.pid") or LockFile.acquire(run / f"heliosfs-worker-{plan.name}.pid")
    if held is None:
        raise Conflict(f"another process holds {run}/heliosfs-worker-{plan.name}.pid")
    try:
        held.write(f"{os.getpid()}\n".encode())
        yield
    finally:
        held.release()


def _remove_directory(path: Path) -> None:
    with contextlib.suppress(OSError):  # not empty: somebody uses it
        path.rmdir()
