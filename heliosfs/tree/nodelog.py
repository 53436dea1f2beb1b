"""The node log: where each inode that the kernel was given can be found again, for the next worker of the same mount.

An append-only file. It has to survive the process, not a power cut: nothing is flushed to the disk. An inode's record
is written before the kernel learns of the inode, so a new worker knows every number that the kernel can name.

Binary, little endian:

    head    magic b"HNOD", version u16 1, flags u16 0, mount u64, crc u32 (CRC-32 of the head up to here)
    record  crc u32, kind u8, attempt u8, length u16, ino u64; and for a kind 1 (handed out) also
            parent u64, mtime i64 (the least number: none), identity u64, name (``length`` bytes)

Kind 2 says that the kernel gave the inode back. A record's CRC-32 covers all of it and starts from the head's. Reading
stops at the first record that is torn or wrong; what follows is cut off. The last record of an inode counts. ``mount``
tells mounts apart: the log of another one is started anew.

The inode numbers of an earlier worker are kept as two sorted arrays, 16 bytes an inode; the rest is read from the file
when it is needed. What the kernel gave back stays known until the log is compacted, which happens when most of it is
out of date and it is opened, or has grown long: the live records and the directories above them are written to a file
that replaces it.
"""

from __future__ import annotations

import logging
import mmap
import os
import struct
import zlib
from array import array
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

from helios.errors import IntegrityError
from heliosfs.store.syscalls import REFUSED, write_all

log = logging.getLogger("heliosfs.tree")

MAGIC: Final = b"HNOD"
VERSION: Final = 1

HELD: Final = 1
FORGOTTEN: Final = 2

_HEAD = struct.Struct("<4sHHQ")
_CRC = struct.Struct("<I")
_START = struct.Struct("<BBHQ")
_PLACE = struct.Struct("<QqQ")
_HELD = struct.Struct("<BBHQQqQ")

HEAD_BYTES: Final = _HEAD.size + _CRC.size
SHORT_BYTES: Final = _CRC.size + _START.size
LONG_BYTES: Final = _CRC.size + _HELD.size
MAX_NAME: Final = 1024
"""FUSE_NAME_MAX, in bytes: no name that the kernel looks up is longer."""

NO_MTIME: Final = -(1 << 63)
DEAD: Final = 1 << 63
"""Marks the offset of an inode that the kernel gave back."""

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

PIECE_BYTES: Final = 1 << 20
"""A log that is compacted is written in pieces of about this length."""


class Record(NamedTuple):
    """Where an inode was found last: under ``name`` in the directory ``parent``.

    ``mtime`` as in ``Slot``; ``attempt`` is the counter that its number was hashed with; ``identity`` is another hash
    of the node's key. ``live``: the kernel has not given it back.
    """

    ino: int
    parent: int
    name: bytes
    mtime: int | None
    attempt: int
    identity: int
    live: bool = True


class NodeLog:
    """The log of one mount, written by one process at a time: the holder of the mount. Used from one thread.

    A failing disk does not fail the mount: it is logged once, and what could not be written is ESTALE after a restart,
    upon which the kernel looks the name up again.
    """

    def __init__(self, path: Path, fd: int, mount: int, replayed: _Replayed, compact_bytes: int) -> None:
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
                replayed = _read(fd, mount)
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
        record = _decode(os.pread(self._fd, LONG_BYTES + MAX_NAME, offset & ~DEAD), self._seed, not offset & DEAD)
        return record if record is not None and record.ino == ino else None

    def moved(self, identity: int) -> Record | None:
        """The record of a node whose number is not its first choice."""
        ino = self._moved.get(identity)
        record = None if ino is None else self.find(ino)
        return record if record is not None and record.identity == identity else None

    def held(self, record: Record) -> None:
        """The kernel is about to be given the inode: call ``flush`` before it is."""
        ino, parent, name, mtime, attempt, identity, _ = record
        at = self._index.find(ino)
        if at is not None:
            self._index.offsets[at] = self._size + len(self._unwritten)
        stamp = NO_MTIME if mtime is None else mtime
        self._append(_HELD.pack(HELD, attempt, len(name), ino, parent, stamp, identity) + name)

    def forgotten(self, ino: int) -> None:
        """The kernel gave the inode back. Written sooner or later: a record too many does no harm."""
        at = self._index.find(ino)
        if at is not None:
            self._index.offsets[at] |= DEAD
        self._append(_START.pack(FORGOTTEN, 0, 0, ino))
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

    def _take(self, replayed: _Replayed) -> None:
        self._size, self._index, self._moved = replayed.end, replayed.index, replayed.moved
        self._limit = max(GROWTH * self._compact_bytes, 4 * self._size)

    def _compact(self) -> None:
        """Nothing may be unwritten."""
        replayed = _read(self._fd, self._mount)
        try:
            if replayed.outdated():
                self._fd, old = _compact(self._path, self._fd, self._mount, replayed), self._fd
                os.close(old)
                replayed = _read(self._fd, self._mount)
        except OSError as error:
            log.warning("the node log can't be compacted", extra={"path": str(self._path), "reason": error.strerror})
        self._take(replayed)

    def _append(self, body: bytes) -> None:
        self._unwritten += _CRC.pack(zlib.crc32(body, self._seed))
        self._unwritten += body

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


class _Index:
    """Inode numbers, sorted, and where the last record of each is."""

    def __init__(self, inos: array[int], offsets: array[int]) -> None:
        self.inos, self.offsets = inos, offsets

    def find(self, ino: int) -> int | None:
        """The inode's position."""
        at = bisect_left(self.inos, ino)
        return at if at < len(self.inos) and self.inos[at] == ino else None

    def live(self) -> int:
        """Inodes that the kernel has not given back."""
        return sum(offset < DEAD for offset in self.offsets)


@dataclass(slots=True)
class _Replayed:
    """What a log says. ``moved``: identity -> number of nodes whose number is not their first choice."""

    seed: int
    end: int = HEAD_BYTES
    records: int = 0
    index: _Index = field(default_factory=lambda: _Index(array("Q"), array("Q")))
    moved: dict[int, int] = field(default_factory=dict)

    def outdated(self) -> bool:
        """Whether most of the log says nothing any more."""
        return self.records > 2 * self.index.live()


def _head(mount: int) -> bytes:
    head = _HEAD.pack(MAGIC, VERSION, 0, mount)
    return head + _CRC.pack(zlib.crc32(head))


def _read(fd: int, mount: int) -> _Replayed:
    """Replay a log. Raises IntegrityError where it is none, or another mount's."""
    head = os.pread(fd, HEAD_BYTES, 0)
    if len(head) < HEAD_BYTES or _CRC.unpack_from(head, _HEAD.size)[0] != zlib.crc32(head[: _HEAD.size]):
        raise IntegrityError("it has no valid head")
    magic, version, _, of = _HEAD.unpack_from(head)
    if magic != MAGIC or version != VERSION:
        raise IntegrityError(f"it is of version {version}, not {VERSION}")
    if of != mount:
        raise IntegrityError("it is another mount's")
    out = _Replayed(_CRC.unpack_from(head, _HEAD.size)[0])
    inos, offsets = array("Q"), array("Q")
    with closing(mmap.mmap(fd, 0, prot=mmap.PROT_READ)) as data, memoryview(data) as view:
        for offset, end, kind, attempt, ino in _records(view, out.seed):
            inos.append(ino)
            offsets.append(offset if kind == HELD else DEAD)
            if attempt:
                (_, _, identity) = _PLACE.unpack_from(view, offset + SHORT_BYTES)
                out.moved[identity] = ino
            out.end = end
    out.records = len(inos)
    out.index = _sorted(inos, offsets)
    return out


def _read_or_start(path: Path, fd: int, mount: int) -> _Replayed:
    try:
        return _read(fd, mount)
    except IntegrityError as error:
        if os.fstat(fd).st_size:
            log.info("the node log is started anew", extra={"path": str(path), "reason": str(error)})
    os.ftruncate(fd, 0)
    write_all(fd, _head(mount))
    return _read(fd, mount)


def _records(view: memoryview, seed: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Offset, end, kind, attempt and inode of each valid record up to the first that is not."""
    crc32, start, crc_of = zlib.crc32, _START.unpack_from, _CRC.unpack_from
    offset, size = HEAD_BYTES, len(view)
    while offset + SHORT_BYTES <= size:
        kind, attempt, length, ino = start(view, offset + 4)
        end = offset + (LONG_BYTES + length if kind == HELD else SHORT_BYTES)
        if kind not in (HELD, FORGOTTEN) or end > size:
            return
        if crc32(view[offset + 4 : end], seed) != crc_of(view, offset)[0]:
            return
        yield offset, end, kind, attempt, ino
        offset = end


def _sorted(inos: array[int], offsets: array[int]) -> _Index:
    """One entry an inode: where it was handed out last, marked if it was given back after that."""
    index = _Index(array("Q"), array("Q"))
    for at in sorted(range(len(inos)), key=inos.__getitem__):  # stable: the records of one inode stay in order
        ino, offset = inos[at], offsets[at]
        if index.inos and index.inos[-1] == ino:
            index.offsets[-1] = index.offsets[-1] | DEAD if offset == DEAD else offset
        elif offset != DEAD:  # one that was never handed out says nothing
            index.inos.append(ino)
            index.offsets.append(offset)
    return index


def _decode(data: bytes, seed: int, live: bool) -> Record | None:
    """The record at the start of ``data``, or None where there is none that was handed out."""
    if len(data) < LONG_BYTES:
        return None
    kind, attempt, length, ino, parent, mtime, identity = _HELD.unpack_from(data, _CRC.size)
    body = data[_CRC.size : LONG_BYTES + length]
    if kind != HELD or _CRC.unpack_from(data)[0] != zlib.crc32(body, seed):
        return None
    name = data[LONG_BYTES : LONG_BYTES + length]
    return Record(ino, parent, name, None if mtime == NO_MTIME else mtime, attempt, identity, live)


def _compact(path: Path, fd: int, mount: int, old: _Replayed) -> int:
    """Replace the log by one with nothing out of date; returns the open new one."""
    index = old.index
    temporary = path.with_name(path.name + ".new")
    new = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        out = bytearray(_head(mount))
        with closing(mmap.mmap(fd, 0, prot=mmap.PROT_READ)) as data, memoryview(data) as view:
            for at in _needed(index, view):
                offset = index.offsets[at] & ~DEAD
                (_, _, length, ino) = _START.unpack_from(view, offset + _CRC.size)
                out += view[offset : offset + LONG_BYTES + length]
                if index.offsets[at] & DEAD:
                    body = _START.pack(FORGOTTEN, 0, 0, ino)
                    out += _CRC.pack(zlib.crc32(body, old.seed)) + body
                if len(out) > PIECE_BYTES:
                    write_all(new, out)
                    out.clear()
        write_all(new, out)
        os.rename(temporary, path)
    except BaseException:
        os.close(new)
        temporary.unlink(missing_ok=True)
        raise
    log.info("the node log was compacted", extra={"path": str(path), "before": old.end, "after": os.fstat(new).st_size})
    return new


def _needed(index: _Index, view: memoryview) -> list[int]:
    """Positions of what is live and of the directories above it, in the order of the file.

    A directory may be given back while a file below it, which has another name elsewhere, is not.
    """
    needed = bytearray(len(index.inos))
    for start, offset in enumerate(index.offsets):
        at: int | None = start if offset < DEAD else None
        while at is not None and not needed[at]:
            needed[at] = 1
            (parent, _, _) = _PLACE.unpack_from(view, (index.offsets[at] & ~DEAD) + SHORT_BYTES)
            at = index.find(parent)
    return sorted((at for at, wanted in enumerate(needed) if wanted), key=lambda at: index.offsets[at] & ~DEAD)
