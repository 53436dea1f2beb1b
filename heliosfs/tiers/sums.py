"""Sums beside a whole blob: what the scrubber compares its bytes with. No I/O in here.

BLAKE3 is what makes a byte trusted; XXH3-64 only finds bytes that changed since, at a fraction of the cost, and a
difference is looked at again with BLAKE3 before anything is done about it. Binary file, little endian:

    magic    4 bytes  b"HSUM"
    version  u16      1
    flags    u16      0
    length   u32      bytes of the recipe record that follows the head
    count    u32      number of sums: the recipe's number of chunks, or 0 where they are not known yet
    digest   32 bytes sha256 of that record
    recipe   the recipe record (heliosfs/store/recipe.py)
    sum      count x u64  XXH3-64, seed 0, of each chunk
    check    u64      XXH3-64, seed 0, of everything before it

The recipe is the manifest's. A blob that is here without one gets chunks of 4 MiB, made of bytes that had the blob's
sha256. Losing the file costs a look with the strong hash: it is written without fsync, and what is torn counts as none.
"""

from __future__ import annotations

import os
import struct
from array import array
from dataclasses import dataclass
from typing import Final

from xxhash import xxh3_64_intdigest

from helios.errors import IntegrityError
from heliosfs.store.recipe import Recipe

MAGIC: Final = b"HSUM"
VERSION: Final = 1

_HEAD = struct.Struct("<4sHHII32s")
_CHECK = struct.Struct("<Q")
_BEGIN: Final = struct.pack("<4sHH", MAGIC, VERSION, 0)

MAX_BYTES: Final = 1 << 29
"""Longest file that is read, in bytes."""


def sum_of(data: memoryview | bytes) -> int:
    """XXH3-64 of a chunk."""
    return xxh3_64_intdigest(data)


def follows(fd: int, recipe_digest: str) -> bool:
    """Whether an open file of sums follows this recipe, by its head alone."""
    head = os.pread(fd, _HEAD.size, 0)
    return head.startswith(_BEGIN) and head.endswith(bytes.fromhex(recipe_digest)) and len(head) == _HEAD.size


@dataclass(frozen=True, slots=True)
class Sums:
    """``values`` has one XXH3-64 for each chunk of the recipe; None: they are not known."""

    recipe: Recipe
    values: array[int] | None = None

    def encode(self) -> bytes:
        """The file's bytes."""
        record, values = self.recipe.encode(), self.values or array("Q")
        head = _HEAD.pack(MAGIC, VERSION, 0, len(record), len(values), bytes.fromhex(self.recipe.digest))
        body = head + record + struct.pack(f"<{len(values)}Q", *values)
        return body + _CHECK.pack(sum_of(body))

    @classmethod
    def decode(cls, data: bytes, blob: str) -> Sums:
        """Read the file of the blob named ``blob``. Raises IntegrityError for one that is damaged or another blob's."""
        if len(data) < _HEAD.size + _CHECK.size:
            raise IntegrityError(f"the sums of {blob} have only {len(data)} bytes")
        body = memoryview(data)[: -_CHECK.size]
        if _CHECK.unpack_from(data, len(body))[0] != sum_of(body):
            raise IntegrityError(f"the sums of {blob} are damaged")
        magic, version, flags, length, count, digest = _HEAD.unpack_from(data)
        if magic != MAGIC:
            raise IntegrityError(f"not sums: it starts with {magic!r}")
        if version != VERSION or flags:
            raise IntegrityError(f"sums version {version} (flags {flags}) are newer than this Helios; upgrade it")
        if len(body) != _HEAD.size + length + 8 * count:
            raise IntegrityError(f"the sums of {blob} have {len(data)} bytes, which is not what their head says")
        recipe = Recipe.decode(bytes(body[_HEAD.size : _HEAD.size + length]), digest.hex())
        if recipe.blob != blob or count not in (0, len(recipe)):
            raise IntegrityError(f"the sums are {count} for {len(recipe)} chunks of {recipe.blob}, not of {blob}")
        values = array("Q", struct.unpack_from(f"<{count}Q", data, _HEAD.size + length)) if count else None
        return cls(recipe, values)


class Tally:
    """Sums of a blob as its chunks are verified. Threads may share it: each chunk is noted by whoever verified it."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._values = array("Q", bytes(8 * len(recipe)))
        self._known = bytearray(len(recipe))

    def note(self, index: int, data: memoryview) -> None:
        """These are the chunk's verified bytes."""
        self._values[index] = sum_of(data)
        self._known[index] = 1

    def sums(self) -> Sums:
        """All of them; without values when a chunk was verified in an earlier life of the process."""
        return Sums(self._recipe, self._values if all(self._known) else None)
