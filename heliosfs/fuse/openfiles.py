"""Open files and directories: how a node becomes a handle, what the channel asks about one, and the handles that an
earlier worker of the mount handed out, which are opened again when the kernel names them.

Handles change only between the waits of one trio loop. What any thread may ask looks a number up and answers.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

from pyfuse3 import FUSEError

from helios.errors import HeliosError
from helios.metrics import MountMetrics
from heliosfs.blob_handle import Here
from heliosfs.blobs import BlobStore
from heliosfs.flights import Flights
from heliosfs.following import Following, blob_ref
from heliosfs.fuse.handles import BlobReader, Buffer, DirectoryHandle, FileHandle, Handles, TextReader
from heliosfs.fuse.reading import LocalReader
from heliosfs.shadow.shadow import Shadow
from heliosfs.tree.commits import CommitDirectory
from heliosfs.tree.hub import TreeFile
from heliosfs.tree.nodes import BlobFile, Directory, Node, TextFile
from heliosfs.tree.repositories import Repository
from heliosfs.tree.source import FOREVER, Source
from heliosfs.usage import ReadCounts

log = logging.getLogger("heliosfs.fuse")


class OpenFiles:
    """What is open, by the numbers that the kernel has for it. ``node_of`` finds an inode's node, or raises FUSEError;
    ``generation`` counts the workers that have served this mount.

    Its methods raise FUSEError and HeliosError.
    """

    def __init__(
        self,
        source: Source,
        blobs: BlobStore,
        metrics: MountMetrics,
        node_of: Callable[[int], Awaitable[Node]],
        generation: int,
        shadow: Shadow | None,
        counts: ReadCounts,
    ) -> None:
        self._source, self._blobs, self._metrics, self._node_of = source, blobs, metrics, node_of
        self._shadow, self._counts = shadow, counts
        self._following = Following(source, blobs)
        self._handles = Handles(generation)
        self._reopening: Flights[int] = Flights()
        self._inherited: dict[int, FileHandle | None] = {}
        self._local = LocalReader()
        self._read_bytes = {tier: metrics.read_bytes.labels(tier) for tier in ("l1", "l2")}
        self._openers: dict[type[Node], Callable[[Any], Awaitable[FileHandle]]] = {
            BlobFile: self._open_blob,
            TextFile: self._open_text,
            TreeFile: self._open_tree,
        }
        metrics.open_handles.set_function(lambda: len(self._handles.files))
        metrics.inherited_files.set_function(lambda: sum(held is not None for held in list(self._inherited.values())))

    # --- opening, reading, closing ---

    async def open(self, node: Node) -> tuple[int, bool]:
        """Open a file; returns its number, and whether pages that the kernel has of it are still right."""
        handle = await self._open_node(node)
        keep = node.lifetime == FOREVER
        if isinstance(node, BlobFile):
            self._counts.opened(node.repo, node.commit)
            if self._blobs.healer.was_wrong(node.entry.sha256):
                keep = False  # pages that the kernel has may be of the file that was wrong
        return self._handles.add_file(handle), keep

    async def read(self, fh: int, offset: int, size: int) -> Buffer:
        """Up to ``size`` bytes of a file from ``offset``; valid until the caller waits again."""
        handle = self._handles.files.get(fh)
        if handle is None:
            handle = await self._reopening.share(fh, lambda: self._reopen_file(fh))
        started = time.perf_counter()
        data = await handle.read(offset, size)
        if handle.want is not None:
            self._counts.read(handle.want.repo, handle.want.commit, len(data))
            if self._shadow is not None:
                self._shadow.read(handle.want, offset, [data], time.perf_counter() - started)
        return data

    async def release(self, fh: int) -> None:
        """The kernel let a file go."""
        handle = self._handles.drop_file(fh)
        if handle is not None:
            await handle.close()

    def open_directory(self, ino: int, node: Directory) -> int:
        return self._handles.add_directory(DirectoryHandle(ino, node))

    async def directory(self, fh: int) -> DirectoryHandle:
        """The open directory with this number."""
        handle = self._handles.directories.get(fh)
        if handle is None:
            handle = await self._reopening.share(fh, lambda: self._reopen_directory(fh))
        return handle

    def release_directory(self, fh: int) -> None:
        self._handles.drop_directory(fh)

    async def close(self) -> None:
        """Close what is still open, when the mount is gone."""
        await self._handles.close_all()
        inherited, self._inherited = self._inherited, {}
        for handle in filter(None, inherited.values()):
            await handle.close()

    # --- what an earlier worker opened ---

    async def inherit(self, inodes: Iterable[int]) -> None:
        """Hold the files that the kernel has open since an earlier worker: nobody may take them for unused."""
        self._inherited |= dict.fromkeys(inodes)
        for ino in list(self._inherited):
            try:
                handle = await self._open_node(await self._node_of(ino))
            except (FUSEError, HeliosError) as error:
                log.info("an open file of an earlier worker is not found again", extra={"reason": str(error)})
                continue
            if ino in self._inherited:
                self._inherited[ino] = handle
            else:
                await handle.close()  # let go meanwhile

    async def let_go(self, ino: int) -> None:
        """The kernel closed the last handle of an inode that was inherited."""
        handle = self._inherited.pop(ino, None)
        if handle is not None:
            await handle.close()

    async def _reopen_file(self, fh: int) -> FileHandle:
        handle = await self._open_node(await self._node_of(self._adopted(fh)))
        if self._handles.adopted(fh) is None:
            await handle.close()
            raise FUSEError(errno.EBADF)  # released meanwhile
        self._handles.files[fh] = handle
        return handle

    async def _reopen_directory(self, fh: int) -> DirectoryHandle:
        ino = self._adopted(fh)
        node = await self._node_of(ino)
        if not isinstance(node, Directory):
            raise FUSEError(errno.ENOTDIR)
        if self._handles.adopted(fh) is None:
            raise FUSEError(errno.EBADF)  # released meanwhile
        handle = DirectoryHandle(ino, node)
        self._handles.directories[fh] = handle
        return handle

    def _adopted(self, fh: int) -> int:
        ino = self._handles.adopted(fh)
        if ino is None:
            raise FUSEError(errno.EBADF)
        return ino

    # --- what the channel asks ---

    def adopt(self, fh: int, ino: int) -> None:
        """Say which inode a handle belongs to, before the request with that handle comes; any thread may."""
        self._handles.adopt(fh, ino)

    def local(self, fh: int, offset: int, size: int) -> Here | None:
        """Where a READ's bytes are on the local disk, verified, as ``BlobHandle.local``; any thread may ask."""
        handle = self._handles.files.get(fh)
        return None if handle is None else handle.local(offset, size)

    def held(self, fh: int, offset: int, size: int) -> list[memoryview] | None:
        """A READ's bytes from the memory pool, in pieces, as ``BlobHandle.held``; any thread may ask."""
        handle = self._handles.files.get(fh)
        return None if handle is None else handle.held(offset, size)

    def whole(self, fh: int) -> int:
        """A descriptor of a handle's whole local file, else -1; any thread may ask."""
        handle = self._handles.files.get(fh)
        return -1 if handle is None else handle.whole_fd()

    def lasting(self, fh: int) -> bool:
        """Whether the entries of an open directory never change; any thread may ask."""
        handle = self._handles.directories.get(fh)
        return handle is not None and handle.node.lifetime == FOREVER

    def answered(self, fh: int, offset: int, parts: Sequence[Buffer], seconds: float) -> None:
        """A READ was answered with these bytes; any thread may say so."""
        handle = self._handles.files.get(fh)
        if handle is None or handle.want is None:
            return
        self._counts.read(handle.want.repo, handle.want.commit, sum(map(len, parts)))
        if self._shadow is not None:
            self._shadow.read(handle.want, offset, parts, seconds)

    def passed(self, fh: int) -> None:
        """The kernel is about to be given a handle's whole file to read itself; any thread may say so."""
        handle = self._handles.files.get(fh)
        if handle is None or handle.want is None:
            return
        self._counts.read(handle.want.repo, handle.want.commit, handle.want.size)  # what it reads, nobody else sees
        if self._shadow is not None:
            self._shadow.opened(handle.want, handle.whole_fd())

    # --- inside ---

    async def _open_node(self, node: Node) -> FileHandle:
        opener = self._openers.get(type(node))
        if opener is None:
            raise FUSEError(errno.EISDIR if isinstance(node, Directory) else errno.EINVAL)
        return await opener(node)

    def expect(self, node: Node) -> None:
        """A repository, or something of a commit, was named: its files may be opened next."""
        if isinstance(node, (BlobFile, CommitDirectory)):
            self._blobs.expect(node.repo, node.commit)
        elif isinstance(node, Repository):
            self._blobs.warm()

    async def _open_blob(self, node: BlobFile) -> FileHandle:
        self.expect(node)
        want = blob_ref(node.entry, node.repo, node.commit, node.path, node.also)
        handle = await self._blobs.open(want)
        self._metrics.opens.labels(self._blobs.status(want.sha256).tier).inc()
        await self._following.opened(node)
        return BlobReader(handle, self._local, want, self._count_local)

    async def _open_text(self, node: TextFile) -> FileHandle:
        return TextReader(node.content)

    async def _open_tree(self, node: TreeFile) -> FileHandle:
        return TextReader(await node.content(self._source))

    def _count_local(self, tier: str, count: int) -> None:
        self._read_bytes[tier].inc(count)
