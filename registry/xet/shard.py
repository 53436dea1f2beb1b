"""Reading shards: what hf-xet says of the files and xorbs it has made (draft-denis-xet-03, "Shard Format").

    head      48 bytes   tag, u64 version (2), u64 length of the footer (0 in an upload)
    files     for each: a head and its entries, all of 48 bytes; then one whose hash is all ones
    xorbs     the same
    ...       look-up tables, which are not needed

File head: 32 bytes hash, u32 flags, u32 number of terms, u64. Term: 32 bytes hash of the xorb, u32 flags, u32 bytes,
u32 first chunk, u32 chunk after the last. With flag bit 31 as many verification entries follow, with bit 30 one more.
Xorb head: 32 bytes hash, u32 flags, u32 number of chunks, u32, u32. Chunk: 32 bytes hash, u32 offset, u32 length, u64.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Final

from helios.errors import IntegrityError
from registry.xet.hashes import Chunk, to_text

TAG: Final = b"HFRepoMetaData\0" + bytes.fromhex("556967456a7b815783a5bdd95ccdd14aa9")
VERSION: Final = 2
ENTRY: Final = 48
VERIFIED: Final = 1 << 31
EXTENDED: Final = 1 << 30
END: Final = b"\xff" * 32

_HEAD = struct.Struct("<32sQQ")
_RECORD = struct.Struct("<32s4I")

Term = tuple[bytes, int, int]
"""Chunks from a first one to the one after the last of the xorb with this hash."""


@dataclass(slots=True)
class Shards:
    """What the shards of one upload hold: terms by file hash, chunks by xorb hash, sha256 by file hash."""

    files: dict[bytes, list[Term]] = field(default_factory=dict)
    xorbs: dict[bytes, list[Chunk]] = field(default_factory=dict)
    sha256: dict[bytes, str] = field(default_factory=dict)

    def add(self, data: bytes) -> None:
        """Read one shard; raises IntegrityError."""
        if len(data) < _HEAD.size:
            raise IntegrityError(f"a Xet shard of {len(data)} bytes is shorter than its head")
        tag, version, _ = _HEAD.unpack_from(data)
        if tag != TAG or version != VERSION:
            raise IntegrityError(f"not a Xet shard of version {VERSION}: it starts with {tag[:16]!r}, {version}")
        try:
            at = self._files(data, _HEAD.size)
            self._xorbs(data, at)
        except struct.error:
            raise IntegrityError(f"a Xet shard of {len(data)} bytes ends in the middle of a record") from None

    def _files(self, data: bytes, at: int) -> int:
        while True:
            name, flags, count, _, _ = _RECORD.unpack_from(data, at)
            at += ENTRY
            if name == END:
                return at
            _check(data, at, count)
            terms = self.files.setdefault(name, [])
            terms.clear()
            for xorb, _, _, first, stop in _RECORD.iter_unpack(memoryview(data)[at : at + ENTRY * count]):
                terms.append((xorb, first, stop))
            at += ENTRY * (count + (count if flags & VERIFIED else 0))
            if flags & EXTENDED:
                self.sha256[name] = to_text(_RECORD.unpack_from(data, at)[0])  # written as their hashes are
                at += ENTRY

    def _xorbs(self, data: bytes, at: int) -> None:
        while True:
            name, _, count, _, _ = _RECORD.unpack_from(data, at)
            at += ENTRY
            if name == END:
                return
            _check(data, at, count)
            records = _RECORD.iter_unpack(memoryview(data)[at : at + ENTRY * count])
            self.xorbs[name] = [(digest, length) for digest, _, length, _, _ in records]
            at += ENTRY * count


def _check(data: bytes, at: int, count: int) -> None:
    if at + ENTRY * count > len(data):
        raise IntegrityError(f"a Xet shard of {len(data)} bytes announces {count} records at byte {at}")
