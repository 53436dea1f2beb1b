"""The node log's format: what a log says, record by record, and one with nothing out of date.

Binary, little endian:

    head    magic b"HNOD", version u16 1, flags u16 0, mount u64, crc u32 (CRC-32 of the head up to here)
    record  crc u32, kind u8, attempt u8, length u16, ino u64; and for a kind 1 (handed out) also
            parent u64, mtime i64 (the least number: none), identity u64, name (``length`` bytes)

Kind 2 says that the kernel gave the inode back. A record's CRC-32 covers all of it and starts from the head's. Reading
stops at the first record that is torn or wrong. The last record of an inode counts. ``mount`` tells mounts apart.
"""

from __future__ import annotations

import mmap
import os
import struct
import zlib
from array import array
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from helios.errors import IntegrityError

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


class Index:
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
class Replayed:
    """What a log says. ``moved``: identity -> number of nodes whose number is not their first choice."""

    seed: int
    end: int = HEAD_BYTES
    records: int = 0
    index: Index = field(default_factory=lambda: Index(array("Q"), array("Q")))
    moved: dict[int, int] = field(default_factory=dict)

    def outdated(self) -> bool:
        """Whether most of the log says nothing any more."""
        return self.records > 2 * self.index.live()


def head(mount: int) -> bytes:
    """An empty log."""
    fields = _HEAD.pack(MAGIC, VERSION, 0, mount)
    return fields + _CRC.pack(zlib.crc32(fields))


def held(record: Record, seed: int) -> bytes:
    """The record that hands an inode out."""
    ino, parent, name, mtime, attempt, identity, _ = record
    stamp = NO_MTIME if mtime is None else mtime
    return _sealed(_HELD.pack(HELD, attempt, len(name), ino, parent, stamp, identity) + name, seed)


def forgotten(ino: int, seed: int) -> bytes:
    """The record of an inode that the kernel gave back."""
    return _sealed(_START.pack(FORGOTTEN, 0, 0, ino), seed)


def _sealed(body: bytes, seed: int) -> bytes:
    return _CRC.pack(zlib.crc32(body, seed)) + body


def read(fd: int, mount: int) -> Replayed:
    """Replay a log. Raises IntegrityError where it is none, or another mount's."""
    start = os.pread(fd, HEAD_BYTES, 0)
    if len(start) < HEAD_BYTES or _CRC.unpack_from(start, _HEAD.size)[0] != zlib.crc32(start[: _HEAD.size]):
        raise IntegrityError("it has no valid head")
    magic, version, _, of = _HEAD.unpack_from(start)
    if magic != MAGIC or version != VERSION:
        raise IntegrityError(f"it is of version {version}, not {VERSION}")
    if of != mount:
        raise IntegrityError("it is another mount's")
    out = Replayed(_CRC.unpack_from(start, _HEAD.size)[0])
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


def _sorted(inos: array[int], offsets: array[int]) -> Index:
    """One entry an inode: where it was handed out last, marked if it was given back after that."""
    index = Index(array("Q"), array("Q"))
    for at in sorted(range(len(inos)), key=inos.__getitem__):  # stable: the records of one inode stay in order
        ino, offset = inos[at], offsets[at]
        if index.inos and index.inos[-1] == ino:
            index.offsets[-1] = index.offsets[-1] | DEAD if offset == DEAD else offset
        elif offset != DEAD:  # one that was never handed out says nothing
            index.inos.append(ino)
            index.offsets.append(offset)
    return index


def decode(data: bytes, seed: int, live: bool) -> Record | None:
    """The record at the start of ``data``, or None where there is none that was handed out."""
    if len(data) < LONG_BYTES:
        return None
    kind, attempt, length, ino, parent, mtime, identity = _HELD.unpack_from(data, _CRC.size)
    body = data[_CRC.size : LONG_BYTES + length]
    if kind != HELD or _CRC.unpack_from(data)[0] != zlib.crc32(body, seed):
        return None
    name = data[LONG_BYTES : LONG_BYTES + length]
    return Record(ino, parent, name, None if mtime == NO_MTIME else mtime, attempt, identity, live)


def compacted(fd: int, mount: int, old: Replayed) -> Iterator[bytes]:
    """A log with nothing out of date, in pieces."""
    index = old.index
    out = bytearray(head(mount))
    with closing(mmap.mmap(fd, 0, prot=mmap.PROT_READ)) as data, memoryview(data) as view:
        for at in _needed(index, view):
            offset = index.offsets[at] & ~DEAD
            (_, _, length, ino) = _START.unpack_from(view, offset + _CRC.size)
            out += view[offset : offset + LONG_BYTES + length]
            if index.offsets[at] & DEAD:
                out += forgotten(ino, old.seed)
            if len(out) > PIECE_BYTES:
                yield bytes(out)
                out.clear()
    yield bytes(out)


def _needed(index: Index, view: memoryview) -> list[int]:
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
