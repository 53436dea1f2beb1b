"""The tensors of a model by name, from all its shards."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import trio

from helios.errors import EntryNotFound
from heliosfs.client.buffers import writable
from heliosfs.client.calls import background
from heliosfs.client.convert import to_numpy, to_torch
from heliosfs.client.file import File
from heliosfs.client.values import TensorInfo

if TYPE_CHECKING:
    from typing_extensions import Buffer

Allocate = Callable[[TensorInfo], "Buffer"]
"""Makes the buffer that a tensor is read into: writable, contiguous, at least ``nbytes`` long."""

AHEAD: Final = 64 << 20
"""Bytes that ``stream`` reads ahead of its user, by default."""


def fresh(info: TensorInfo) -> bytearray:
    """A new buffer for each tensor."""
    return bytearray(info.nbytes)


class Tensors(Mapping[str, TensorInfo]):
    """Tensors by name; iteration is in file order, the order in which reading them is fastest."""

    def __init__(self, found: tuple[Mapping[str, TensorInfo], Mapping[str, File]]) -> None:
        self._infos, self.files = found

    def __getitem__(self, name: str) -> TensorInfo:
        return self._infos[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    def info(self, name: str) -> TensorInfo:
        """One tensor. Raises EntryNotFound."""
        try:
            return self._infos[name]
        except KeyError:
            raise EntryNotFound(f"there is no tensor {name!r}", hint="list(tensors) has the names.") from None

    def target(self, name: str, buffer: Buffer) -> tuple[TensorInfo, memoryview]:
        """A tensor, and the part of the buffer that it fills. Raises EntryNotFound, TypeError, ValueError."""
        info, view = self.info(name), writable(buffer)
        if len(view) < info.nbytes:
            raise ValueError(f"the tensor {name!r} has {info.nbytes} bytes, the buffer {len(view)}")
        return info, view[: info.nbytes]

    async def read_into(self, name: str, buffer: Buffer, *, deadline_s: float | None = None) -> int:
        """Read a tensor to the start of a buffer, which must have room for it; returns its bytes.

        Raises EntryNotFound, ValueError for a short buffer, and what ``File.read_into`` raises.
        """
        info, view = self.target(name, buffer)
        return await self.files[info.file].read_into(view, info.offset, deadline_s=deadline_s)

    async def read(self, name: str, *, deadline_s: float | None = None) -> bytearray:
        """A tensor's bytes. Raises what ``read_into`` raises."""
        out = fresh(self.info(name))
        await self.read_into(name, out, deadline_s=deadline_s)
        return out

    async def numpy(self, name: str, *, deadline_s: float | None = None) -> Any:
        """A tensor as a NumPy array, its caller's own. Raises what ``read_into`` and ``to_numpy`` raise."""
        return to_numpy(self.info(name), await self.read(name, deadline_s=deadline_s))

    async def torch(self, name: str, *, deadline_s: float | None = None) -> Any:
        """A tensor as a PyTorch tensor on the CPU. Raises what ``read_into`` and ``to_torch`` raise."""
        return to_torch(self.info(name), await self.read(name, deadline_s=deadline_s))

    @asynccontextmanager
    async def stream(
        self, names: Iterable[str] | None = None, *, ahead_bytes: int = AHEAD, allocate: Allocate = fresh
    ) -> AsyncIterator[AsyncIterator[tuple[TensorInfo, Buffer]]]:
        """Tensors, all of them in file order or those named, with their bytes, read ahead while they are used.

        At most ``ahead_bytes`` (and always one tensor) are read and not yet taken. ``allocate`` makes the buffers:
        pinned or reused memory, for example. The iteration raises what ``read_into`` raises.
        """
        infos = [self.info(name) for name in (self if names is None else names)]
        async with background() as nursery:
            yield _Ahead(self, infos, ahead_bytes, allocate, nursery)


class _Ahead:
    """Reads under way for a stream, in order."""

    def __init__(
        self, tensors: Tensors, infos: list[TensorInfo], most: int, allocate: Allocate, nursery: trio.Nursery
    ) -> None:
        self._tensors, self._left, self._most, self._allocate = tensors, deque(infos), most, allocate
        self._nursery = nursery
        self._reads: deque[_Read] = deque()
        self._used = 0

    def __aiter__(self) -> _Ahead:
        return self

    async def __anext__(self) -> tuple[TensorInfo, Buffer]:
        self._start()
        if not self._reads:
            raise StopAsyncIteration
        read = self._reads.popleft()
        await read.done.wait()
        self._used -= read.info.nbytes
        if read.error is not None:
            raise read.error
        self._start()
        return read.info, read.buffer

    def _start(self) -> None:
        """Start reads as far as there is room."""
        while self._left and (not self._reads or self._used + self._left[0].nbytes <= self._most):
            info = self._left.popleft()
            read = _Read(info, self._allocate(info))
            self._reads.append(read)
            self._used += info.nbytes
            self._nursery.start_soon(partial(read.run, self._tensors))


class _Read:
    def __init__(self, info: TensorInfo, buffer: Buffer) -> None:
        self.info, self.buffer = info, buffer
        self.done = trio.Event()
        self.error: Exception | None = None

    async def run(self, tensors: Tensors) -> None:
        try:
            await tensors.read_into(self.info.name, self.buffer)
        except Exception as error:
            self.error = error
        self.done.set()
