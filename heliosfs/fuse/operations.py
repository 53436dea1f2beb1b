"""The filesystem's operations: a thin adapter between pyfuse3 and the mount tree.

All methods run as tasks of one trio loop. The node table changes only between waits, so it needs no lock: an entry is
counted, recorded and answered without a wait in between, and the kernel keeps an inode that it asks about. Inodes that
an earlier worker of the mount handed out are found again when the kernel names them. What is open is in openfiles.py.
"""

from __future__ import annotations

import errno
import functools
import itertools
import logging
import os
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, Concatenate, Final, ParamSpec, TypeVar, cast

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, RequestContext, StatvfsData

from helios.errors import HeliosError, NotFound
from helios.metrics import MountMetrics
from heliosfs.blobs import BlobStore
from heliosfs.fuse.errors import errno_of
from heliosfs.fuse.openfiles import OpenFiles
from heliosfs.shadow.shadow import Shadow
from heliosfs.tree.nodes import BlobFile, Directory, Found, Link, Node
from heliosfs.tree.restore import Restorer
from heliosfs.tree.source import FOREVER, Source
from heliosfs.tree.table import NodeTable, Slot
from heliosfs.usage import ReadCounts

log = logging.getLogger("heliosfs.fuse")

KEPT_S: Final = 365 * 86400.0
"""Time-out given to the kernel for what never changes, in seconds."""

XATTR: Final = "user.helios."

STATFS_S: Final = 5.0
"""How long the cache's disk may take to say how full it is, in seconds."""

LONGEST_LINK: Final = 4095
"""Most bytes of a link's target that the kernel takes; one below very many directories of ``.hub`` has more."""

P = ParamSpec("P")
R = TypeVar("R")
N = TypeVar("N", bound=Node)
Method = Callable[Concatenate["HeliosOperations", P], Coroutine[Any, Any, R]]


def operation(method: Method[P, R]) -> Method[P, R]:
    """Time an operation, count its errors, and answer any error with an errno: none may end the loop."""
    name = method.__name__

    @functools.wraps(method)
    async def run(self: HeliosOperations, *args: P.args, **kwargs: P.kwargs) -> R:
        started, number = time.perf_counter(), next(self.numbers)
        self.under_way[number] = started
        try:
            return await method(self, *args, **kwargs)
        except Exception as error:
            raise self.failed(name, error) from error
        finally:
            del self.under_way[number]
            self.took(name, time.perf_counter() - started)

    return cast(Method[P, R], run)


def refused(name: str) -> Callable[..., Coroutine[Any, Any, None]]:
    """An operation that writes: the mount is read-only."""

    async def refuse(self: HeliosOperations, *_: object) -> None:
        raise FUSEError(errno.EROFS)

    refuse.__name__ = name
    return operation(refuse)


class HeliosOperations(pyfuse3.Operations):  # type: ignore[misc]
    """Serves the tree. ``cache`` is the directory whose disk ``statfs`` reports; ``uid`` and ``gid`` own every file.

    ``mounted_ns`` is the time of what is the mount's own, in nanoseconds since 1970, and ``generation`` counts the
    workers that have served this mount: a mount that outlives its worker says both. ``alone``: nobody in front of
    pyfuse3 answers requests, or measures how long they take. ``counts`` is told what is read.
    """

    supports_dot_lookup = False  # asked for only by NFS servers

    def __init__(
        self,
        table: NodeTable,
        source: Source,
        blobs: BlobStore,
        metrics: MountMetrics,
        *,
        cache: Path,
        uid: int,
        gid: int,
        mounted_ns: int | None = None,
        generation: int = 1,
        shadow: Shadow | None = None,
        alone: bool = True,
        counts: ReadCounts | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self.metrics = metrics
        self.numbers = itertools.count()
        self.under_way: dict[int, float] = {}
        """When each operation under way began, by ``time.perf_counter``, the oldest first."""
        self._table, self._source, self._blobs = table, source, blobs
        self._cache, self._uid, self._gid, self._clock = cache, uid, gid, clock
        self._mounted_ns = time.time_ns() if mounted_ns is None else mounted_ns
        self._restorer = Restorer(table, source)
        self._alone = alone
        self._statfs_threads = trio.CapacityLimiter(1)
        self._disk: os.statvfs_result | None = None
        self.files = OpenFiles(source, blobs, metrics, self._node_of, generation, shadow, counts or ReadCounts())
        """What is open."""
        metrics.oldest_request.set_function(self.oldest_s)
        metrics.inodes.set_function(lambda: len(table))

    def oldest_s(self) -> float:
        """How long the oldest operation under way has taken, in seconds; 0 where there is none."""
        began = next(iter(self.under_way.values()), None)
        return 0.0 if began is None else time.perf_counter() - began

    def took(self, name: str, seconds: float) -> None:
        """An operation ended."""
        self.metrics.operations.labels(name).observe(seconds)
        if self._alone:
            self.metrics.requests.labels(name).observe(seconds)

    # --- names ---

    @operation
    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        parent = await self._node(parent_inode, Directory)
        try:
            text = name.decode()
        except UnicodeDecodeError:
            raise NotFound(f"{name!r} is not UTF-8") from None
        found = await parent.lookup(text, self._source)
        if not isinstance(found, Found):
            log.debug("no such entry: %s", found.reason)
            self.metrics.errors.labels("lookup", "ENOENT").inc()
            return self._absent(found.until)
        slot = self._table.hold(found.node, parent_inode, name)
        self._table.record()
        self.files.expect(found.node)
        return self._entry(slot, found.until)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        for ino, count in inode_list:
            self._table.forget(ino, count)

    @operation
    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        return self._entry(await self._slot(inode), FOREVER)

    @operation
    async def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        target = (await self._node(inode, Link)).target.encode()
        if len(target) > LONGEST_LINK:
            raise FUSEError(errno.ENAMETOOLONG)
        return target

    # --- directories ---

    @operation
    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        return self.files.open_directory(inode, await self._node(inode, Directory))

    @operation
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        handle = await self.files.directory(fh)
        if start_id == 0 or handle.entries is None:
            handle.entries = list(await handle.node.entries(self._source))
        for number in range(start_id, len(handle.entries)):
            found = handle.entries[number]
            name = found.name.encode()
            slot = self._table.hold(found.node, handle.ino, name)
            if not pyfuse3.readdir_reply(token, name, self._entry(slot, found.until), number + 1):
                self._table.forget(slot.ino, 1)
                break
        self._table.record()

    async def releasedir(self, fh: int) -> None:
        self.files.release_directory(fh)

    # --- files ---

    @operation
    async def open(self, inode: int, flags: int, ctx: RequestContext | None) -> FileInfo:
        node = await self._node_of(inode)
        if flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC:
            raise FUSEError(errno.EROFS)
        fh, keep = await self.files.open(node)
        return FileInfo(fh=fh, keep_cache=keep)

    @operation
    async def read(self, fh: int, off: int, size: int) -> bytes | bytearray | memoryview:
        return await self.files.read(fh, off, size)

    @operation
    async def release(self, fh: int) -> None:
        await self.files.release(fh)

    # --- about files ---

    @operation
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        disk = None
        with trio.move_on_after(STATFS_S):  # a disk that hangs must not stop the loop
            disk = await trio.to_thread.run_sync(
                os.statvfs, self._cache, abandon_on_cancel=True, limiter=self._statfs_threads
            )
        disk = self._disk = disk or self._disk  # one that hangs is as full as it was
        if disk is None:
            raise FUSEError(errno.EIO)
        out = StatvfsData()
        out.f_bsize = out.f_frsize = disk.f_frsize
        out.f_blocks, out.f_bfree, out.f_bavail = disk.f_blocks, disk.f_bfree, disk.f_bavail
        out.f_files, out.f_namemax = len(self._table), 255
        return out

    @operation
    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        values = await self._xattrs(inode)
        if name not in values:
            raise FUSEError(errno.ENODATA)
        return values[name]

    @operation
    async def listxattr(self, inode: int, ctx: RequestContext) -> Sequence[bytes]:
        return list(await self._xattrs(inode))

    async def _xattrs(self, inode: int) -> dict[bytes, bytes]:
        node = await self._node_of(inode)
        values = dict(node.xattrs())
        if isinstance(node, BlobFile):
            values |= self._blobs.status(node.entry.sha256).xattrs()
        return {(XATTR + name).encode(): text.encode() for name, text in values.items()}

    # --- writing ---

    create = refused("create")
    fallocate = refused("fallocate")
    link = refused("link")
    mkdir = refused("mkdir")
    mknod = refused("mknod")
    removexattr = refused("removexattr")
    rename = refused("rename")
    rmdir = refused("rmdir")
    setattr = refused("setattr")
    setxattr = refused("setxattr")
    symlink = refused("symlink")
    unlink = refused("unlink")
    write = refused("write")

    # --- inside ---

    def failed(self, name: str, error: Exception) -> FUSEError:
        """The answer for an error, counted and logged."""
        if isinstance(error, FUSEError):
            code = error.errno
        elif isinstance(error, HeliosError):
            code = errno_of(error)
            level = logging.DEBUG if code == errno.ENOENT else logging.WARNING
            log.log(level, "%s failed: %s", name, error, extra={"errno": errno.errorcode[code]})
        else:
            code = errno.EIO
            log.error("%s failed", name, exc_info=error)
        self.metrics.errors.labels(name, errno.errorcode.get(code, str(code))).inc()
        return error if isinstance(error, FUSEError) else FUSEError(code)

    async def _slot(self, inode: int) -> Slot:
        slot = await self._restorer.slot(inode)
        if slot is None:
            raise FUSEError(errno.ESTALE)
        return slot

    async def _node_of(self, inode: int) -> Node:
        return (await self._slot(inode)).node

    async def _node(self, inode: int, kind: type[N]) -> N:
        node = await self._node_of(inode)
        if not isinstance(node, kind):
            raise FUSEError(errno.ENOTDIR if kind is Directory else errno.EINVAL)
        return node

    def _left(self, until: float) -> float:
        """Seconds from now, as a time-out for the kernel."""
        return KEPT_S if until == FOREVER else max(0.0, until - self._clock())

    def _absent(self, until: float) -> EntryAttributes:
        out = EntryAttributes()
        out.st_ino = 0
        out.entry_timeout = self._left(until)
        return out

    def _entry(self, slot: Slot, until: float) -> EntryAttributes:
        node = slot.node
        out = EntryAttributes()
        out.st_ino = slot.ino
        out.entry_timeout = self._left(until)
        out.attr_timeout = min(KEPT_S, node.lifetime)
        out.st_mode = node.mode
        out.st_nlink = 1
        out.st_uid, out.st_gid = self._uid, self._gid
        out.st_size = node.size
        out.st_blocks = (node.size + 511) // 512
        stamp = self._mounted_ns if slot.mtime is None else slot.mtime * 1_000_000_000
        out.st_atime_ns = out.st_mtime_ns = out.st_ctime_ns = stamp
        return out
