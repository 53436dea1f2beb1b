"""The mount on this node that volumes are taken from, and its control API (docs/control-api.md). Everything blocks."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any, Final

from helios import mounts
from helios.errors import HeliosError, NotFound, Unavailable
from helios.home import Home
from helios.http.client import HttpClient
from helios.mounts import MountEntry, MountState

RETRY_S: Final = 0.1
"""How long to wait before a mount whose worker is being replaced is asked again, in seconds."""


class MountOfNode:
    """The mount at ``mountpoint``, or the only one of the home. Threads may share it."""

    def __init__(self, home: Home, mountpoint: Path | None) -> None:
        self._home, self._wanted = home, mountpoint
        self._lock = threading.Lock()
        self._client: HttpClient | None = None

    def state(self) -> MountState:
        """What it says about itself. Raises Unavailable when there is none, or more than one."""
        place = None if self._wanted is None else str(mounts.canonical(self._wanted))
        running = [state for state, alive in mounts.states(self._home) if alive and place in (None, state.mountpoint)]
        if len(running) == 1:
            return running[0]
        if running:
            raise Unavailable(
                f"{self._home.root} has several mounts: {', '.join(state.mountpoint for state in running)}",
                hint="Set csi.mount (or --mount) to the one that volumes are taken from.",
            )
        where = "no mount" if place is None else f"no mount at {place}"
        raise Unavailable(
            f"{self._home.root} has {where}: nothing can be published on this node",
            hint="Look whether the filesystem's pods run on it.",
        )

    def root(self) -> tuple[Path, MountEntry]:
        """Where it is mounted, and its entry in the kernel's table. Raises Unavailable."""
        mountpoint = Path(self.state().mountpoint)
        entry = mounts.find_mount(mountpoint)
        if entry is None or entry.fstype != mounts.FSTYPE:
            raise Unavailable(
                f"nothing is mounted at {mountpoint} as this process sees it",
                hint="The driver's container needs the mount's directory with mountPropagation: HostToContainer.",
            )
        return mountpoint, entry

    def call(self, method: str, path: str, body: Any = None, *, timeout_s: float) -> Any:
        """What the control API answers below ``/api/v1/``; asked again while its process is replaced.

        Raises the error that it answers with, Unavailable, DeadlineExceeded.
        """
        end = time.monotonic() + timeout_s
        while True:
            left = max(0.05, end - time.monotonic())
            try:
                return self._client_of(self.state().socket).json(method, f"/api/v1/{path}", body=body, timeout_s=left)
            except Unavailable as error:
                # Others are the registry's or the disk's, and come from a process that does answer.
                if "can't be reached" not in error.message or time.monotonic() + RETRY_S > end:
                    raise
            time.sleep(RETRY_S)

    def close(self) -> None:
        with self._lock:
            if self._client is not None:
                self._client.close()

    def _client_of(self, socket: str) -> HttpClient:
        base = f"unix:{socket}"
        with self._lock:
            if self._client is None or self._client.base != base:
                if self._client is not None:
                    self._client.close()
                self._client = HttpClient(base)
            return self._client


def look(path: Path, timeout_s: float) -> None:
    """Wait until the directory can be listed. A call into a filesystem that hangs does not return.

    Raises Unavailable when it can't in time, with the last reason.
    """
    end = time.monotonic() + timeout_s
    while True:
        try:
            with os.scandir(path) as found:
                next(found, None)
            return
        except OSError as error:
            if time.monotonic() + RETRY_S > end:
                raise Unavailable(
                    f"{path} can't be read: {error.strerror}", hint="Look at the log of the filesystem's worker."
                ) from None
        time.sleep(RETRY_S)


def forget(mount: MountOfNode, volume: str, timeout_s: float) -> bool:
    """Delete a mount's volume, by its id there; says whether that could be done: else the sweep does it later."""
    try:
        mount.call("DELETE", f"volumes/{volume}", timeout_s=timeout_s)
    except NotFound:
        return True
    except HeliosError:
        return False
    return True
