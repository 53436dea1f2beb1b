"""Open files and directories: what a file handle number stands for."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import trio

from heliosfs.blob_handle import Here
from heliosfs.blobs import BlobHandle, BlobRef
from heliosfs.fuse.reading import LocalReader
from heliosfs.tree.nodes import Directory, Found

GENERATION_SHIFT: Final = 40
"""A handle's number is the worker's generation, and a counter in these many bits."""

Buffer = bytes | bytearray | memoryview


class FileHandle(Protocol):
    """An open file. What ``read`` returns is valid until the caller waits again."""

    @property
    def want(self) -> BlobRef | None:
        """Which file it was opened as; None for one made on the spot."""

    async def read(self, offset: int, size: int) -> Buffer:
        """Up to ``size`` bytes from ``offset``; fewer only at the end."""

    def local(self, offset: int, size: int) -> Here | None:
        """Where these bytes are, as ``BlobHandle.local``; any thread may ask."""

    def held(self, offset: int, size: int) -> list[memoryview] | None:
        """These bytes from the memory pool, in pieces, as ``BlobHandle.held``; any thread may ask."""

    def whole_fd(self) -> int:
        """A descriptor of the whole file on the local disk, for the kernel to read itself; -1 where there is none."""

    async def close(self) -> None:
        """Let go of it."""


class BlobReader:
    """An open blob: read from the local file where there is one, else through the blob store."""

    def __init__(
        self, handle: BlobHandle, local: LocalReader, want: BlobRef, count: Callable[[str, int], None]
    ) -> None:
        """``count`` is told of the bytes that were read from a whole local file, and of its tier."""
        self._handle, self._local, self.want, self._count = handle, local, want, count

    async def read(self, offset: int, size: int) -> Buffer:
        fd = self._handle.local_fd()
        if fd is not None:
            try:
                data = await self._local.read(fd, offset, size, self._handle.disk)
            except OSError:  # the disk gives it back no more, or hangs
                held = self._handle.held(offset, size)
                if held is not None:
                    return b"".join(held)
            else:
                self._count(self._handle.tier, len(data))
                return data
        return await self._handle.read(offset, size)

    def local(self, offset: int, size: int) -> Here | None:
        return self._handle.local(offset, size)

    def held(self, offset: int, size: int) -> list[memoryview] | None:
        return self._handle.held(offset, size)

    def whole_fd(self) -> int:
        fd = self._handle.local_fd()
        return -1 if fd is None else fd

    async def close(self) -> None:
        await self._handle.close()


class TextReader:
    """An open file made on the spot."""

    want = None

    def __init__(self, content: bytes) -> None:
        self._content = content

    async def read(self, offset: int, size: int) -> Buffer:
        return self._content[offset : offset + size]

    def local(self, offset: int, size: int) -> Here | None:
        return None

    def held(self, offset: int, size: int) -> list[memoryview] | None:
        return None

    def whole_fd(self) -> int:
        return -1

    async def close(self) -> None:
        await trio.lowlevel.checkpoint()


class DirectoryHandle:
    """An open directory and its entries as they were when reading began; None: it has not begun."""

    def __init__(self, ino: int, node: Directory) -> None:
        self.ino, self.node = ino, node
        self.entries: Sequence[Found] | None = None


class Handles:
    """Numbers for what is open. Numbers are never used twice, by later workers of the mount neither.

    ``generation`` counts the workers of the mount. The kernel goes on using the handles of earlier ones: each is opened
    again by its inode, under its old number, when it is used.
    """

    def __init__(self, generation: int) -> None:
        self._generation = generation
        self._numbers = itertools.count(generation << GENERATION_SHIFT | 1)
        self._earlier: dict[int, int] = {}
        self.files: dict[int, FileHandle] = {}
        self.directories: dict[int, DirectoryHandle] = {}

    def add_file(self, handle: FileHandle) -> int:
        number = next(self._numbers)
        self.files[number] = handle
        return number

    def add_directory(self, handle: DirectoryHandle) -> int:
        number = next(self._numbers)
        self.directories[number] = handle
        return number

    def adopt(self, number: int, ino: int) -> None:
        """Say which inode a handle belongs to, before the request that names it; any thread may.

        Only what an earlier worker opened is remembered, until it is released.
        """
        if number >> GENERATION_SHIFT != self._generation:
            self._earlier[number] = ino

    def adopted(self, number: int) -> int | None:
        """The inode of a handle that an earlier worker opened and nobody released."""
        return self._earlier.get(number)

    def drop_file(self, number: int) -> FileHandle | None:
        """Forget a file's number; None where it was never used here."""
        self._earlier.pop(number, None)
        return self.files.pop(number, None)

    def drop_directory(self, number: int) -> None:
        """Forget a directory's number."""
        self._earlier.pop(number, None)
        self.directories.pop(number, None)

    async def close_all(self) -> None:
        """Close what the kernel did not: after an unmount it may say nothing more."""
        files, self.files = self.files, {}
        self.directories.clear()
        self._earlier.clear()
        for handle in files.values():
            await handle.close()
