"""Where a range's bytes go, as PyTorch tensors.

For the CPU: a file that is whole on this machine is **mapped**; threads bring its pages in, and what copies the tensor
into a parameter reads the page cache itself: one copy in all. Other bytes are read into **host** memory, which is used
again as soon as the engine has dropped the tensors in it. For a GPU they are **uploaded** through pinned staging
buffers. Tensors may be kept: they hold their memory, which is given to nobody else as long as they live.
"""

from __future__ import annotations

import ctypes
import errno
import math
import mmap
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Final, Protocol

import torch

from helios.errors import Unavailable
from heliosfs.client.convert import torch_form
from heliosfs.client.values import TensorInfo
from heliosfs.loader.shards import Range
from heliosfs.loader.sources import Source
from heliosfs.loader.staging import Device, Event, Ring

MADV_POPULATE_READ: Final = 22
"""Linux 5.14: brings the pages in as if they were read; an error instead of SIGBUS for what can't be."""

PAGE: Final = mmap.PAGESIZE
SAMPLE: Final = 1 << 20
"""Bytes of a file of which one is looked at."""
_NOTHING: Final = torch.empty(0, dtype=torch.uint8, device="cpu")


class Block(Protocol):
    """A range's memory: filled by threads (pipeline.Destination), then taken apart by the engine's."""

    @property
    def nbytes(self) -> int: ...
    def ready(self) -> bool: ...
    def fill(self, start: int, stop: int) -> None: ...
    def tensors(self) -> Iterator[tuple[str, Any]]:
        """The tensors by name, in file order; to be called once all is filled."""


class Memory(Protocol):
    """A kind of memory, on one device."""

    def open(self, wanted: Range) -> Block:
        """Memory for a range; called by one thread."""

    def close(self) -> None:
        """Wait until nothing is under way in it."""


class HostMemory:
    """Memory that the CPU sees. At most ``kept_bytes`` of it are kept for later ranges."""

    def __init__(self, kept_bytes: int) -> None:
        self._lock = threading.Lock()
        self._pool = Pool(kept_bytes)
        self._last: tuple[Source, torch.Tensor] | None = None

    def open(self, wanted: Range) -> Block:
        fd = wanted.source.fileno()
        if wanted.nbytes and fd is None:
            return LateBlock(wanted, self)
        return self.block(wanted, fd if wanted.nbytes else None)

    def block(self, wanted: Range, fd: int | None) -> Block:
        """Memory of the kind that a range wants of whose file ``fd`` is a descriptor; threads may ask."""
        with self._lock:
            if fd is None:
                return HostBlock(wanted, self._pool)
            return MappedBlock(wanted, self._map(wanted.source, fd), fd)

    def close(self) -> None:
        with self._lock:
            self._last = None

    def _map(self, source: Source, fd: int) -> torch.Tensor:
        """The whole file; the last one's mapping is kept, for its next range."""
        if self._last is None or self._last[0] is not source:
            # A private mapping is writable, as safetensors' are: nobody else sees what is written to it.
            try:
                data = mmap.mmap(fd, source.size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
            except (OSError, ValueError) as error:  # ValueError: it has become shorter
                raise Unavailable(f"{source.path} can't be mapped: {error}") from error
            self._last = source, torch.frombuffer(data, dtype=torch.uint8)
        return self._last[1]


class LateBlock:
    """A part of a file that is not whole yet: what kind of memory it gets is found out by who fills it first."""

    def __init__(self, wanted: Range, memory: HostMemory) -> None:
        self._range, self._memory, self.nbytes = wanted, memory, wanted.nbytes
        self._lock = threading.Lock()
        self._block: Block | None = None

    def ready(self) -> bool:
        return False

    def fill(self, start: int, stop: int) -> None:
        self._chosen().fill(start, stop)

    def tensors(self) -> Iterator[tuple[str, Any]]:
        return self._chosen().tensors()

    def _chosen(self) -> Block:
        with self._lock:  # who comes second waits for the first, and for the same
            if self._block is None:
                self._block = self._memory.block(self._range, self._range.source.awaited())
            return self._block


class MappedBlock:
    """A part of a mapped file, of which ``fd`` is a descriptor."""

    def __init__(self, wanted: Range, mapped: torch.Tensor, fd: int) -> None:
        self._range, self._mapped, self._fd, self.nbytes = wanted, mapped, fd, wanted.nbytes

    def ready(self) -> bool:
        """Whether it is in memory: what copies the tensors maps its pages as fast as a thread would."""
        return in_memory(self._fd, self._range.start, self._range.stop)

    def fill(self, start: int, stop: int) -> None:
        if in_memory(self._fd, self._range.start + start, self._range.start + stop):
            return
        first = (self._range.start + start) // PAGE * PAGE
        _populate(self._mapped.data_ptr() + first, self._range.start + stop - first, self._range.source.path)

    def tensors(self) -> Iterator[tuple[str, Any]]:
        for info in self._range.tensors:
            yield info.name, tensor_at(self._mapped, info.offset, info)


class HostBlock:
    """Host memory of a pool."""

    def __init__(self, wanted: Range, pool: Pool) -> None:
        self._range, self.nbytes = wanted, wanted.nbytes
        self._view = pool.take(wanted.nbytes)

    def ready(self) -> bool:
        return not self.nbytes

    def fill(self, start: int, stop: int) -> None:
        self._range.source.read_into(self._view[start:stop], self._range.start + start)

    def tensors(self) -> Iterator[tuple[str, Any]]:
        whole = torch.frombuffer(self._view, dtype=torch.uint8) if self.nbytes else _NOTHING
        for info in self._range.tensors:
            yield info.name, tensor_at(whole, info.offset - self._range.start, info)


class DeviceMemory:
    """Memory of a GPU, filled through a ring of staging buffers; host memory for what it has no room for."""

    def __init__(self, device: Device, ring: Ring, host: HostMemory) -> None:
        self._device, self._ring, self._host = device, ring, host

    def open(self, wanted: Range) -> Block:
        memory = self._device.memory(wanted.nbytes)
        return self._host.open(wanted) if memory is None else DeviceBlock(wanted, memory, self._device, self._ring)

    def close(self) -> None:
        self._ring.drain()


class DeviceBlock:
    """Memory of a GPU; each part is read into a staging buffer, and its copy started."""

    def __init__(self, wanted: Range, memory: Any, device: Device, ring: Ring) -> None:
        self._range, self._memory, self._device, self._ring = wanted, memory, device, ring
        self.nbytes = wanted.nbytes
        self._lock = threading.Lock()
        self._events: list[Event] = []

    def ready(self) -> bool:
        return not self.nbytes

    def fill(self, start: int, stop: int) -> None:
        for at in range(start, stop, self._ring.nbytes):
            count = min(self._ring.nbytes, stop - at)
            with self._ring.buffer() as buffer:
                self._range.source.read_into(buffer.view[:count], self._range.start + at)
                buffer.busy = self._device.upload(buffer.staging, self._memory, at, count)
                with self._lock:
                    self._events.append(buffer.busy)

    def tensors(self) -> Iterator[tuple[str, Any]]:
        self._device.hand_over(self._memory, self._events)
        for info in self._range.tensors:
            yield info.name, tensor_at(self._memory, info.offset - self._range.start, info)


class Pool:
    """Host memory that is used again once nothing refers to it. Views may be dropped by any thread."""

    def __init__(self, kept_bytes: int) -> None:
        self._kept_bytes = kept_bytes
        self._free: list[mmap.mmap] = []
        self._back: deque[mmap.mmap] = deque()  # what finalizers may touch: they run anywhere, in take() too

    def take(self, nbytes: int) -> memoryview:
        """Memory for that many bytes: it comes back when the view and all that was made of it are gone."""
        while self._back:
            self._free.append(self._back.popleft())
        fitting = [buffer for buffer in self._free if nbytes <= len(buffer)]
        buffer = min(fitting, key=len) if fitting else mmap.mmap(-1, max(PAGE, -(-nbytes // PAGE) * PAGE))
        if fitting:
            self._free.remove(buffer)
        while sum(map(len, self._free)) > self._kept_bytes:
            self._free.remove(min(self._free, key=len))
        # What is cut from a view does not keep that view itself alive, so it is an array that is watched.
        owner = (ctypes.c_ubyte * nbytes).from_buffer(buffer)
        weakref.finalize(owner, self._back.append, buffer).atexit = False
        return memoryview(owner).cast("B")


def tensor_at(memory: Any, at: int, info: TensorInfo) -> Any:
    """The tensor in ``memory`` (of ``uint8``) from byte ``at``; a copy where it lies askew. Raises InvalidInput."""
    dtype, shape = torch_form(info)
    if not math.prod(shape):
        return torch.empty(shape, dtype=dtype, device=memory.device)
    data = memory[at : at + info.nbytes]
    if (memory.storage_offset() + at) % dtype.itemsize:
        data = data.clone()
    return data.view(dtype).reshape(shape)


def in_memory(fd: int, start: int, stop: int) -> bool:
    """Whether a file's bytes seem to be in the page cache: its readers leave no holes of SAMPLE bytes.

    mincore(2) says so of every file that the caller may not write to; RWF_NOWAIT (preadv2(2)) tells the truth.
    """
    byte = bytearray(1)
    try:
        return all(os.preadv(fd, [byte], at, os.RWF_NOWAIT) == 1 for at in (*range(start, stop, SAMPLE), stop - 1))
    except OSError:  # not there, or a file system that can't tell
        return False


_libc: Final = ctypes.CDLL(None, use_errno=True)
_madvise: Final[Callable[[Any, Any, int], int]] = _libc.madvise


def _populate(address: int, nbytes: int, name: str) -> None:
    """Bring the pages of a mapping in. Raises Unavailable where they can't be read."""
    while _madvise(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), MADV_POPULATE_READ):
        code = ctypes.get_errno()
        if code == errno.EINVAL:  # an older kernel: they come when they are used
            return
        if code not in (errno.EINTR, errno.EAGAIN):
            raise Unavailable(
                f"{name} can't be read: {os.strerror(code)}", hint="Is it being changed? Look at its disk."
            )
