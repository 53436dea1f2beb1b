"""The client for programs on threads: the classes of ``aio``, run by a portal (portal.py).

Every object may be used from any thread. Whole local files are read in the caller's own thread, straight into its
buffer. An exception that interrupts the caller, such as KeyboardInterrupt, cancels what it waits for.
"""

from __future__ import annotations

import contextlib
import queue
import time
import warnings
import weakref
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helios.names import RepoId
from heliosfs.client import file as async_file
from heliosfs.client import model as async_model
from heliosfs.client import store as async_store
from heliosfs.client import tensors as async_tensors
from heliosfs.client.buffers import clipped, writable
from heliosfs.client.convert import to_numpy, to_torch
from heliosfs.client.portal import Call, Portal
from heliosfs.client.store import CALL_S, assemble, plan, running
from heliosfs.client.tensors import AHEAD, Allocate, fresh
from heliosfs.client.values import (
    Closed,
    FileInfo,
    FileStatus,
    Progress,
    StoreStatus,
    TensorInfo,
    Warmed,
)
from heliosfs.warming import WarmProgress

if TYPE_CHECKING:
    from typing_extensions import Buffer


def connect(
    *,
    home: Path | str | None = None,
    config: Path | str | None = None,
    registry: str | Sequence[str] | None = None,
    cache: Path | str | None = None,
) -> Store:
    """Open a store; ``with`` closes it.

    Configured as every command is: the file, the environment, HELIOS_HOME; the arguments win. ``registry`` is a URL or
    several; without any the home's embedded registry is used, and started if it does not run. ``cache`` is a directory
    that no other process uses; by default the home's, or beside it where another process has that.

    Raises UsageError for a wrong configuration, Conflict when another process has ``cache``, Unavailable, NoSpace.
    """
    chosen = plan(home=home, config=config, registry=registry, cache=cache)
    with ExitStack() as opening:
        parts = assemble(chosen, opening)
        stack = opening.pop_all()

    @asynccontextmanager
    async def keep() -> AsyncIterator[async_store.Store]:
        with stack:
            async with running(parts) as store:
                yield store

    portal = Portal("helios-client")
    return Store(portal, portal.open(keep))


class Store:
    """Models of a registry, with the local cache."""

    def __init__(self, portal: Portal, store: async_store.Store) -> None:
        self._portal, self._store = portal, store
        self._forgotten = weakref.finalize(self, _forgot, portal)
        self._forgotten.atexit = False  # the loop's thread ends with the process

    def resolve(self, spec: str, *, kind: str = "models", deadline_s: float | None = CALL_S) -> Model:
        """The model ``org/name[@revision]`` at the commit that the revision names now (``main`` by default).

        While no registry answers, what a name named last counts. Raises InvalidInput for a malformed spec,
        RepoNotFound, RevisionNotFound, DeadlineExceeded, Unavailable, Closed.
        """
        found = self._portal.call(partial(self._store.resolve, spec, kind=kind, deadline_s=deadline_s))
        return Model(self, self._portal, found)

    def status(self) -> StoreStatus:
        """What the store holds and does now."""
        return self._portal.call(self._store.status)

    def close(self) -> None:
        """Close the store and every file of it; calls under way in other threads raise Closed. May be called again."""
        self._forgotten.detach()
        self._portal.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Model:
    """The files of one commit, which never change, whatever its ref does meanwhile."""

    def __init__(self, store: Store, portal: Portal, model: async_model.Model) -> None:
        self._store, self._portal, self._model = store, portal, model
        self.repo: RepoId = model.repo
        self.commit, self.revision, self.size = model.commit, model.revision, model.size
        self.files: Mapping[str, FileInfo] = model.files
        """By path, in loading order: weights come last, by name."""

    def __repr__(self) -> str:
        return repr(self._model)

    def open(self, path: str, *, deadline_s: float | None = None) -> File:
        """Open a file; ``with`` closes it. Nothing is fetched for it, but a weight file starts to be filled.

        Raises EntryNotFound; DeadlineExceeded, Unavailable, Closed.
        """
        opened = self._portal.call(partial(self._model.open, path, deadline_s=deadline_s))
        return File(self._store, self._portal, opened)

    def warm(
        self,
        paths: Iterable[str] | None = None,
        *,
        progress: Progress | None = None,
        deadline_s: float | None = None,
    ) -> Warmed:
        """Make the model, or the files and patterns in ``paths``, local: whole, verified, and so for later processes.

        ``progress`` is called now and then, in this thread; what it raises ends the call. The first error ends it;
        what came until then stays. Raises EntryNotFound for a path or pattern that names nothing, what
        ``File.read_into`` raises, and NoSpace.
        """
        if progress is None:
            return self._portal.call(partial(self._model.warm, paths, deadline_s=deadline_s))
        told: queue.SimpleQueue[WarmProgress | None] = queue.SimpleQueue()

        async def warm() -> Warmed:
            try:
                return await self._model.warm(paths, progress=told.put, deadline_s=deadline_s)
            finally:
                told.put(None)

        call = self._portal.submit(warm)
        try:
            while not call.wait(0):
                try:
                    now = told.get(timeout=1.0)
                except queue.Empty:
                    continue  # it may have ended before it began
                if now is None:
                    break
                progress(now)
        except BaseException:
            self._portal.give_up(call)
            raise
        result = self._portal.finish(call)
        while not told.empty() and (last := told.get()) is not None:
            progress(last)
        return result

    def status(self) -> list[FileStatus]:
        """How much of each file is local."""
        return self._portal.call(self._model.status)

    def tensors(
        self, paths: Iterable[str] | None = None, *, folder: str = "", deadline_s: float | None = None
    ) -> Tensors:
        """Open the model's safetensors files and read their headers; ``with`` closes them.

        Which files: ``paths``, or else those that ``model.safetensors.index.json`` names, or else every safetensors
        file; the last two of one ``folder`` (the top one by default). Their fill starts, in loading order.

        Raises EntryNotFound where there is none, InvalidInput for a file or an index that contradicts itself, and what
        ``File.read_into`` raises.
        """
        stack = AsyncExitStack()

        async def enter() -> async_tensors.Tensors:
            return await stack.enter_async_context(self._model.tensors(paths, folder=folder, deadline_s=deadline_s))

        return Tensors(self._store, self._portal, self._portal.call(enter), stack)


class File:
    """An open file of a model."""

    def __init__(self, store: Store, portal: Portal, file: async_file.File) -> None:
        self._store, self._portal, self._file = store, portal, file
        self.info: FileInfo = file.info

    @property
    def path(self) -> str:
        """Its path in the repository."""
        return self.info.path

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return self.info.size

    @property
    def local_path(self) -> Path | None:
        """Where the whole file lies on this machine's disk; None while it does not. To be read only."""
        return self._file.local_path

    def read_into(self, buffer: Buffer, offset: int = 0, *, deadline_s: float | None = None) -> int:
        """Fill the buffer from ``offset``; returns how many bytes it filled, fewer only at the end of the file.

        The buffer must be writable and contiguous, and is left alone once this returns or raises; what is in it after
        an error is undefined. Bytes that are not local are fetched; every byte was verified. Without a deadline a
        read ends when its sources have been silent for about twice ``mount.request_deadline_s`` each.

        Raises TypeError or ValueError for a bad buffer or offset; IntegrityError when no source has the right bytes;
        DeadlineExceeded, Unavailable, Closed.
        """
        view = clipped(writable(buffer), offset, self.size)
        if (local := self._file.whole) is None:
            return self._portal.call(partial(self._file.read_into, view, offset, deadline_s=deadline_s))
        local.read_into(view, offset, float("inf") if deadline_s is None else time.monotonic() + deadline_s)
        return len(view)

    def read(self, offset: int = 0, size: int | None = None, *, deadline_s: float | None = None) -> bytearray:
        """Up to ``size`` bytes (all that follow, by default) from ``offset``, in a buffer of their own.

        Raises what ``read_into`` raises.
        """
        out = self._file.buffer_for(offset, size)
        self.read_into(out, offset, deadline_s=deadline_s)
        return out

    def fetch(self, *, deadline_s: float | None = None) -> None:
        """Make the whole file local. Raises what ``read_into`` raises, and NoSpace when the disk does not take it."""
        self._portal.call(partial(self._file.fetch, deadline_s=deadline_s))

    def fileno(self) -> int:
        """A read-only descriptor of the whole file, valid until ``close``: for preadv, mmap, sendfile, io_uring.

        Raises Unavailable while not all of the file is local, Closed.
        """
        return self._file.fileno()

    def status(self) -> FileStatus:
        """How much of it is local now."""
        return self._file.status()

    def close(self) -> None:
        """Let go of the file; reads under way in other threads raise Closed. What is being fetched goes on."""
        if not self._file.closed:
            with contextlib.suppress(Closed):  # the store was closed, and its files with it
                self._portal.call(self._file.close)

    def __enter__(self) -> File:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Tensors(Mapping[str, TensorInfo]):
    """Tensors by name; iteration is in file order, the order in which reading them is fastest."""

    def __init__(self, store: Store, portal: Portal, tensors: async_tensors.Tensors, stack: AsyncExitStack) -> None:
        self._portal, self._tensors, self._stack = portal, tensors, stack
        self._files = {path: File(store, portal, file) for path, file in tensors.files.items()}
        self._closed = False

    def __getitem__(self, name: str) -> TensorInfo:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def info(self, name: str) -> TensorInfo:
        """One tensor. Raises EntryNotFound."""
        return self._tensors.info(name)

    def read_into(self, name: str, buffer: Buffer, *, deadline_s: float | None = None) -> int:
        """Read a tensor to the start of a buffer, which must have room for it; returns its bytes.

        Raises EntryNotFound, ValueError for a short buffer, and what ``File.read_into`` raises.
        """
        info, view = self._tensors.target(name, buffer)
        return self._files[info.file].read_into(view, info.offset, deadline_s=deadline_s)

    def read(self, name: str, *, deadline_s: float | None = None) -> bytearray:
        """A tensor's bytes. Raises what ``read_into`` raises."""
        out = fresh(self.info(name))
        self.read_into(name, out, deadline_s=deadline_s)
        return out

    def numpy(self, name: str, *, deadline_s: float | None = None) -> Any:
        """A tensor as a NumPy array, its caller's own. Raises what ``read_into`` and ``to_numpy`` raise."""
        return to_numpy(self.info(name), self.read(name, deadline_s=deadline_s))

    def torch(self, name: str, *, deadline_s: float | None = None) -> Any:
        """A tensor as a PyTorch tensor on the CPU. Raises what ``read_into`` and ``to_torch`` raise."""
        return to_torch(self.info(name), self.read(name, deadline_s=deadline_s))

    def stream(
        self, names: Iterable[str] | None = None, *, ahead_bytes: int = AHEAD, allocate: Allocate = fresh
    ) -> Iterator[tuple[TensorInfo, Buffer]]:
        """Tensors, all of them in file order or those named, with their bytes, read ahead while they are used.

        At most ``ahead_bytes`` (and always one tensor) are read and not yet taken. ``allocate`` makes the buffers:
        pinned or reused memory, for example. The iteration raises what ``read_into`` raises.
        """
        left = deque(self.info(name) for name in (self if names is None else names))
        reads: deque[tuple[TensorInfo, Buffer, Call[int]]] = deque()
        used = 0
        try:
            while left or reads:
                while left and (not reads or used + left[0].nbytes <= ahead_bytes):
                    info = left.popleft()
                    buffer = allocate(info)
                    reads.append(
                        (info, buffer, self._portal.submit(partial(self._tensors.read_into, info.name, buffer)))
                    )
                    used += info.nbytes
                info, buffer, call = reads.popleft()
                self._portal.finish(call)
                used -= info.nbytes
                yield info, buffer
        finally:
            for _, _, call in reads:
                self._portal.give_up(call)

    def close(self) -> None:
        """Close the files. May be called again."""
        if not self._closed:
            self._closed = True
            with contextlib.suppress(Closed):  # the store was closed, and its files with it
                self._portal.call(self._stack.aclose)

    def __enter__(self) -> Tensors:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _forgot(portal: Portal) -> None:
    """The store was collected without having been closed."""
    portal.abandon()
    warnings.warn("a heliosfs.client.Store was not closed", ResourceWarning, stacklevel=2)
