"""Xorbs as hf-xet uploads them: chunks, each behind a head of 8 bytes; and the files that are made of them.

Head: u8 version (0), u24 bytes as they lie here, u8 scheme, u24 bytes of the chunk, little endian (draft-denis-xet-03,
"Xorb Format"). Schemes: 0 as it is; 1 LZ4 frame; 2 the same of the chunk's bytes grouped by their number modulo 4. What
may follow behind the chunks starts with ``XETBLOB`` and is not needed. Nothing here is believed: the file that comes
out must have the sha256 that was announced.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import lz4.frame

from helios.errors import InvalidInput, Unavailable

HEAD: Final = 8
FOOTER: Final = b"XETBLOB"
MAX_CHUNK: Final = 1 << 20
"""Longest chunk, in bytes; the protocol has 128 KiB at most."""
MAX_CHUNKS: Final = 1 << 14
"""Most chunks of a xorb; the protocol has 8,192."""
MAX_XORB: Final = (64 << 20) + MAX_CHUNKS * HEAD + (1 << 20)
"""Longest xorb, in bytes, footer included."""

NONE, LZ4, GROUPED_LZ4 = 0, 1, 2

Place = tuple[int, int, int, int]
"""Where a chunk's bytes lie, how many they are, their scheme, and how many they are decoded."""

Part = tuple[Path, Sequence[Place]]
"""Consecutive chunks of one xorb."""


def scan(path: Path) -> list[Place]:
    """The chunks of a xorb. Raises InvalidInput for a file that is none."""
    places: list[Place] = []
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        at = 0
        while at < size:
            head = os.pread(file.fileno(), HEAD, at)
            if head.startswith(FOOTER):
                break
            if len(head) < HEAD or head[0] != 0:
                raise InvalidInput(f"the xorb has no head of a chunk at byte {at}")
            length, scheme, decoded = int.from_bytes(head[1:4], "little"), head[4], int.from_bytes(head[5:8], "little")
            if (
                scheme not in (NONE, LZ4, GROUPED_LZ4)
                or not 0 < decoded <= MAX_CHUNK
                or not 0 < length <= 2 * MAX_CHUNK
            ):
                raise InvalidInput(f"the chunk at byte {at} of the xorb is malformed")
            if at + HEAD + length > size:
                raise InvalidInput(f"the xorb ends inside the chunk at byte {at}")
            places.append((at + HEAD, length, scheme, decoded))
            at += HEAD + length
            if len(places) > MAX_CHUNKS:
                raise InvalidInput(f"the xorb has more than {MAX_CHUNKS} chunks")
    if not places:
        raise InvalidInput("the xorb has no chunk")
    return places


def decode(data: bytes, scheme: int, size: int) -> bytes:
    """A chunk's bytes. Raises InvalidInput for what does not decode to exactly ``size`` bytes."""
    if scheme != NONE:
        try:
            # Never more than announced, whatever the frame says of itself.
            data = lz4.frame.LZ4FrameDecompressor().decompress(data, size + 1)
        except RuntimeError as error:
            raise InvalidInput(f"a chunk of the xorb does not decompress: {error}") from None
    if len(data) != size:
        raise InvalidInput(f"a chunk of the xorb has {len(data)} bytes or more, its head says {size}")
    return _ungroup(data) if scheme == GROUPED_LZ4 else data


def _ungroup(data: bytes) -> bytes:
    """Undo the grouping: first come bytes 0, 4, 8…, then 1, 5, 9… and so on."""
    out, at = bytearray(len(data)), 0
    for number in range(4):
        count = (len(data) - number + 3) // 4
        out[number::4] = data[at : at + count]
        at += count
    return bytes(out)


class XorbSource:
    """A file made of chunks, as a source of an ingest."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.size = sum(place[3] for _, places in parts for place in places)
        self._chunks = self._decoded(parts)
        self._left = memoryview(b"")

    def readinto(self, buffer: memoryview, /) -> int:
        if not self._left:
            self._left = memoryview(next(self._chunks, b""))
        count = min(len(buffer), len(self._left))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count

    def _decoded(self, parts: Sequence[Part]) -> Iterator[bytes]:
        for path, places in parts:
            try:
                with path.open("rb", buffering=0) as file:
                    for at, length, scheme, size in places:
                        yield decode(os.pread(file.fileno(), length, at), scheme, size)
            except OSError as error:
                raise Unavailable(f"an uploaded xorb can't be read: {error.strerror}; upload again") from None
