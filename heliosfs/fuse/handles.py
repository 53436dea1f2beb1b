"""Open files and directories: what a file handle number stands for."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Protocol

import trio

from heliosfs.blobs import BlobHandle
from heliosfs.fuse.reading import LocalReader
from heliosfs.tree.nodes import Directory, Found

Buffer = bytes | bytearray | memoryview


class FileHandle(Protocol):
    """An open file. What ``read`` returns is valid until the caller waits again."""

    async def read(self, offset: int, size: int) -> Buffer:
        """Up to ``size`` bytes from ``offset``; fewer only at the end."""

    async def close(self) -> None:
        """Let go of it."""


class BlobReader:
    """An open blob: read from the local file where there is one, else through the blob store."""

    def __init__(self, handle: BlobHandle, local: LocalReader) -> None:
        self._handle, self._local = handle, local

    async def read(self, offset: int, size: int) -> Buffer:
        fd = self._handle.local_fd()
        if fd is not None:
            return await self._local.read(fd, offset, size)
        return await self._handle.read(offset, size)

    async def close(self) -> None:
        await self._handle.close()


class TextReader:
    """An open file made on the spot."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    async def read(self, offset: int, size: int) -> Buffer:
        return self._content[offset : offset + size]

    async def close(self) -> None:
        await trio.lowlevel.checkpoint()


class DirectoryHandle:
    """An open directory and its entries as they were when reading began."""

    def __init__(self, node: Directory) -> None:
        self.node = node
        self.entries: Sequence[Found] = ()


class Handles:
    """Numbers for what is open. Numbers are never used twice."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
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

    async def close_all(self) -> None:
        """Close what the kernel did not: after an unmount it may say nothing more."""
        files, self.files = self.files, {}
        self.directories.clear()
        for handle in files.values():
            await handle.close()
