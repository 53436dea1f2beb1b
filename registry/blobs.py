"""Reading a blob out of the objects its chunks lie in."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import TYPE_CHECKING

from helios.errors import IntegrityError, InvalidInput
from heliosfs.store.chunks import load
from heliosfs.store.objects import ObjectStore
from heliosfs.store.placement import PlacedBlob, Placement
from heliosfs.store.recipe import MAX_CHUNK, Recipe
from registry.healing import how_to_repair

if TYPE_CHECKING:
    from collections.abc import Iterator

    from typing_extensions import Buffer

BUFFER = 256 << 10
"""Bytes that a blob opened as a file reads ahead."""


class BlobReader:
    """One blob's bytes by range. Ranges are in bytes of the blob and are cut at its end."""

    def __init__(self, store: ObjectStore, recipe: Recipe, placement: Placement) -> None:
        """Raises IntegrityError for a placement that contradicts the recipe."""
        self._store, self._recipe = store, recipe
        self._placed = PlacedBlob(recipe, placement)

    @property
    def size(self) -> int:
        """Bytes in the blob."""
        return self._recipe.size

    def read(self, start: int, count: int) -> bytes:
        """The bytes of a range, every chunk they come from checked. Raises IntegrityError naming the chunk."""
        return b"".join(bytes(part) for part in self.iterate(start, count))

    def iterate(self, start: int, count: int) -> Iterator[memoryview]:
        """The bytes of a range, checked, a piece of one chunk at a time; a piece is valid until the next one."""
        buffer = self._buffer()
        for index in self._covering(start, count):
            low, high = self._recipe.span(index)
            yield self._load(index, buffer)[max(start, low) - low : min(start + count, high) - low]

    def verify(self, start: int = 0, count: int | None = None) -> int:
        """Check every chunk that a range touches; returns how many. Raises IntegrityError naming the first bad one."""
        buffer = self._buffer()
        chunks = self._covering(start, self.size if count is None else count)
        for index in chunks:
            self._load(index, buffer)
        return len(chunks)

    def _buffer(self) -> memoryview:
        return memoryview(bytearray(min(MAX_CHUNK, self.size)))

    def _covering(self, start: int, count: int) -> range:
        if start < 0 or count < 0:
            raise InvalidInput(f"{count} bytes from {start} is not a range of a blob")
        return self._recipe.covering(start, count)

    def _load(self, index: int, buffer: memoryview) -> memoryview:
        at = self._placed.locate(index)
        data = load(self._store, at, self._recipe.id(index), buffer)
        if data is None:
            low, high = self._recipe.span(index)
            raise IntegrityError(
                f"chunk {index} of blob {self._recipe.blob} (bytes {low} to {high}) is damaged: "
                f"object {at.object_key}, bytes {at.offset} to {at.offset + at.encoded_length}",
                hint=how_to_repair(at.object_key),
            )
        return data


class _Raw(io.RawIOBase):
    """A blob's checked bytes under Python's own buffering."""

    def __init__(self, blob: BlobReader) -> None:
        self._blob, self._position = blob, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._blob.size}[whence]
        if base + offset < 0:
            raise OSError("a seek before the start of a blob")  # as files do, and as zipfile expects
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Buffer, /) -> int:
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self._blob.size - self._position))
        if count:
            view[:count] = self._blob.read(self._position, count)
        self._position += count
        return count


def as_file(blob: BlobReader) -> io.BufferedReader:
    """The blob as a binary file that can be seeked in; a damaged chunk raises IntegrityError where it is read."""
    return io.BufferedReader(_Raw(blob), BUFFER)
