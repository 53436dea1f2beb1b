"""Reading a blob out of the objects its chunks lie in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from blake3 import blake3

from helios.errors import IntegrityError, InvalidInput
from heliosfs.store.objects import ObjectStore
from heliosfs.store.placement import NO_CODEC, ChunkLocation
from heliosfs.store.recipe import MAX_CHUNK, Recipe


@dataclass(frozen=True, slots=True)
class Segment:
    """``count`` bytes of the object ``key`` from ``offset`` on."""

    key: str
    offset: int
    count: int


class BlobReader:
    """One blob's bytes by range.

    ``locations`` has one item for each chunk of ``recipe``, in order. Ranges are in bytes of the blob and are cut at
    its end.
    """

    def __init__(self, store: ObjectStore, recipe: Recipe, locations: Sequence[ChunkLocation]) -> None:
        if len(locations) != len(recipe):
            raise IntegrityError(f"blob {recipe.blob} has {len(recipe)} chunks, but {len(locations)} are placed")
        for index, at in enumerate(locations):
            start, end = recipe.span(index)
            if at.codec != NO_CODEC or at.key is not None or not at.length == at.encoded_length == end - start:
                raise IntegrityError(f"chunk {index} of blob {recipe.blob} is placed in a form unknown to this Helios")
        self._store, self._recipe, self._locations = store, recipe, locations

    @property
    def size(self) -> int:
        """Bytes in the blob."""
        return self._recipe.size

    def segments(self, start: int, count: int) -> Iterator[Segment]:
        """Where the bytes of a range lie, in order and as few segments as possible: what sendfile takes.

        Their content is not checked here.
        """
        pending: Segment | None = None
        for index, low, high in self._parts(start, count):
            at = self._locations[index]
            offset = at.offset + low
            if pending is not None and pending.key == at.object_key and pending.offset + pending.count == offset:
                pending = Segment(pending.key, pending.offset, pending.count + high - low)
            else:
                if pending is not None:
                    yield pending
                pending = Segment(at.object_key, offset, high - low)
        if pending is not None:
            yield pending

    def read(self, start: int, count: int) -> bytes:
        """The bytes of a range, every chunk they come from checked. Raises IntegrityError naming the chunk."""
        return b"".join(part for part in self.iterate(start, count))

    def iterate(self, start: int, count: int) -> Iterator[memoryview]:
        """The bytes of a range, checked, a piece of one chunk at a time; a piece is valid until the next one."""
        buffer = memoryview(bytearray(min(MAX_CHUNK, self._recipe.size)))
        for index, low, high in self._parts(start, count):
            yield self._load(index, buffer)[low:high]

    def verify(self, start: int = 0, count: int | None = None) -> int:
        """Check every chunk that a range touches; returns how many. Raises IntegrityError naming the first bad one."""
        buffer = memoryview(bytearray(min(MAX_CHUNK, self._recipe.size)))
        checked = 0
        for index, _, _ in self._parts(start, self._recipe.size if count is None else count):
            self._load(index, buffer)
            checked += 1
        return checked

    def _parts(self, start: int, count: int) -> Iterator[tuple[int, int, int]]:
        """The chunks of a range: index, and where the range starts and ends inside the chunk."""
        if start < 0 or count < 0:
            raise InvalidInput(f"{count} bytes from {start} is not a range of a blob")
        for index in self._recipe.covering(start, count):
            low, high = self._recipe.span(index)
            yield index, max(start, low) - low, min(start + count, high) - low

    def _load(self, index: int, buffer: memoryview) -> memoryview:
        at = self._locations[index]
        data = buffer[: at.length]
        self._store.read_into(at.object_key, at.offset, data)
        if blake3(data).digest() != self._recipe.id(index):
            start, end = self._recipe.span(index)
            raise IntegrityError(
                f"chunk {index} of blob {self._recipe.blob} (bytes {start} to {end}) is damaged: "
                f"object {at.object_key}, bytes {at.offset} to {at.offset + at.length}",
                hint="publish or pull the file again from a good copy",
            )
        return data
