"""The head of a GGUF file, read only as far as is needed to know where its tensors start.

Layout (ggml-org/ggml, docs/gguf.md, versions 2 and 3, little-endian): ``GGUF``, u32 version, u64 tensors, u64 metadata
entries, the entries (key, type, value), the tensors' infos (name, dimensions, type, offset), padding, tensor data. An
offset counts from the start of the data, which is aligned to ``general.alignment`` (32) as every tensor is.

A tensor's bytes are taken to reach to the next one's start, and the last one's to the file's end: the padding between
two goes with the first. So no table of the quantised types' sizes is needed, and types yet to come are cut as well.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

from helios.errors import InvalidInput

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
MAX_HEAD: Final = 32 << 20
"""Longest head that is read, in bytes: vocabularies of a quarter of a million tokens take some 10 MB."""
MAX_TENSORS: Final = 1 << 20
MAX_ENTRIES: Final = 1 << 16
MAX_NESTING: Final = 4
"""Arrays may hold arrays; nobody writes more than one inside another."""

ALIGNMENT: Final = b"general.alignment"

_U32, _U64 = Struct("<I"), Struct("<Q")
_PLAIN: Final = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value of each type that has a fixed length."""
_TYPE_U32, _TYPE_STRING, _TYPE_ARRAY = 4, 8, 9


class Short(Exception):
    """The head goes on behind the bytes given."""


def spans(head: bytes, size: int) -> tuple[int, list[tuple[int, int]]]:
    """Where the tensors' data of a GGUF file of ``size`` bytes starts, and each tensor's first byte and end.

    ``head`` is the file's start. The spans are in file order, touch, and cover everything from the start of the data to
    the end of the file. Raises Short when ``head`` is not the whole head, InvalidInput for what is no GGUF file that
    can be cut.
    """
    reader = _Head(head)
    if reader.take(4) != MAGIC or reader.u32() not in VERSIONS:
        raise InvalidInput(f"not a GGUF file of version {' or '.join(map(str, VERSIONS))}")
    tensors, entries = reader.count(MAX_TENSORS), reader.count(MAX_ENTRIES)
    alignment = 32
    for _ in range(entries):
        key, type_ = reader.string(), reader.u32()
        if key == ALIGNMENT and type_ == _TYPE_U32:
            alignment = reader.u32()
        else:
            reader.skip(type_)
    offsets = [reader.tensor() for _ in range(tensors)]
    if alignment == 0 or alignment % 8:
        raise InvalidInput(f"a GGUF file can't be aligned to {alignment} bytes")
    base = -(-reader.position // alignment) * alignment
    starts = sorted({base + offset for offset in offsets})
    if base > size or (starts and (starts[0] != base or starts[-1] > size)):
        raise InvalidInput(f"the tensors of a GGUF file lie outside its {size} bytes")
    if not starts:
        return size, []
    return base, list(zip(starts, [*starts[1:], size], strict=True))


class _Head:
    """The bytes so far and how far they were read."""

    def __init__(self, data: bytes) -> None:
        self._data, self.position = data, 0

    def take(self, length: int) -> bytes:
        start = self._advance(length)
        return self._data[start : self.position]

    def u32(self) -> int:
        return int(_U32.unpack_from(self._data, self._advance(4))[0])

    def u64(self) -> int:
        return int(_U64.unpack_from(self._data, self._advance(8))[0])

    def count(self, most: int) -> int:
        found = self.u64()
        if found > most:
            raise InvalidInput(f"a GGUF file's head announces {found} items, more than {most}")
        return found

    def string(self) -> bytes:
        return self.take(self.u64())

    def skip(self, type_: int, depth: int = 0) -> None:
        """Pass a value over."""
        if (length := _PLAIN.get(type_)) is not None:
            self._advance(length)
        elif type_ == _TYPE_STRING:
            self._advance(self.u64())
        elif type_ == _TYPE_ARRAY and depth < MAX_NESTING:
            inner, count = self.u32(), self.u64()
            if (length := _PLAIN.get(inner)) is not None:
                self._advance(length * count)
            else:
                # Every item takes 8 bytes or more of a head that is bounded, so a lie about the count ends soon.
                for _ in range(count):
                    self.skip(inner, depth + 1)
        else:
            raise InvalidInput(f"a GGUF file's head has a value of the unknown type {type_}")

    def tensor(self) -> int:
        """Pass a tensor's info over; returns its offset."""
        self._advance(self.u64())
        self._advance(8 * self.u32() + 4)
        return self.u64()

    def _advance(self, length: int) -> int:
        start, self.position = self.position, self.position + length
        if self.position > MAX_HEAD:
            raise InvalidInput(f"a GGUF file's head is longer than {MAX_HEAD} bytes")
        if self.position > len(self._data):
            raise Short
        return start
