"""An open blob, as who reads it has it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

import trio

from heliosfs.fetch.blob import Blob
from heliosfs.fetch.read import Reads
from heliosfs.tiers.places import Places
from heliosfs.tiers.reading import DiskReads

TELL_BYTES: Final = 8 << 20
"""A reader that needs no help from the loop tells it where it is this often, in bytes: what is ahead comes first."""

TELL_HELD_BYTES: Final = 2 << 20
"""One that reads from memory tells it more often: there is less ahead of it, and what it has read goes."""


@dataclass(frozen=True, slots=True)
class Here:
    """Verified bytes on a local disk: ``count`` of them in the file ``fd``, which lies in the tier ``places``."""

    fd: int
    count: int
    places: Places


class Owner(Protocol):
    """The store that opened the blob."""

    def has(self, blob: Blob, offset: int, count: int) -> bool: ...
    def held(self, blob: Blob, offset: int, count: int) -> list[memoryview] | None: ...
    def progressed_soon(self, blob: Blob, number: int, offset: int, end: int) -> None: ...
    def release(self, blob: Blob, number: int) -> None: ...


class BlobHandle:
    """An open blob. Reads may run side by side; ``close`` comes after them."""

    def __init__(self, store: Owner, reads: Reads, blob: Blob, number: int) -> None:
        self._store, self._reads, self._blob, self._number = store, reads, blob, number
        self._closed = False
        self._told = -TELL_BYTES

    @property
    def size(self) -> int:
        """Bytes in the blob."""
        return self._blob.want.size

    @property
    def tier(self) -> str:
        """The tier in which its files are, or would be made."""
        return self._blob.local.places.name

    async def read(self, offset: int, size: int) -> memoryview:
        """Up to ``size`` bytes from ``offset``, fewer only at the end of the blob; the caller's to keep.

        Every byte was verified. Raises IntegrityError when no source has the right bytes, Unavailable or
        DeadlineExceeded when none gave any in time.
        """
        view = memoryview(bytearray(max(0, min(size, self.size - offset))))
        await self.read_into(offset, view)
        return view

    async def read_into(self, offset: int, view: memoryview) -> int:
        """Like ``read``, into the caller's buffer; returns how many bytes it filled.

        The buffer is the callee's until this returns or raises.
        """
        if offset < 0:
            raise ValueError("a negative offset")
        count = max(0, min(len(view), self.size - offset))
        if count:
            await self._reads.read(self._blob, self._number, view[:count], offset)
        else:
            await trio.lowlevel.checkpoint()
        return count

    def local(self, offset: int, size: int) -> Here | None:
        """Where ``size`` bytes from ``offset`` are, fewer at the end.

        None when some of them are not here. Any thread may ask while the handle is open, which keeps the descriptor;
        ``read`` need not be called then.
        """
        blob, count = self._blob, min(size, self.size - offset)
        local = blob.local
        fd = local.fd
        if fd < 0 or count <= 0:
            return None
        if not blob.whole:
            if not self._store.has(blob, offset, count) or blob.local is not local:
                return None
            self._tell(offset, count, TELL_BYTES)
        return Here(fd, count, local.places)

    def held(self, offset: int, size: int) -> list[memoryview] | None:
        """The bytes that ``local`` gives a descriptor for, from the memory pool, in pieces; None when it lacks some.

        Any thread may ask while the handle is open.
        """
        blob, count = self._blob, min(size, self.size - offset)
        parts = self._store.held(blob, offset, count) if count > 0 else None
        if parts is not None and blob.planned:
            self._tell(offset, count, TELL_HELD_BYTES)
        return parts

    def _tell(self, offset: int, count: int, every: int) -> None:
        """Let the loop know now and then how far the reader is."""
        if not 0 <= offset - self._told < every:
            self._told = offset
            self._store.progressed_soon(self._blob, self._number, offset, offset + count)

    def local_fd(self) -> int | None:
        """A read-only descriptor of the whole blob once it is local, for ``os.preadv`` and the like; else None.

        It belongs to the handle: valid until ``close``.
        """
        blob = self._blob
        return blob.local.fd if blob.whole and blob.local.fd >= 0 else None

    @property
    def disk(self) -> DiskReads:
        """Who reads from the disk of ``local_fd``."""
        return self._blob.local.places.reads

    async def close(self) -> None:
        """Let go of the blob; what is being fetched or filled goes on."""
        if not self._closed:
            self._closed = True
            self._store.release(self._blob, self._number)
        await trio.lowlevel.checkpoint()
