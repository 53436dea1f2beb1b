"""Where a blob's files lie in a tier, and what is done to a single one. Calls block; any thread may make them."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from pathlib import Path
from typing import Protocol

import trio

from heliosfs.store.syscalls import replace_file, sync_directory
from heliosfs.tiers.reading import DiskReads
from heliosfs.tiers.silence import Asked
from heliosfs.tiers.sums import Sums

log = logging.getLogger("heliosfs.tiers")


class Places(Protocol):
    """Where a blob's files lie, and who counts them: one tier's directory.

    ``threads`` bounds what is written and flushed; ``reads`` reads. ``asked``: short calls under way; ``silent``: it
    hangs, and is nobody's any more; ``prompt``: calls without I/O wait for nobody; ``device``: its ``st_dev``.
    """

    @property
    def name(self) -> str: ...
    @property
    def threads(self) -> trio.CapacityLimiter: ...
    @property
    def reads(self) -> DiskReads: ...
    @property
    def asked(self) -> Asked: ...
    @property
    def silent(self) -> bool: ...
    @property
    def prompt(self) -> bool: ...
    @property
    def device(self) -> int: ...
    def whole_path(self, sha256: str) -> str: ...
    def object_path(self, sha256: str) -> str | None: ...
    def data_path(self, sha256: str) -> str: ...
    def map_path(self, sha256: str) -> str: ...
    def sums_path(self, sha256: str) -> str: ...
    def became_whole(self, sha256: str, size: int) -> None: ...
    def went(self, sha256: str) -> None: ...
    def prove(self, sha256: str, inode: int) -> None: ...
    def proved(self, sha256: str, inode: int) -> bool: ...
    def sync_whole(self, sha256: str) -> None: ...
    def sync_partial(self) -> None: ...
    def unlinked(self, sha256: str) -> None: ...
    def may_return(self, sha256: str) -> bool: ...


def save_sums(path: str, sums: Sums) -> int:
    """Keep a whole blob's sums; returns the file's bytes, 0 where the disk does not take it: they can be made again."""
    data = sums.encode()
    temporary = f"{path}.{threading.get_native_id()}"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        replace_file(Path(path), data, Path(temporary), lasting=False)
    except OSError as error:
        log.info("the sums of a blob can't be kept", extra={"path": path, "reason": error.strerror})
        return 0
    return len(data)


def make_fan(path: str) -> None:
    """Make the directory that a blob's file is put in; where the one above is not there, it is no tier's any more."""
    directory = os.path.dirname(path)
    if not os.path.isdir(directory):
        with contextlib.suppress(FileExistsError):
            os.mkdir(directory)
        sync_directory(Path(directory).parent)  # else a power cut may take it, and with it the blob


def unlink(path: str) -> bool:
    """Remove a name; returns whether there was one."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    return True


def open_data(path: str) -> tuple[int, bool]:
    """Open a partial blob's data file; says whether it is sealed, which is to say read-only."""
    flags = os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(path, os.O_RDONLY | flags)
    if not os.fstat(fd).st_mode & 0o222:
        return fd, True
    os.close(fd)
    return os.open(path, os.O_RDWR | flags), False


def blocks(length: int) -> int:
    """Bytes on disk of a file that was written from its start."""
    return -(-length // 4096) * 4096


def advise(fd: int) -> None:
    """The mount's own page cache keeps what is read through it: let the copy below it be the first to be reclaimed."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_NOREUSE)
