"""The filesystem's operations: a thin adapter between pyfuse3 and the mount tree.

All methods run as tasks of one trio loop. The node table and the handles change only between waits, so they need no
lock: an entry is counted, recorded and answered without a wait in between, and the kernel keeps an inode that it asks
about. Inodes and handles that an earlier worker of the mount handed out are found again when the kernel names them.
"""

from __future__ import annotations

import errno
import functools
import itertools
import logging
import os
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Any, Concatenate, Final, ParamSpec, TypeVar, cast

import pyfuse3
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, RequestContext, StatvfsData

from helios.errors import HeliosError, NotFound
from helios.metrics import MountMetrics
from helios.names import RepoId
from heliosfs.blobs import BlobRef, BlobStore
from heliosfs.flights import Flights
from heliosfs.fuse.errors import errno_of
from heliosfs.fuse.handles import BlobReader, Buffer, DirectoryHandle, FileHandle, Handles, TextReader
from heliosfs.fuse.reading import LocalReader
from heliosfs.shadow.shadow import Shadow
from heliosfs.store.manifest import FileEntry
from heliosfs.tree.commits import CommitDirectory
from heliosfs.tree.hub import TreeFile
from heliosfs.tree.nodes import BlobFile, Directory, Found, Link, Node, TextFile
from heliosfs.tree.repositories import Repository
from heliosfs.tree.restore import Restorer
from heliosfs.tree.source import FOREVER, Source
from heliosfs.tree.table import NodeTable, Slot

log = logging.getLogger("heliosfs.fuse")

KEPT_S: Final = 365 * 86400.0
"""Time-out given to the kernel for what never changes, in seconds."""

XATTR: Final = "user.helios."

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
    pyfuse3 answers requests, or measures how long they take.
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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self.metrics, self._shadow = metrics, shadow
        self.numbers = itertools.count()
        self.under_way: dict[int, float] = {}
        """When each operation under way began, by ``time.perf_counter``, the oldest first."""
        self._table, self._source, self._blobs = table, source, blobs
        self._cache, self._uid, self._gid, self._clock = cache, uid, gid, clock
        self._mounted_ns = time.time_ns() if mounted_ns is None else mounted_ns
        self._restorer = Restorer(table, source)
        self._alone = alone
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
        metrics.oldest_request.set_function(self.oldest_s)
        metrics.inodes.set_function(lambda: len(table))
        metrics.open_handles.set_function(lambda: len(self._handles.files))
        metrics.inherited_files.set_function(lambda: sum(held is not None for held in list(self._inherited.values())))

    def oldest_s(self) -> float:
        """How long the oldest operation under way has taken, in seconds; 0 where there is none."""
        began = next(iter(self.under_way.values()), None)
        return 0.0 if began is None else time.perf_counter() - began

    def took(self, name: str, seconds: float) -> None:
        """An operation ended."""
        self.metrics.operations.labels(name).observe(seconds)
        if self._alone:
            self.metrics.requests.labels(name).observe(seconds)

    async def close(self) -> None:
        """Close what is still open, when the mount is gone."""
        await self._handles.close_all()
        inherited, self._inherited = self._inherited, {}
        for handle in filter(None, inherited.values()):
            await handle.close()

    def adopt(self, fh: int, inode: int) -> None:
        """Say which inode a handle belongs to, before the request with that handle comes; any thread may."""
        self._handles.adopt(fh, inode)

    def local(self, fh: int, offset: int, size: int) -> tuple[int, int] | None:
        """Where a READ's bytes are on the local disk, verified, as ``BlobHandle.local``; any thread may ask."""
        handle = self._handles.files.get(fh)
        return None if handle is None else handle.local(offset, size)

    def tier(self, fh: int) -> str:
        """Which local tier a handle's bytes are in; any thread may ask."""
        handle = self._handles.files.get(fh)
        return "l1" if handle is None else handle.tier

    def _count_local(self, tier: str, count: int) -> None:
        self._read_bytes[tier].inc(count)

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
        handle = None if self._shadow is None else self._handles.files.get(fh)
        if self._shadow is not None and handle is not None and handle.want is not None:
            self._shadow.read(handle.want, offset, parts, seconds)

    def passed(self, fh: int) -> None:
        """The kernel is about to be given a handle's whole file to read itself; any thread may say so."""
        handle = None if self._shadow is None else self._handles.files.get(fh)
        if self._shadow is not None and handle is not None and handle.want is not None:
            self._shadow.opened(handle.want, handle.whole_fd())

    async def inherit(self, inodes: Iterable[int]) -> None:
        """Hold the files that the kernel has open since an earlier worker: nobody may take them for unused."""
        self._inherited |= dict.fromkeys(inodes)
        for ino in list(self._inherited):
            try:
                handle = await self._open_node((await self._slot(ino)).node)
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
        self._expect(found.node)
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
        return self._handles.add_directory(DirectoryHandle(inode, await self._node(inode, Directory)))

    @operation
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        handle = self._handles.directories.get(fh)
        if handle is None:
            handle = await self._reopening.share(fh, lambda: self._reopen_directory(fh))
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
        self._handles.drop_directory(fh)

    async def _reopen_directory(self, fh: int) -> DirectoryHandle:
        inode = self._adopted(fh)
        handle = DirectoryHandle(inode, await self._node(inode, Directory))
        if self._handles.adopted(fh) is None:
            raise FUSEError(errno.EBADF)  # released meanwhile
        self._handles.directories[fh] = handle
        return handle

    # --- files ---

    @operation
    async def open(self, inode: int, flags: int, ctx: RequestContext | None) -> FileInfo:
        node = (await self._slot(inode)).node
        if flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC:
            raise FUSEError(errno.EROFS)
        handle = await self._open_node(node)
        keep = node.lifetime == FOREVER
        if isinstance(node, BlobFile) and self._blobs.healer.was_wrong(node.entry.sha256):
            keep = False  # pages that the kernel has may be of the file that was wrong
        return FileInfo(fh=self._handles.add_file(handle), keep_cache=keep)

    @operation
    async def read(self, fh: int, off: int, size: int) -> bytes | bytearray | memoryview:
        handle = self._handles.files.get(fh)
        if handle is None:
            handle = await self._reopening.share(fh, lambda: self._reopen_file(fh))
        started = time.perf_counter()
        data = await handle.read(off, size)
        if self._shadow is not None and handle.want is not None:
            self._shadow.read(handle.want, off, [data], time.perf_counter() - started)
        return data

    @operation
    async def release(self, fh: int) -> None:
        handle = self._handles.drop_file(fh)
        if handle is not None:
            await handle.close()

    async def _reopen_file(self, fh: int) -> FileHandle:
        handle = await self._open_node((await self._slot(self._adopted(fh))).node)
        if self._handles.adopted(fh) is None:
            await handle.close()
            raise FUSEError(errno.EBADF)  # released meanwhile
        self._handles.files[fh] = handle
        return handle

    def _adopted(self, fh: int) -> int:
        inode = self._handles.adopted(fh)
        if inode is None:
            raise FUSEError(errno.EBADF)
        return inode

    async def _open_node(self, node: Node) -> FileHandle:
        opener = self._openers.get(type(node))
        if opener is None:
            raise FUSEError(errno.EISDIR if isinstance(node, Directory) else errno.EINVAL)
        return await opener(node)

    def _expect(self, node: Node) -> None:
        """A repository, or something of a commit, was named: its files may be opened next."""
        if isinstance(node, (BlobFile, CommitDirectory)):
            self._blobs.expect(node.repo, node.commit)
        elif isinstance(node, Repository):
            self._blobs.warm()

    async def _open_blob(self, node: BlobFile) -> FileHandle:
        self._expect(node)
        want = _blob_ref(node.entry, node.repo, node.commit, node.path, node.also)
        handle = await self._blobs.open(want)
        self.metrics.opens.labels(self._blobs.status(want.sha256).tier).inc()
        self._blobs.prefetch(await self._shards(node))
        return BlobReader(handle, self._local, want, self._count_local)

    async def _shards(self, node: BlobFile) -> list[BlobRef]:
        """The other shards of a weight file: whoever opens one will read them next."""
        try:
            snapshot = (await self._source.snapshot(node.repo, node.commit)).value
        except HeliosError as error:
            log.debug("the shards are not known", extra={"file": node.path, "reason": str(error)})
            return []
        if snapshot is None or node.path not in snapshot.files:
            return []
        shards = snapshot.shards_after(node.path)
        return [_blob_ref(snapshot.files[path], node.repo, node.commit, path) for path in shards]

    async def _open_text(self, node: TextFile) -> FileHandle:
        return TextReader(node.content)

    async def _open_tree(self, node: TreeFile) -> FileHandle:
        return TextReader(await node.content(self._source))

    # --- about files ---

    @operation
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        disk = os.statvfs(self._cache)
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
        node = (await self._slot(inode)).node
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

    async def _node(self, inode: int, kind: type[N]) -> N:
        node = (await self._slot(inode)).node
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


def _blob_ref(entry: FileEntry, repo: RepoId, commit: str, path: str, also: tuple[RepoId, ...] = ()) -> BlobRef:
    return BlobRef(repo, commit, path, entry.sha256, entry.size, entry.recipe, also)
