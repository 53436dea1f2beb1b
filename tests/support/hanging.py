"""A filesystem that hangs when it is told to: a directory shown by a FUSE process of its own, which can be stopped.

``python -m tests.support.hanging DIRECTORY MOUNTPOINT`` is that process.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyfuse3
import pytest
import trio

from helios.mounts import find_mount
from tests.support.disks import _do


class HangingDisk:
    """``path`` is a filesystem of a process that ``stop`` stops and ``go_on`` lets go on."""

    def __init__(self, path: Path, process: subprocess.Popen[bytes]) -> None:
        self.path, self._process = path, process

    def stop(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._process.send_signal(signal.SIGCONT)


@contextlib.contextmanager
def hanging_disk(directory: Path) -> Iterator[HangingDisk]:
    """A new one below ``directory``; afterwards whatever waits for it fails."""
    if os.getuid() != 0 or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("mounting a FUSE filesystem needs root and /dev/fuse")
    below, path = directory / "below", directory / "hanging"
    for each in (below, path):
        each.mkdir()
    process = subprocess.Popen([sys.executable, "-m", "tests.support.hanging", str(below), str(path)])
    try:
        until = time.monotonic() + 20
        while find_mount(path) is None:
            assert process.poll() is None
            assert time.monotonic() < until, "it is not mounted"
            time.sleep(0.02)
        yield HangingDisk(path, process)
    finally:
        process.kill()
        process.wait()
        _do("umount", "-l", str(path))


class Loopback(pyfuse3.Operations):
    """Shows a directory, without caching: every call comes here."""

    supports_dot_lookup = True

    def __init__(self, root: str) -> None:
        super().__init__()
        self._paths = {pyfuse3.ROOT_INODE: root}

    def _at(self, parent: int, name: bytes) -> str:
        return os.path.join(self._paths[parent], os.fsdecode(name))

    def _attributes(self, path: str, fd: int | None = None) -> pyfuse3.EntryAttributes:
        with told():
            found = os.lstat(path) if fd is None else os.fstat(fd)
        entry = pyfuse3.EntryAttributes()
        root = self._paths[pyfuse3.ROOT_INODE]
        entry.st_ino = pyfuse3.ROOT_INODE if path == root else found.st_ino
        for name in ("st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_atime_ns", "st_mtime_ns", "st_ctime_ns"):
            setattr(entry, name, getattr(found, name))
        entry.st_blksize, entry.st_blocks = 4096, found.st_blocks
        entry.attr_timeout = entry.entry_timeout = 0
        self._paths[entry.st_ino] = path
        return entry

    async def lookup(self, parent_inode: int, name: bytes, ctx: object = None) -> pyfuse3.EntryAttributes:
        return self._attributes(self._at(parent_inode, name))

    async def getattr(self, inode: int, ctx: object = None) -> pyfuse3.EntryAttributes:
        return self._attributes(self._paths[inode])

    async def setattr(
        self, inode: int, attr: pyfuse3.EntryAttributes, fields: pyfuse3.SetattrFields, fh: int | None, ctx: object
    ) -> pyfuse3.EntryAttributes:
        path = self._paths[inode]
        with told():
            if fields.update_size:
                os.truncate(path, attr.st_size)
            if fields.update_mode:
                os.chmod(path, stat.S_IMODE(attr.st_mode))
        return self._attributes(path)

    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: object) -> pyfuse3.EntryAttributes:
        path = self._at(parent_inode, name)
        with told():
            os.mkdir(path, mode)
        return self._attributes(path)

    async def unlink(self, parent_inode: int, name: bytes, ctx: object) -> None:
        with told():
            os.unlink(self._at(parent_inode, name))

    async def rename(
        self, parent_inode_old: int, name_old: bytes, parent_inode_new: int, name_new: bytes, flags: int, ctx: object
    ) -> None:
        old, new = self._at(parent_inode_old, name_old), self._at(parent_inode_new, name_new)
        with told():
            os.rename(old, new)
        self._attributes(new)

    async def link(self, inode: int, new_parent_inode: int, new_name: bytes, ctx: object) -> pyfuse3.EntryAttributes:
        new = self._at(new_parent_inode, new_name)
        with told():
            os.link(self._paths[inode], new, follow_symlinks=False)
        return self._attributes(new)

    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: object
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        path = self._at(parent_inode, name)
        with told():
            fd = os.open(path, flags & ~os.O_NOFOLLOW | os.O_CREAT, mode)
        return pyfuse3.FileInfo(fh=fd), self._attributes(path, fd)

    async def open(self, inode: int, flags: int, ctx: object) -> pyfuse3.FileInfo:
        with told():
            return pyfuse3.FileInfo(fh=os.open(self._paths[inode], flags))

    async def read(self, fh: int, offset: int, size: int) -> bytes:
        with told():
            return os.pread(fh, size, offset)

    async def write(self, fh: int, offset: int, buffer: bytes) -> int:
        with told():
            return os.pwrite(fh, buffer, offset)

    async def flush(self, fh: int) -> None:
        return None

    async def release(self, fh: int) -> None:
        os.close(fh)

    async def fsync(self, fh: int, datasync: bool) -> None:
        return None

    async def opendir(self, inode: int, ctx: object) -> int:
        return inode

    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        return None

    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        with told():
            names = sorted(os.listdir(self._paths[fh]))
        for number, name in enumerate(names[start_id:], start_id + 1):
            found = self._attributes(os.path.join(self._paths[fh], name))
            if not pyfuse3.readdir_reply(token, os.fsencode(name), found, number):
                return

    async def statfs(self, ctx: object) -> pyfuse3.StatvfsData:
        found, out = os.statvfs(self._paths[pyfuse3.ROOT_INODE]), pyfuse3.StatvfsData()
        for name in ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_favail"):
            setattr(out, name, getattr(found, name))
        return out


@contextlib.contextmanager
def told() -> Iterator[None]:
    """What the directory refuses is refused."""
    try:
        yield
    except OSError as error:
        raise pyfuse3.FUSEError(error.errno or errno.EIO) from None


def main(root: str, mountpoint: str) -> None:
    options = {*pyfuse3.default_options, "fsname=hanging", "allow_other"}
    pyfuse3.init(Loopback(root), mountpoint, options)  # type: ignore[arg-type]
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close(unmount=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
