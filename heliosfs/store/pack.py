"""Packs: objects that hold chunks of several blobs back to back.

Binary, little endian (docs/format.md is normative):

    head     32 bytes  magic b"HPCK", version u16 (1, or 2 where chunks are encoded), flags u16 (0),
                       key id 16 bytes (0: not encrypted), 8 zero bytes
    chunks   back to back, as encoded
    index    one entry of 48 bytes a chunk, in order:
                 32 bytes BLAKE3 of the chunk, u32 length, u32 encoded length, codec u8, 7 zero bytes
    trailer  48 bytes  32 bytes BLAKE3 of the index, u64 offset of the index, u32 count, magic b"KCPH"

Readers find chunks through placements and never need the index. It is there so that the chunk index can be rebuilt
from the objects alone when the metadata is lost.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from blake3 import blake3

from helios.errors import IntegrityError
from heliosfs.store import codec as codecs
from heliosfs.store.recipe import MAX_CHUNK

MAGIC: Final = b"HPCK"
END_MAGIC: Final = b"KCPH"
VERSION: Final = 1
ENCODED_VERSION: Final = 2
"""Of packs that may hold encoded chunks."""
TARGET: Final = 64 << 20
"""A pack takes no further chunk once it holds this many bytes."""

_HEAD = struct.Struct("<4sHH16s8s")
_ENTRY = struct.Struct("<32sIIB7s")
_TRAILER = struct.Struct("<32sQI4s")
HEAD_SIZE: Final = _HEAD.size
ENTRY_SIZE: Final = _ENTRY.size
TRAILER_SIZE: Final = _TRAILER.size

_NO_KEY: Final = bytes(16)
_ZERO7: Final = bytes(7)
_ZERO8: Final = bytes(8)


@dataclass(frozen=True, slots=True)
class PackEntry:
    """One chunk of a pack; ``offset`` is where it starts in the object."""

    id: bytes
    offset: int
    length: int
    encoded_length: int
    codec: str = codecs.NONE


def head(*, encoded: bool = False) -> bytes:
    """The first 32 bytes of a pack; ``encoded``: its chunks may be."""
    return _HEAD.pack(MAGIC, ENCODED_VERSION if encoded else VERSION, 0, _NO_KEY, _ZERO8)


def tail(entries: Iterable[PackEntry]) -> bytes:
    """Index and trailer of a pack; the entries must touch, from the head on."""
    end = HEAD_SIZE
    index = bytearray()
    for entry in entries:
        if entry.offset != end:
            raise ValueError(f"a pack's chunk starts at {entry.offset}, not at {end} where the one before it ends")
        end += entry.encoded_length
        number = codecs.CODECS[entry.codec].number
        index += _ENTRY.pack(entry.id, entry.length, entry.encoded_length, number, _ZERO7)
    count = len(index) // ENTRY_SIZE
    return bytes(index) + _TRAILER.pack(blake3(index).digest(), end, count, END_MAGIC)


def index_span(trailer: bytes, size: int) -> tuple[int, int]:
    """Offset and length of the index, from the last 48 bytes of an object of ``size`` bytes. Raises IntegrityError."""
    if len(trailer) != TRAILER_SIZE:
        raise IntegrityError(f"a pack of {size} bytes has no trailer")
    _, offset, count, magic = _TRAILER.unpack(trailer)
    if magic != END_MAGIC:
        raise IntegrityError(f"not a whole pack: it ends with {magic!r}")
    length = count * ENTRY_SIZE
    if offset < HEAD_SIZE or offset + length + TRAILER_SIZE != size:
        raise IntegrityError(f"a pack of {size} bytes says that its index of {count} entries lies at {offset}")
    return offset, length


def parse(head_bytes: bytes, index: bytes, trailer: bytes, size: int) -> list[PackEntry]:
    """Read the chunks of a pack of ``size`` bytes from its head, index and trailer. Raises IntegrityError."""
    if len(head_bytes) != HEAD_SIZE:
        raise IntegrityError(f"a pack of {size} bytes is shorter than its head")
    magic, version, flags, key, zero = _HEAD.unpack(head_bytes)
    if magic != MAGIC:
        raise IntegrityError(f"not a pack: it starts with {magic!r}")
    if version not in (VERSION, ENCODED_VERSION) or flags or key != _NO_KEY or zero != _ZERO8:
        raise IntegrityError(f"pack version {version} (flags {flags}) is newer than this Helios; upgrade it")
    data_end, length = index_span(trailer, size)
    digest = _TRAILER.unpack(trailer)[0]
    if len(index) != length or blake3(index).digest() != digest:
        raise IntegrityError("the index of a pack does not match its hash")
    entries = []
    end = HEAD_SIZE
    for chunk, chunk_length, encoded, codec, zero in _ENTRY.iter_unpack(index):
        known = codecs.BY_NUMBER.get(codec) if version == ENCODED_VERSION or not codec else None
        if known is None or zero != _ZERO7:
            raise IntegrityError(f"a pack uses codec {codec}, which this Helios does not know; upgrade it")
        if not 0 < chunk_length <= MAX_CHUNK:
            raise IntegrityError(f"a pack has a chunk of {chunk_length} bytes stored in {encoded}")
        codecs.check(known.name, chunk_length, encoded)
        entries.append(PackEntry(chunk, end, chunk_length, encoded, known.name))
        end += encoded
    if end != data_end:
        raise IntegrityError(f"a pack's chunks end at byte {end}, but its index starts at {data_end}")
    return entries
