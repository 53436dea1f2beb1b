"""Recipes: a blob's ordered chunks.

Binary record, little endian (docs/format.md is normative):

    magic   4 bytes  b"HRCP"
    version u16      1
    flags   u16      0
    blob    32 bytes sha256 of the blob
    size    u64      bytes in the blob
    count   u32      number of chunks
    entry   count x (32 bytes BLAKE3 of the chunk, u32 length)

The recipe's digest is the sha256 of the record. The manifest names it, so whoever holds the manifest can check a
recipe from any source, and with it every chunk.
"""

from __future__ import annotations

import hashlib
import struct
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from helios.errors import IntegrityError

MAGIC: Final = b"HRCP"
VERSION: Final = 1
MAX_CHUNK: Final = 4 << 20
"""Largest chunk in bytes: 4 MiB."""
MAX_BLOB: Final = 4 << 40
"""Largest blob that is taken in, in bytes: a million chunks. Lists of them must fit into memory."""
MAX_RECIPE: Final = 64 << 20
"""Longest recipe that is taken from another registry, in bytes."""

_HEAD = struct.Struct("<4sHH32sQI")
_ENTRY = struct.Struct("<32sI")


@dataclass(frozen=True, slots=True)
class Recipe:
    """The chunks of one blob, kept compact: 40 bytes a chunk.

    ``ids`` holds the chunks' 32-byte BLAKE3 digests back to back, ``ends`` the offset in the blob where each chunk
    ends. An empty blob has no chunks.
    """

    blob: str
    ids: bytes
    ends: array[int]

    @classmethod
    def build(cls, blob: str, chunks: Iterable[tuple[bytes, int]]) -> Recipe:
        """Make a recipe from (BLAKE3 digest, length) pairs in order."""
        ids = bytearray()
        ends = array("Q")
        end = 0
        for digest, length in chunks:
            if len(digest) != 32 or not 0 < length <= MAX_CHUNK:
                raise IntegrityError(f"the recipe of {blob} has a chunk of {length} bytes (1 to {MAX_CHUNK} allowed)")
            ids += digest
            end += length
            ends.append(end)
        return cls(blob, bytes(ids), ends)

    @property
    def size(self) -> int:
        """Bytes in the blob."""
        return self.ends[-1] if self.ends else 0

    def __len__(self) -> int:
        return len(self.ends)

    def id(self, index: int) -> bytes:
        """BLAKE3 digest of chunk ``index``, 32 bytes."""
        return self.ids[32 * index : 32 * index + 32]

    def span(self, index: int) -> tuple[int, int]:
        """Start and end offset of chunk ``index`` in the blob."""
        return (self.ends[index - 1] if index else 0), self.ends[index]

    def locate(self, offset: int) -> int:
        """Index of the chunk that holds the byte at ``offset``; needs 0 <= offset < size."""
        return bisect_right(self.ends, offset)

    def covering(self, offset: int, length: int) -> range:
        """Indices of the chunks that hold any of ``length`` bytes from ``offset``, cut at the blob's end."""
        stop = min(offset + length, self.size)
        return range(0) if offset >= stop else range(self.locate(offset), self.locate(stop - 1) + 1)

    def windows(self, chunks: range) -> Iterator[range]:
        """Consecutive chunks in groups of as many as ``MAX_CHUNK`` bytes hold."""
        first = chunks.start
        while first < chunks.stop:
            stop = min(chunks.stop, bisect_right(self.ends, self.span(first)[0] + MAX_CHUNK, lo=first))
            yield range(first, stop)
            first = stop

    def chunks(self) -> Iterator[tuple[bytes, int]]:
        """(BLAKE3 digest, length) pairs in order."""
        start = 0
        for index, end in enumerate(self.ends):
            yield self.id(index), end - start
            start = end

    def encode(self) -> bytes:
        """The record's bytes."""
        head = _HEAD.pack(MAGIC, VERSION, 0, bytes.fromhex(self.blob), self.size, len(self))
        return head + b"".join(_ENTRY.pack(digest, length) for digest, length in self.chunks())

    @classmethod
    def decode(cls, data: bytes, digest: str | None = None) -> Recipe:
        """Read a record, checking every bound; with ``digest`` also its sha256. Raises IntegrityError."""
        if digest is not None and hashlib.sha256(data).hexdigest() != digest:
            raise IntegrityError(f"a recipe does not match its digest {digest}")
        if len(data) < _HEAD.size:
            raise IntegrityError(f"a recipe of {len(data)} bytes is shorter than its head")
        magic, version, flags, blob, size, count = _HEAD.unpack_from(data)
        if magic != MAGIC:
            raise IntegrityError(f"not a recipe: it starts with {magic!r}")
        if version != VERSION or flags:
            raise IntegrityError(f"recipe version {version} (flags {flags}) is newer than this Helios; upgrade it")
        if len(data) != _HEAD.size + count * _ENTRY.size:
            raise IntegrityError(f"the recipe of {blob.hex()} says {count} chunks but has {len(data)} bytes")
        recipe = cls.build(blob.hex(), _ENTRY.iter_unpack(memoryview(data)[_HEAD.size :]))
        if recipe.size != size:
            raise IntegrityError(f"the recipe of {recipe.blob} says {size} bytes but its chunks hold {recipe.size}")
        return recipe

    @property
    def digest(self) -> str:
        """sha256 of the record, 64 hexadecimal digits."""
        return hashlib.sha256(self.encode()).hexdigest()
