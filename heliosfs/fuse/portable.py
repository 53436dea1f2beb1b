"""The portable mode: pyfuse3 mounts by itself, as any user on any kernel; the mount ends with the process."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pyfuse3
import trio

from helios import mounts
from helios.config import MountSettings
from helios.errors import HeliosError, Unavailable
from heliosfs.fuse import mounting

log = logging.getLogger("heliosfs")

DRAIN_S: Final = 2.0
"""How long requests under way may take after the unmount, in seconds."""

TASKS: Final = 512
"""Requests served at once: a READ that waits for its bytes holds one, and names must still be answered."""

IDLE_TASKS: Final = 8
"""Tasks that stay when there is little to do."""


class PortableMount:
    """A mount of this process alone; ``reason`` says why it is not a native one."""

    mode: Final = "portable"

    def __init__(self, mountpoint: Path, settings: MountSettings, operations: pyfuse3.Operations, reason: str) -> None:
        self.reason, self._operations = reason, operations
        self._mountpoint, self._settings = mountpoint, settings
        self._detached = False
        self.unmounted = False

    async def serve(self, stop: trio.Event, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Mount, serve until the mount is gone; ``stop`` unmounts. Started once the mount answers."""
        with self._mounted():
            async with trio.open_nursery() as loop:
                loop.start_soon(self._loop, loop.cancel_scope)
                loop.start_soon(self._unmount_when_stopped, stop, loop.cancel_scope)
                await mounting.wait_until_it_answers(self._mountpoint)
                await mounting.set_readahead(self._mountpoint, self._settings.readahead_kib)
                mounting.set_background(self._mountpoint)
                task_status.started()
        self.unmounted = True

    @contextlib.contextmanager
    def _mounted(self) -> Iterator[None]:
        mounting.check_unmountable()
        allow_other = self._settings.allow_other and mounting.may_allow_other()
        if self._settings.allow_other and not allow_other:
            log.warning("other users can't read this mount: /etc/fuse.conf lacks user_allow_other")
        try:
            pyfuse3.init(self._operations, str(self._mountpoint), mounting.options(allow_other))
        except RuntimeError as error:
            raise Unavailable(
                f"{self._mountpoint} can't be mounted: {error}",
                hint="The lines before this one in the log say why; `helios doctor` checks this machine.",
            ) from None
        try:
            yield
        finally:
            pyfuse3.close(unmount=not self._detached)

    async def _loop(self, scope: trio.CancelScope) -> None:
        await pyfuse3.main(min_tasks=IDLE_TASKS, max_tasks=TASKS)
        scope.cancel()

    async def _unmount_when_stopped(self, stop: trio.Event, scope: trio.CancelScope) -> None:
        """Unmount, then give the loop, which ends when nobody uses the mount any more, a moment."""
        await stop.wait()
        try:
            await trio.to_thread.run_sync(mounts.detach, self._mountpoint)
            self._detached = True
        except HeliosError as error:
            log.error("the unmount failed", extra={"reason": str(error)})
        await trio.sleep(DRAIN_S)
        log.warning("the mount is still in use: whatever is open there fails from now on")
        scope.cancel()
