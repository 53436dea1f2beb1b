"""The journal beside a partial blob: which chunks are safely on disk. No I/O in here.

Binary file, little endian:

    magic    4 bytes  b"HMAP"
    version  u16      1
    flags    u16      0
    length   u32      bytes of the recipe record that follows the head
    digest   32 bytes sha256 of that record: the blob's recipe digest
    crc      u32      CRC-32 of the head up to here
    recipe   the recipe record (heliosfs/store/recipe.py)
    entry    any number of (u32 first, u32 count, u32 crc)

An entry says that ``count`` chunks from ``first`` are verified and flushed. Its CRC-32 covers both numbers and, through
its seed, the head's CRC and the entry's offset in the file, so that neither zeros, nor an entry of another journal, nor
one moved from elsewhere is ever valid. Entries are only appended, and only after the data they speak of was flushed
with fdatasync: what a crash can lose is the end of the journal, which means chunks are fetched again, never that an
unwritten chunk is trusted. Reading stops at the first entry that is torn or wrong; what follows is cut off.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from helios.errors import IntegrityError
from heliosfs.store.recipe import Recipe

MAGIC: Final = b"HMAP"
VERSION: Final = 1

_HEAD = struct.Struct("<4sHHI32s")
_CRC = struct.Struct("<I")
_SPAN = struct.Struct("<II")
_ENTRY = struct.Struct("<III")

MAX_RECIPE: Final = 1 << 28
"""Longest recipe record accepted, in bytes: 6.7 million chunks."""


@dataclass(frozen=True, slots=True)
class Journal:
    """What a journal says.

    ``have`` has one byte a chunk, 1 where it is safely on disk. ``end`` is the length in bytes of the valid part: the
    place to append at. ``seed`` is what the CRC of further entries starts from.
    """

    recipe: Recipe
    have: bytearray
    end: int
    seed: int


def start(recipe: Recipe) -> bytes:
    """A journal for a blob of which nothing is here yet."""
    record = recipe.encode()
    head = _HEAD.pack(MAGIC, VERSION, 0, len(record), bytes.fromhex(recipe.digest))
    return head + _CRC.pack(zlib.crc32(head)) + record


def entries(seed: int, end: int, chunks: Iterable[int]) -> bytes:
    """Entries that record chunks, to be appended at offset ``end`` of the journal with this ``seed``."""
    out = bytearray()
    for first, count in runs(chunks):
        span = _SPAN.pack(first, count)
        out += span + _CRC.pack(_check(seed, end + len(out), span))
    return bytes(out)


def replay(data: bytes, blob: str, size: int | None = None) -> Journal:
    """Read a journal of the blob named ``blob``.

    With ``size`` the blob must have that many bytes. Raises IntegrityError when the head or the recipe is damaged or
    another blob's; damaged entries only end the reading.
    """
    base = _HEAD.size + _CRC.size
    if len(data) < base:
        raise IntegrityError(f"the journal of {blob} has only {len(data)} bytes")
    magic, version, flags, length, named = _HEAD.unpack_from(data)
    seed = zlib.crc32(data[: _HEAD.size])
    if magic != MAGIC or _CRC.unpack_from(data, _HEAD.size)[0] != seed:
        raise IntegrityError(f"the journal of {blob} has a damaged head")
    if version != VERSION or flags:
        raise IntegrityError(
            f"the journal of {blob} has version {version} (flags {flags}), this Helios reads {VERSION}"
        )
    if length > MAX_RECIPE or len(data) < base + length:
        raise IntegrityError(f"the journal of {blob} ends inside its recipe")
    recipe = Recipe.decode(data[base : base + length], named.hex())
    if recipe.blob != blob or size not in (None, recipe.size):
        raise IntegrityError(f"the journal of {blob} is one of {recipe.blob} with {recipe.size} bytes")
    have = bytearray(len(recipe))
    end = base + length
    while end + _ENTRY.size <= len(data):
        first, count, crc = _ENTRY.unpack_from(data, end)
        if crc != _check(seed, end, data[end : end + _SPAN.size]) or not 0 < count <= len(recipe) - first:
            break
        have[first : first + count] = b"\1" * count
        end += _ENTRY.size
    return Journal(recipe, have, end, seed)


def runs(chunks: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Numbers as (first, count) runs of neighbours, in order."""
    first = count = 0
    for index in sorted(set(chunks)):
        if count and index == first + count:
            count += 1
            continue
        if count:
            yield first, count
        first, count = index, 1
    if count:
        yield first, count


def _check(seed: int, offset: int, span: bytes) -> int:
    return zlib.crc32(span, zlib.crc32(offset.to_bytes(8, "little"), seed))
