"""Hashes of the Xet protocol (draft-denis-xet-03, "Hashing"): their text form, and the Merkle tree over chunks.

A chunk's hash is BLAKE3 keyed with ``DATA_KEY``. A xorb's hash is the root of a tree over its chunks' (hash, length), a
file's is that of its chunks keyed once more with zeros. Neither depends on how chunks are compressed.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Sequence
from typing import Final

from blake3 import blake3

from helios.errors import InvalidInput

DATA_KEY: Final = bytes.fromhex("6697f5775b9550de3135cbaca597181c9de421109beb2b58b4d0b04b93adf229")
NODE_KEY: Final = bytes.fromhex("017ec5c7a5472996fd946666b48a02e65ddd536f37c76dd2f86352e64a53713f")
FILE_KEY: Final = bytes(32)

FANOUT: Final = 4
"""Children of a node in the mean; one has at least two (but for a last one) and at most 2 * FANOUT + 1."""

Chunk = tuple[bytes, int]
"""A chunk's hash, 32 bytes, and its length."""

_HEX = re.compile(r"[0-9a-f]{64}\Z")
_WORDS = struct.Struct("<4Q")
_TEXT = struct.Struct(">4Q")


def to_text(digest: bytes) -> str:
    """The 64 digits by which the protocol writes a hash: four little-endian 64-bit numbers."""
    return _TEXT.pack(*_WORDS.unpack(digest)).hex()


def from_text(text: str) -> bytes:
    """The 32 bytes of a hash in text; raises InvalidInput."""
    if not _HEX.match(text):
        raise InvalidInput(f"{text[:80]!r} is not a Xet hash: 64 lower-case hexadecimal digits")
    return _WORDS.pack(*_TEXT.unpack(bytes.fromhex(text)))


def chunk_hash(data: bytes | memoryview) -> bytes:
    """The hash of a chunk's bytes."""
    return blake3(data, key=DATA_KEY).digest()


def xorb_hash(chunks: Iterable[Chunk]) -> bytes:
    """The hash of a xorb that holds these chunks, at least one."""
    nodes = list(chunks)
    while len(nodes) > 1:
        parents = []
        start = 0
        while start < len(nodes):
            stop = start + _cut(nodes, start)
            parents.append(_merge(nodes[start:stop]))
            start = stop
        nodes = parents
    return nodes[0][0]


def file_hash(chunks: Iterable[Chunk]) -> bytes:
    """The hash of a file that consists of these chunks, at least one."""
    return blake3(xorb_hash(chunks), key=FILE_KEY).digest()


def _cut(nodes: Sequence[Chunk], start: int) -> int:
    """How many nodes from ``start`` on get one parent: up to the third or later one whose hash divides by FANOUT."""
    left = min(len(nodes) - start, 2 * FANOUT + 1)
    for index in range(2, left):
        if nodes[start + index][0][24] % FANOUT == 0:  # the last of the four numbers
            return index + 1
    return left


def _merge(nodes: Sequence[Chunk]) -> Chunk:
    text = "".join(f"{to_text(digest)} : {length}\n" for digest, length in nodes)
    return blake3(text.encode(), key=NODE_KEY).digest(), sum(length for _, length in nodes)
