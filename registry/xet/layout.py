"""Layouts: how a blob is cut into the chunks and xorbs of the Xet protocol. No bytes of the blob are in one.

Binary record, little endian (docs/format.md is normative):

    magic   4 bytes  b"HXET"
    version u16      1
    flags   u16      0
    blob    32 bytes sha256 of the blob
    file    32 bytes its hash in the Xet protocol
    size    u64      bytes in the blob
    xorbs   u32      number of xorbs
    terms   u32      number of terms
    chunks  u32      number of chunks in all xorbs
    xorb    xorbs x (32 bytes hash, u32 number of chunks)
    term    terms x (u32 xorb, u32 first chunk, u32 chunk after the last), in the order of the blob
    length  chunks x u32, xorb after xorb

A xorb as it is served is its chunks uncompressed, each behind a head of 8 bytes: so every byte of a xorb is a byte of a
head or a byte of the blob, and nothing but this record has to be kept.
"""

from __future__ import annotations

import struct
import sys
from array import array
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

from helios.errors import IntegrityError

MAGIC: Final = b"HXET"
VERSION: Final = 1
MAX_CHUNK: Final = 128 << 10
"""Longest chunk in bytes; clients refuse a longer one."""
MAX_XORB: Final = 8192
"""Most chunks in a xorb."""
HEAD: Final = 8
"""Bytes ahead of a chunk in a xorb: version 0, stored length (24 bits), scheme 0 (as it is), length (24 bits)."""

_HEAD = struct.Struct("<4sHH32s32sQIII")
_XORB = struct.Struct("<32sI")

assert array("I").itemsize == 4, "a C unsigned int has 4 bytes wherever Helios runs"


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes ``start`` to ``stop`` of a xorb as it is served, whose data is bytes from ``offset`` of the blob.

    ``data`` is the offset in the xorb's data that ``offset`` stands for; ``count`` the number of bytes of data.
    """

    start: int
    stop: int
    data: int
    offset: int
    count: int


class Xorb:
    """One xorb: its chunks, and where their bytes lie in the blob."""

    def __init__(self, digest: bytes, lengths: Sequence[int]) -> None:
        self.digest = digest
        self.ends = array("I", accumulate(lengths))
        self._runs: list[tuple[int, int]] = []  # (first chunk, offset in the blob), in order

    def __len__(self) -> int:
        return len(self.ends)

    def before(self, chunk: int) -> int:
        """Bytes of data ahead of a chunk."""
        return self.ends[chunk - 1] if chunk else 0

    def position(self, chunk: int) -> int:
        """Where a chunk's head starts in the xorb as it is served; of the chunk after the last: the xorb's size."""
        return self.before(chunk) + HEAD * chunk

    def at(self, data: int) -> int:
        """The chunk that holds this byte of data."""
        return bisect_right(self.ends, data)

    def locate(self, data: int) -> int:
        """Where a byte of data is in the xorb as it is served; of a chunk's first one: where the chunk's head is."""
        chunk = self.at(data)
        inside = data - self.before(chunk)
        return self.position(chunk) + (HEAD + inside if inside else 0)

    def chunk_at(self, position: int) -> int:
        """The chunk whose head or data this byte of the served xorb belongs to."""
        return bisect_right(range(len(self.ends)), position, key=lambda chunk: self.position(chunk + 1))

    def head(self, chunk: int) -> bytes:
        """The 8 bytes ahead of a chunk."""
        length = (self.ends[chunk] - self.before(chunk)).to_bytes(3, "little")
        return b"\0" + length + b"\0" + length

    def place(self, terms: list[tuple[int, int, int]]) -> bool:
        """Learn from (first chunk, chunk after the last, offset in the blob) where the data lies; False: not of all."""
        covered, end = 0, -1
        for first, stop, offset in sorted(terms):
            if first > covered:
                return False
            if stop > covered:
                start = offset + self.before(covered) - self.before(first)
                if start != end:
                    self._runs.append((covered, start))
                covered, end = stop, offset + self.before(stop) - self.before(first)
        return covered == len(self.ends)

    def spans(self, start: int, stop: int) -> Iterator[Span]:
        """The served bytes ``start`` to ``stop`` as spans whose data is consecutive in the blob.

        A range inside of one head alone has a span with a count of 0.
        """
        chunk = self.chunk_at(start)
        run = bisect_right(self._runs, chunk, key=lambda run: run[0]) - 1
        while start < stop:
            first, offset = self._runs[run]
            run += 1
            last = self._runs[run][0] if run < len(self._runs) else len(self.ends)
            high = min(stop, self.position(last))
            low, top = self._data(start), self._data(high)
            yield Span(start, high, low, offset + low - self.before(first), top - low)
            start = high

    def _data(self, position: int) -> int:
        """Bytes of data ahead of a byte of the served xorb."""
        chunk = self.chunk_at(position)
        if chunk == len(self.ends):
            return self.before(chunk)
        return self.before(chunk) + max(0, position - self.position(chunk) - HEAD)


@dataclass(frozen=True, slots=True)
class Part:
    """A term of a reconstruction: chunks of a xorb (its number in the layout) and how many bytes they are."""

    xorb: int
    first: int
    stop: int
    length: int


@dataclass(frozen=True, slots=True)
class Reconstruction:
    """How bytes of a file are put together: ``parts`` in order, the first ``skip`` bytes of which are left out.

    ``fetch`` says for each xorb, by its number, which ranges of chunks that takes: sorted, none touching another.
    """

    skip: int
    parts: list[Part]
    fetch: dict[int, list[tuple[int, int]]]


class Layout:
    """A blob's layout, checked: every byte of the blob is in one term, every chunk's bytes are known to the blob."""

    def __init__(
        self,
        blob: str,
        file: bytes,
        xorbs: Sequence[tuple[bytes, Sequence[int]]],
        terms: Sequence[tuple[int, int, int]],
    ) -> None:
        """``xorbs`` are (hash, lengths of the chunks), ``terms`` (xorb, first chunk, chunk after the last).

        Raises IntegrityError.
        """
        self.blob, self.file = blob, file
        for _, lengths in xorbs:
            if not 0 < len(lengths) <= MAX_XORB or not 0 < min(lengths) <= max(lengths) <= MAX_CHUNK:
                raise self._bad(f"a xorb has {len(lengths)} chunks, or one of an impossible length")
        self.xorbs = [Xorb(*xorb) for xorb in xorbs]
        self._terms = [array("I"), array("I"), array("I")]
        self._ends = array("Q")
        self._add(terms)

    def _add(self, terms: Sequence[tuple[int, int, int]]) -> None:
        places: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
        end = 0
        for number, first, stop in terms:
            if number >= len(self.xorbs) or not first < stop <= len(self.xorbs[number]):
                raise self._bad(f"a term names chunks {first} to {stop} of xorb {number}, which it has not")
            places[number].append((first, stop, end))
            end += self.xorbs[number].before(stop) - self.xorbs[number].before(first)
            self._ends.append(end)
            for column, value in zip(self._terms, (number, first, stop), strict=True):
                column.append(value)
        for number, xorb in enumerate(self.xorbs):
            if not xorb.place(places[number]):
                raise self._bad(f"not every chunk of xorb {number} occurs in the blob")

    @property
    def size(self) -> int:
        """Bytes in the blob."""
        return self._ends[-1] if self._ends else 0

    def reconstruct(self, start: int, stop: int) -> Reconstruction:
        """How bytes ``start`` to ``stop`` of the blob are made from whole chunks; needs 0 <= start < stop <= size."""
        parts: list[Part] = []
        wanted: dict[int, list[tuple[int, int]]] = defaultdict(list)
        skip = 0
        for index in range(bisect_right(self._ends, start), bisect_left(self._ends, stop) + 1):
            number, first, last = (column[index] for column in self._terms)
            xorb, offset = self.xorbs[number], self._ends[index - 1] if index else 0
            base = xorb.before(first) - offset  # from bytes of the blob to bytes of the xorb's data
            if start > offset:
                first = xorb.at(start + base)
                skip = start + base - xorb.before(first)
            if stop < self._ends[index]:
                last = bisect_left(xorb.ends, stop + base) + 1
            parts.append(Part(number, first, last, xorb.before(last) - xorb.before(first)))
            wanted[number].append((first, last))
        return Reconstruction(skip, parts, {number: _union(ranges) for number, ranges in wanted.items()})

    def encode(self) -> bytes:
        """The record's bytes."""
        count = sum(len(xorb) for xorb in self.xorbs)
        head = _HEAD.pack(
            MAGIC, VERSION, 0, bytes.fromhex(self.blob), self.file, self.size, len(self.xorbs), len(self._ends), count
        )
        xorbs = b"".join(_XORB.pack(xorb.digest, len(xorb)) for xorb in self.xorbs)
        terms = array("I", (value for term in zip(*self._terms, strict=True) for value in term))
        lengths = array("I", (b - a for xorb in self.xorbs for a, b in zip([0, *xorb.ends], xorb.ends, strict=False)))
        return head + xorbs + _bytes(terms) + _bytes(lengths)

    @classmethod
    def decode(cls, data: bytes) -> Layout:
        """Read a record, checking every bound. Raises IntegrityError."""
        if len(data) < _HEAD.size:
            raise IntegrityError(f"a Xet layout of {len(data)} bytes is shorter than its head")
        magic, version, flags, blob, file, size, xorbs, terms, chunks = _HEAD.unpack_from(data)
        if magic != MAGIC:
            raise IntegrityError(f"not a Xet layout: it starts with {magic!r}")
        if version != VERSION or flags:
            raise IntegrityError(f"Xet layout version {version} (flags {flags}) is newer than this Helios; upgrade it")
        behind_xorbs = _HEAD.size + _XORB.size * xorbs
        behind_terms = behind_xorbs + 12 * terms
        if len(data) != behind_terms + 4 * chunks:
            raise IntegrityError(f"the Xet layout of {blob.hex()} has {len(data)} bytes, not what its head says")
        lengths = _numbers(data[behind_terms:])
        found: list[tuple[bytes, Sequence[int]]] = []
        used = 0
        for digest, count in _XORB.iter_unpack(memoryview(data)[_HEAD.size : behind_xorbs]):
            found.append((bytes(digest), lengths[used : used + count]))
            used += count
        numbers = iter(_numbers(data[behind_xorbs:behind_terms]))
        layout = cls(blob.hex(), file, found, list(zip(numbers, numbers, numbers, strict=True)))
        if layout.size != size or used != chunks:
            raise layout._bad(f"its head says {size} bytes and {chunks} chunks, there are {layout.size} and {used}")
        return layout

    def _bad(self, why: str) -> IntegrityError:
        return IntegrityError(f"the Xet layout of {self.blob} is wrong: {why}")


def _union(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    out: list[tuple[int, int]] = []
    for first, stop in sorted(ranges):
        if out and first <= out[-1][1]:
            out[-1] = out[-1][0], max(out[-1][1], stop)
        else:
            out.append((first, stop))
    return out


def _numbers(data: bytes) -> array[int]:
    out = array("I", data)
    if sys.byteorder == "big":
        out.byteswap()
    return out


def _bytes(numbers: array[int]) -> bytes:
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tobytes()
