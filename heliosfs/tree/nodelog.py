"""The node log: where each inode that the kernel was given can be found again, for the next worker of the same mount.

An append-only file (noderecords.py says of what). It has to survive the process, not a power cut: nothing is flushed to
the disk. An inode's record is written before the kernel learns of the inode, so a new worker knows every number that
the kernel can name. What follows a record that is torn or wrong is cut off. The log of another mount is started anew.

The inode numbers of an earlier worker are kept as two sorted arrays, 16 bytes an inode; the rest is read from the file
when it is needed. What the kernel gave back stays known until the log is compacted, which happens when most of it is
out of date and it is opened, or has grown long: the live records and the directories above them are written to a file
that replaces it.
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Final

from helios.errors import IntegrityError
from heliosfs.store.syscalls import REFUSED, write_all
from heliosfs.tree import noderecords
from heliosfs.tree.noderecords import DEAD, LONG_BYTES, MAX_NAME, Record, Replayed

log = logging.getLogger("heliosfs.tree")

COMPACT_BYTES: Final = 1 << 20
"""A log shorter than this is left as it is."""

GROWTH: Final = 64
"""A log that is used is looked at when it is this many times COMPACT_BYTES long, and four times what was left then.

Its 64 MiB are about a million records, which keep the loop for about two seconds.
"""

UNWRITTEN_BYTES: Final = 1 << 20
"""What is kept in memory while the file can't be written."""

LAZY_BYTES: Final = 1 << 14
"""What the kernel gave back is written with the next answer, or when it has grown to this."""

UNRECORDED: Final = "inodes can't be recorded: a restart of the worker will disturb those that use them"

_APPEND: Final = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC


class NodeLog:
    """The log of one mount, written by one process at a time: the holder of the mount. Used from one thread.

    A failing disk does not fail the mount: it is logged once, and what could not be written is ESTALE after a restart,
    upon which the kernel looks the name up again.
    """

    def __init__(self, path: Path, fd: int, mount: int, replayed: Replayed, compact_bytes: int) -> None:
        self._path, self._fd, self._mount, self._compact_bytes = path, fd, mount, compact_bytes
        self._seed = replayed.seed
        self._take(replayed)
        self._unwritten = bytearray()
        self._complained = False

    @classmethod
    def open(cls, path: Path, mount: int, *, compact_bytes: int = COMPACT_BYTES) -> NodeLog:
        """Take up the log of a mount, or start one. ``mount`` is a number that no other mount had.

        On a disk that takes nothing it goes on in memory, from what is there. Raises OSError.
        """
        try:
            return cls._open(path, os.open(path, _APPEND | os.O_CREAT, 0o600), mount, compact_bytes)
        except OSError as error:
            if error.errno not in REFUSED:
                raise
            log.warning(UNRECORDED, extra={"path": str(path), "reason": error.strerror})
            return cls._open(path, _in_memory(path), mount, compact_bytes)

    @classmethod
    def _open(cls, path: Path, fd: int, mount: int, compact_bytes: int) -> NodeLog:
        try:
            replayed = _read_or_start(path, fd, mount)
            os.ftruncate(fd, replayed.end)
            if replayed.end > compact_bytes and replayed.outdated():
                fd, old = _compact(path, fd, mount, replayed), fd
                os.close(old)
                replayed = noderecords.read(fd, mount)
        except BaseException:
            os.close(fd)
            raise
        return cls(path, fd, mount, replayed, compact_bytes)

    def close(self) -> None:
        """Write what is left and let go of the file, which stays."""
        self.flush()
        os.close(self._fd)

    def remove(self) -> None:
        """The mount is gone: so is its log. Call ``close`` as well."""
        self._path.unlink(missing_ok=True)

    def __len__(self) -> int:
        """Inodes of earlier workers that can be found again."""
        return len(self._index.inos)

    def __contains__(self, ino: int) -> bool:
        """Whether an earlier worker handed the inode out."""
        return self._index.find(ino) is not None

    def find(self, ino: int) -> Record | None:
        """Where an inode of an earlier worker was found last; None for one that this worker was the first to know."""
        if ino not in self:
            return None
        self.flush()
        at = self._index.find(ino)
        if at is None:
            return None
        offset = self._index.offsets[at]
        data = os.pread(self._fd, LONG_BYTES + MAX_NAME, offset & ~DEAD)
        record = noderecords.decode(data, self._seed, not offset & DEAD)
        return record if record is not None and record.ino == ino else None

    def moved(self, identity: int) -> Record | None:
        """The record of a node whose number is not its first choice."""
        ino = self._moved.get(identity)
        record = None if ino is None else self.find(ino)
        return record if record is not None and record.identity == identity else None

    def held(self, record: Record) -> None:
        """The kernel is about to be given the inode: call ``flush`` before it is."""
        at = self._index.find(record.ino)
        if at is not None:
            self._index.offsets[at] = self._size + len(self._unwritten)
        self._unwritten += noderecords.held(record, self._seed)

    def forgotten(self, ino: int) -> None:
        """The kernel gave the inode back. Written sooner or later: a record too many does no harm."""
        at = self._index.find(ino)
        if at is not None:
            self._index.offsets[at] |= DEAD
        self._unwritten += noderecords.forgotten(ino, self._seed)
        if len(self._unwritten) > LAZY_BYTES:
            self.flush()

    def flush(self) -> None:
        """Hand everything to the operating system, with one write."""
        if not self._unwritten:
            return
        written = 0
        try:
            while written < len(self._unwritten):
                written += os.write(self._fd, memoryview(self._unwritten)[written:])
        except OSError as error:
            self._failed(error)
            return
        self._size += written
        self._unwritten.clear()
        if self._size > self._limit:
            self._compact()

    def _take(self, replayed: Replayed) -> None:
        self._size, self._index, self._moved = replayed.end, replayed.index, replayed.moved
        self._limit = max(GROWTH * self._compact_bytes, 4 * self._size)

    def _compact(self) -> None:
        """Nothing may be unwritten."""
        replayed = noderecords.read(self._fd, self._mount)
        try:
            if replayed.outdated():
                self._fd, old = _compact(self._path, self._fd, self._mount, replayed), self._fd
                os.close(old)
                replayed = noderecords.read(self._fd, self._mount)
        except OSError as error:
            log.warning("the node log can't be compacted", extra={"path": str(self._path), "reason": error.strerror})
        self._take(replayed)

    def _failed(self, error: OSError) -> None:
        with suppress(OSError):  # what stays of a torn record is cut off when the log is opened
            os.ftruncate(self._fd, self._size)
        if len(self._unwritten) > UNWRITTEN_BYTES:
            self._unwritten.clear()
        if not self._complained:
            self._complained = True
            log.warning(UNRECORDED, extra={"path": str(self._path), "reason": error.strerror})


def _in_memory(path: Path) -> int:
    """A file without a name that holds what the log says; open for appending."""
    fd = os.memfd_create("helios-nodes", os.MFD_CLOEXEC)
    try:
        with suppress(OSError):
            write_all(fd, path.read_bytes())
        return os.open(f"/proc/self/fd/{fd}", _APPEND)
    finally:
        os.close(fd)


def _read_or_start(path: Path, fd: int, mount: int) -> Replayed:
    try:
        return noderecords.read(fd, mount)
    except IntegrityError as error:
        if os.fstat(fd).st_size:
            log.info("the node log is started anew", extra={"path": str(path), "reason": str(error)})
    os.ftruncate(fd, 0)
    write_all(fd, noderecords.head(mount))
    return noderecords.read(fd, mount)


def _compact(path: Path, fd: int, mount: int, old: Replayed) -> int:
    """Replace the log by one with nothing out of date; returns the open new one."""
    temporary = path.with_name(path.name + ".new")
    new = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        for piece in noderecords.compacted(fd, mount, old):
            write_all(new, piece)
        os.rename(temporary, path)
    except BaseException:
        os.close(new)
        temporary.unlink(missing_ok=True)
        raise
    log.info("the node log was compacted", extra={"path": str(path), "before": old.end, "after": os.fstat(new).st_size})
    return new
