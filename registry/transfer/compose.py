"""A blob put together from the chunks that are stored here and those that come from elsewhere.

Only what the store lacks travels. Nothing is believed: the ingest hashes every byte again, the file's sha256 included.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, Protocol

from helios.errors import IntegrityError
from heliosfs.store.chunks import read
from heliosfs.store.objects import ObjectStore
from heliosfs.store.placement import NO_CODEC, ChunkLocation
from heliosfs.store.recipe import Recipe
from registry.ingest import Source
from registry.ingest.types import ChunkIndex

LOOKUP: Final = 400
"""Chunks looked up at a time."""


class Missing(Protocol):
    """Makes the source of the chunks that are not here: their bytes one after another, in the recipe's order."""

    def __call__(self, chunks: list[int], /) -> Source: ...


def locate(index: ChunkIndex, domain: str, recipe: Recipe) -> list[ChunkLocation | None]:
    """Where each chunk of the recipe lies in the store, None for those it lacks."""
    ids = [digest for digest, _ in recipe.chunks()]
    out: list[ChunkLocation | None] = []
    for start in range(0, len(ids), LOOKUP):
        out += index.find(domain, ids[start : start + LOOKUP])
    return out


def lacking(places: Sequence[ChunkLocation | None], recipe: Recipe) -> list[int]:
    """Numbers of the chunks that must travel, in order. One that the blob repeats travels each time it appears."""
    for index, place in enumerate(places):
        start, end = recipe.span(index)
        if place is not None and place.length != end - start:
            raise IntegrityError(f"chunk {index} of blob {recipe.blob} is stored with {place.length} bytes")
    return [index for index, place in enumerate(places) if place is None]


class Composed:
    """The blob's bytes in order: a ``Source`` for an ingest. ``travelled`` counts bytes that were not here."""

    def __init__(
        self, store: ObjectStore, recipe: Recipe, places: Sequence[ChunkLocation | None], missing: Source
    ) -> None:
        self._store, self._missing = store, missing
        self._parts = self._order(recipe, places)
        self._part: tuple[ChunkLocation | None, int, int] = (None, 0, 0)
        self._decoded = memoryview(b"")
        """The chunk at hand, where it is encoded."""
        self.travelled = 0

    def readinto(self, buffer: memoryview, /) -> int:
        place, done, length = self._part
        while done == length:
            try:
                place, length = next(self._parts)
            except StopIteration:
                return 0
            done = 0
        wanted = buffer[: length - done]
        if place is None:
            count = self._missing.readinto(wanted)
            self.travelled += count
        else:
            self._read(place, done, wanted)
            count = len(wanted)
        self._part = (place, done + count, length)
        return count

    def _read(self, place: ChunkLocation, done: int, wanted: memoryview) -> None:
        """Fill the buffer with a stored chunk's bytes from ``done`` on."""
        if place.codec == NO_CODEC:
            self._store.read_into(place.object_key, place.offset + done, wanted)
            return
        if not done:
            self._decoded = read(self._store, place, memoryview(bytearray(place.encoded_length)))
        wanted[:] = self._decoded[done : done + len(wanted)]

    def _order(
        self, recipe: Recipe, places: Sequence[ChunkLocation | None]
    ) -> Iterator[tuple[ChunkLocation | None, int]]:
        for (_, length), place in zip(recipe.chunks(), places, strict=True):
            yield place, length
