"""Chunks on their way to a registry (docs/native-api.md, Push): a head that names them, then their bytes, back to back.

The head: u32 number of chunks, and for each 32 bytes of BLAKE3 and u32 length, little endian.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

from helios.errors import InvalidInput
from heliosfs.store.recipe import MAX_CHUNK

MAX_BATCH: Final = 64 << 20
"""Most bytes of chunks in a batch: about a pack of them."""
MAX_CHUNKS: Final = 4096
"""Most chunks in a batch."""
MAX_RECIPE: Final = 8 << 20
"""Longest recipe record that a push may offer, in bytes: enough for some 900 GB of chunks of 4 MiB."""

_COUNT = struct.Struct("<I")
_ENTRY = struct.Struct("<32sI")
COUNT_SIZE: Final = _COUNT.size

Chunk = tuple[bytes, int]
"""BLAKE3 digest and length in bytes."""


def encode_head(chunks: Sequence[Chunk]) -> bytes:
    return _COUNT.pack(len(chunks)) + b"".join(_ENTRY.pack(*chunk) for chunk in chunks)


def entries_size(count: bytes) -> int:
    """How many bytes of the head follow its first field. Raises InvalidInput."""
    number = int(_COUNT.unpack(count)[0])
    if not 0 < number <= MAX_CHUNKS:
        raise InvalidInput(f"a batch of {number} chunks (1 to {MAX_CHUNKS} allowed)")
    return number * _ENTRY.size


def decode_entries(data: bytes) -> list[Chunk]:
    """The chunks that a head names. Raises InvalidInput for what can't be one."""
    chunks = [(bytes(digest), int(length)) for digest, length in _ENTRY.iter_unpack(data)]
    for digest, length in chunks:
        if not 0 < length <= MAX_CHUNK:
            raise InvalidInput(f"chunk {digest.hex()} has {length} bytes (1 to {MAX_CHUNK} allowed)")
    total = sum(length for _, length in chunks)
    if total > MAX_BATCH:
        raise InvalidInput(f"a batch with {total} bytes of chunks (at most {MAX_BATCH} allowed)")
    return chunks


def batches(chunks: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Numbers of chunks, each with its length, in batches that a registry takes."""
    out: list[list[int]] = []
    total = 0
    for number, length in zip(chunks, lengths, strict=True):
        if not out or total + length > MAX_BATCH or len(out[-1]) == MAX_CHUNKS:
            out.append([])
            total = 0
        out[-1].append(number)
        total += length
    return out
