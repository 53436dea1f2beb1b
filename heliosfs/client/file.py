"""One open file: from the page cache and the disk once it is whole, fetched and verified before."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio

from helios.errors import NoSpace, Unavailable
from heliosfs.blobs import BlobRef
from heliosfs.client.buffers import PART, Descriptor, clipped, writable
from heliosfs.client.caches import Cache
from heliosfs.client.calls import Calls
from heliosfs.client.routes import Route
from heliosfs.client.values import FileInfo, FileStatus

if TYPE_CHECKING:
    from typing_extensions import Buffer

SMALL: Final = 256 << 10
"""Reads of up to this many bytes are tried on the spot, from the page cache."""

LOOK_S: Final = 0.1
"""How often it is looked whether another process has made the file whole, in seconds."""

SETTLE_S: Final = 20.0
"""How long a file, all of which was read, may take to be whole on the disk, in seconds."""

FETCH_PART: Final = 1 << 20


class File:
    """An open file of a model. Its methods belong to the store's trio loop; tasks may read side by side."""

    def __init__(
        self,
        info: FileInfo,
        want: BlobRef,
        cache: Cache,
        local: Descriptor | None,
        route: Route | None,
        threads: trio.CapacityLimiter,
        forget: Callable[[File], None],
    ) -> None:
        self.info = info
        self._want, self._cache, self._local, self._route = want, cache, local, route
        self._threads, self._forget = threads, forget
        self._calls = Calls(f"{want.repo.id} {info.path}")
        self._looked = 0.0

    @property
    def path(self) -> str:
        """Its path in the repository."""
        return self.info.path

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return self.info.size

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._calls.closed

    @property
    def whole(self) -> Descriptor | None:
        """The whole local file, if it is known to be one. Threads may ask, and read from it."""
        return self._local

    async def read_into(self, buffer: Buffer, offset: int = 0, *, deadline_s: float | None = None) -> int:
        """Fill the buffer from ``offset``; returns how many bytes it filled, fewer only at the end of the file.

        The buffer must be writable and contiguous, and is left alone once this returns or raises; what is in it after
        an error is undefined. Bytes that are not local are fetched; every byte was verified. Without a deadline a
        read ends when its sources have been silent for about twice ``mount.request_deadline_s`` each.

        Raises TypeError or ValueError for a bad buffer or offset; IntegrityError when no source has the right bytes;
        DeadlineExceeded, Unavailable, Closed.
        """
        view = clipped(writable(buffer), offset, self.size)
        await self._calls.run(f"a read at byte {offset}", deadline_s, partial(self._fill, view, offset))
        return len(view)

    async def read(self, offset: int = 0, size: int | None = None, *, deadline_s: float | None = None) -> bytearray:
        """Up to ``size`` bytes (all that follow, by default) from ``offset``, in a buffer of their own.

        Raises what ``read_into`` raises.
        """
        out = self.buffer_for(offset, size)
        await self.read_into(out, offset, deadline_s=deadline_s)
        return out

    def buffer_for(self, offset: int, size: int | None) -> bytearray:
        """A buffer for up to ``size`` bytes, or all that follow ``offset``. Raises ValueError for negative numbers."""
        if offset < 0 or (size is not None and size < 0):
            raise ValueError(f"offset {offset} and size {size} must not be negative")
        left = max(0, self.size - offset)
        return bytearray(left if size is None else min(size, left))

    async def fetch(
        self, *, progress: Callable[[int], None] = lambda _: None, deadline_s: float | None = None
    ) -> Descriptor:
        """Make the whole file local; ``progress`` is called with the bytes that are.

        Raises what ``read_into`` raises, and NoSpace when the disk does not take the file.
        """
        return await self._calls.run("the fetch", deadline_s, partial(self._fetch, progress))

    def fileno(self) -> int:
        """A read-only descriptor of the whole file, valid until ``close``: for preadv, mmap, sendfile, io_uring.

        Raises Unavailable while not all of the file is local.
        """
        self._calls.check()
        if self._local is None:
            raise Unavailable(f"{self.path} is not all local yet", hint="Fetch it first: file.fetch(), model.warm().")
        return self._local.fileno()

    @property
    def local_path(self) -> Path | None:
        """Where the whole file lies on this machine's disk; None while it does not. To be read only."""
        if self._local is None or not self.size:
            return None
        path = Path(os.readlink(f"/proc/self/fd/{self._local.fileno()}"))
        return path if path.exists() else None

    def status(self) -> FileStatus:
        """How much of it is local now."""
        self._calls.check()
        if self._local is not None:
            return FileStatus(self.path, self.size, self.size, True)
        held = self._cache.store.status(self.info.sha256)
        return FileStatus(self.path, self.size, held.local_bytes, held.complete)

    async def close(self) -> None:
        """Let go of the file; reads under way raise Closed. What is being fetched goes on."""
        if self._calls.closed:
            return
        if self._local is not None:
            self._local.close()
        await self._calls.close()
        self._forget(self)
        if self._local is not None:
            self._local.close()
        if self._route is not None:
            await self._route.close()

    async def __aenter__(self) -> File:
        return self

    async def __aexit__(self, *exc: object) -> None:
        with trio.CancelScope(shield=True):
            await self.close()

    # --- inside ---

    async def _fill(self, view: memoryview, offset: int) -> None:
        done = 0
        while True:
            part = view[done : done + PART]
            if (local := await self.look()) is not None:
                await self._fill_local(local, part, offset + done)
            elif part and self._route is not None:
                await self._route.read_into(offset + done, part)
            done += len(part)
            if done >= len(view):
                return

    async def _fill_local(self, local: Descriptor, part: memoryview, offset: int) -> None:
        if len(part) <= SMALL and local.read_cached(part, offset):
            await trio.lowlevel.checkpoint()
            return
        # Not abandoned when cancelled: the buffer is the caller's again as soon as this returns.
        await trio.to_thread.run_sync(local.read_into, part, offset, limiter=self._threads)

    async def look(self) -> Descriptor | None:
        """The whole file, if it has become local."""
        if self._local is None and self._route is not None and (fd := self._route.local_fd()) is not None:
            self._local = Descriptor.again(fd, self.path, self.size)
        now = time.monotonic()
        if self._local is None and self._cache.shared is not None and now >= self._looked + LOOK_S:
            self._looked = now
            found = await trio.to_thread.run_sync(self._cache.open_shared, self._want, limiter=self._threads)
            if (meanwhile := self.whole) is None:
                self._local = found
            elif found is not None and found is not meanwhile:
                found.close()
        return self._local

    async def _fetch(self, progress: Callable[[int], None]) -> Descriptor:
        """Read it from start to end, which fetches it ahead of us, until it is whole."""
        scratch = memoryview(bytearray(FETCH_PART))
        offset = 0
        while (local := await self.look()) is None and offset < self.size:
            part = clipped(scratch, offset, self.size)
            await self._fill(part, offset)
            offset += len(part)
            progress(max(offset, self._cache.store.status(self.info.sha256).local_bytes))
        if local is None:
            local = await self._settled()
        progress(self.size)
        return local

    async def _settled(self) -> Descriptor:
        """All of it was read, so it becomes whole as soon as it is flushed and renamed; unless the disk refuses it."""
        with trio.move_on_after(SETTLE_S):
            while (local := await self.look()) is None:  # noqa: ASYNC110 - another process may be the one to do it
                await trio.sleep(0.01)
            return local
        raise NoSpace(
            f"{self.path} was read but is not kept: the disk of {self._cache.root} is full or can't be written",
            hint="Free some space there, or choose another directory: connect(cache=...), mount.cache.",
        )
