"""The ways to a file's bytes while it is not whole on the disk: our own store, or the mount that has the cache."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final, Protocol

import trio

from helios.errors import Unavailable
from heliosfs.client.buffers import Descriptor

log = logging.getLogger("heliosfs.client")

MOUNT_PART: Final = 1 << 20
"""Bytes asked of the mount at a time."""

MOUNT_OPEN_S: Final = 10.0
"""How long the mount may take to open a file, in seconds."""


class Route(Protocol):
    """An open file that may still have to be fetched. Its methods belong to one trio loop."""

    async def read_into(self, offset: int, view: memoryview) -> int:
        """Fill the view as far as the file reaches; the buffer is the callee's until this returns or raises."""

    def local_fd(self) -> int | None:
        """A descriptor of the whole file once it is local; the route's own."""

    async def close(self) -> None:
        """Let go of the file."""


class MountRoute:
    """Reads through a mount, which may hang: a thread that does not come back is abandoned, its buffer with it.

    ``read_into`` raises Unavailable when the mount can't give the bytes or says nothing for ``patience_s``.
    """

    def __init__(self, descriptor: Descriptor, patience_s: float, limiter: trio.CapacityLimiter) -> None:
        self._descriptor, self._patience_s, self._limiter = descriptor, patience_s, limiter

    @classmethod
    async def open(cls, path: Path, size: int, patience_s: float, limiter: trio.CapacityLimiter) -> MountRoute:
        """Raises Unavailable."""
        opening = _Opening(path)
        try:
            with trio.move_on_after(MOUNT_OPEN_S):
                fd = await trio.to_thread.run_sync(opening.run, abandon_on_cancel=True, limiter=limiter)
                opening.taken()
                return cls(Descriptor(fd, str(path), size), patience_s, limiter)
        except OSError as error:
            raise Unavailable(f"{path} can't be opened: {error.strerror}") from error
        finally:
            opening.give_up()
        raise Unavailable(f"{path}: the mount does not answer")

    async def read_into(self, offset: int, view: memoryview) -> int:
        done = 0
        while done < len(view):
            count = min(MOUNT_PART, len(view) - done)
            with trio.move_on_after(self._patience_s) as scope:
                part = await trio.to_thread.run_sync(
                    self._read, offset + done, count, abandon_on_cancel=True, limiter=self._limiter
                )
                view[done : done + count] = part
            if scope.cancelled_caught:
                raise Unavailable(f"the mount was silent for {self._patience_s:g} s")
            done += count
        return done

    def _read(self, offset: int, count: int) -> bytearray:
        part = bytearray(count)
        self._descriptor.read_into(memoryview(part), offset)
        return part

    def local_fd(self) -> int | None:
        return None

    async def close(self) -> None:
        self._descriptor.close()
        await trio.lowlevel.checkpoint()


class SharedRoute:
    """Through the mount as long as that works; then from our own store, which also says what is wrong."""

    def __init__(self, mount: MountRoute, own: Callable[[], Awaitable[Route]]) -> None:
        self._mount, self._open_own = mount, own
        self._own: Route | None = None
        self._opening = trio.Lock()

    async def read_into(self, offset: int, view: memoryview) -> int:
        if self._own is None:
            try:
                return await self._mount.read_into(offset, view)
            except Unavailable as error:
                log.warning("the mount can't give a file; it is fetched", extra={"reason": str(error)})
            async with self._opening:
                if self._own is None:
                    self._own = await self._open_own()
        return await self._own.read_into(offset, view)

    def local_fd(self) -> int | None:
        return None if self._own is None else self._own.local_fd()

    async def close(self) -> None:
        await self._mount.close()
        if self._own is not None:
            await self._own.close()


class _Opening:
    """An open(2) that may come too late: then nobody gets the descriptor, and it is closed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._wanted = True
        self._fd = -1

    def run(self) -> int:
        fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        with self._lock:
            if self._wanted:
                self._fd = fd
                return fd
        os.close(fd)
        return -1

    def taken(self) -> None:
        self._fd = -1

    def give_up(self) -> None:
        with self._lock:
            self._wanted = False
            fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
