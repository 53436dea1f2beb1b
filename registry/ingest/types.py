"""What goes into an ingest and what comes out of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from helios.errors import Unavailable
from heliosfs.store.manifest import FileEntry
from heliosfs.store.objects import ObjectInfo
from heliosfs.store.placement import ChunkLocation
from heliosfs.store.recipe import Recipe


class SenderGone(Unavailable):
    """What a source raises when its sender has left in the middle: what came of it may be worth keeping.

    ``kept`` are the bytes that were, as chunks.
    """

    kept = 0


class Source(Protocol):
    """Where a file's bytes come from: a local file, a queue fed by a request's body."""

    def readinto(self, buffer: memoryview, /) -> int:
        """Fill some of the buffer (never empty) and return how many bytes; 0 at the end. Blocks.

        It must have a deadline of its own. To cancel an ingest, make this raise: the error comes out of
        ``Ingest.ingest`` once everything is cleaned up.
        """


@dataclass(frozen=True, slots=True)
class NewObject:
    """An object that an ingest wrote."""

    key: str
    size: int


@dataclass(frozen=True, slots=True)
class IngestedBlob:
    """A file whose every byte lies in the object store.

    ``entry`` is its line for a manifest, ``record`` the bytes of ``recipe``, already stored as an object;
    ``locations`` has one item for each chunk of the recipe, in order, and names new and older objects alike.
    ``objects`` are those that this ingest wrote, recipe included. ``new_bytes`` and ``deduplicated_bytes`` count the
    blob's bytes and add up to its size.
    """

    path: str
    entry: FileEntry
    recipe: Recipe
    record: bytes
    locations: list[ChunkLocation]
    objects: tuple[NewObject, ...]
    new_bytes: int
    deduplicated_bytes: int


class Target(Protocol):
    """Where an ingest writes objects: the part of an ``ObjectStore`` that it needs."""

    def info(self, key: str) -> ObjectInfo:
        """See ``ObjectStore.info``."""

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        """See ``ObjectStore.read_into``."""

    def staging(self) -> Path:
        """See ``ObjectStore.staging``."""

    def put_file(self, key: str, path: Path) -> None:
        """See ``ObjectStore.put_file``."""

    def put_bytes(self, key: str, data: bytes) -> None:
        """See ``ObjectStore.put_bytes``."""

    def delete(self, key: str) -> None:
        """Take back an object that was put in vain, unless somebody else needs it."""


class ChunkIndex(Protocol):
    """Which chunks and blobs a domain holds, and where. Called from several worker threads at once."""

    def find(self, domain: str, ids: Sequence[bytes]) -> list[ChunkLocation | None]:
        """Locations of chunks by their 32-byte BLAKE3 digests, one for each, None for unknown ones.

        At most a few hundred ids a call. Only what a finished ``add_blob`` recorded may be returned.
        """

    def recipe_of(self, domain: str, sha256: str) -> str | None:
        """The digest of the recipe that a finished ``add_blob`` recorded for the blob first; None for no such blob."""

    def add_blob(self, domain: str, blob: IngestedBlob) -> None:
        """Record a blob, its chunks and its objects in one transaction, durably.

        Adding a blob again changes nothing but may name other objects; a chunk already known keeps its location.
        ``Ingest`` calls it last, when every object is stored; if it raises, the ingest's packs are deleted.
        """


class GrowingIndex(ChunkIndex, Protocol):
    """An index that takes chunks of blobs that are not whole yet."""

    def add_chunks(
        self, domain: str, where: str, placed: Sequence[tuple[bytes, ChunkLocation]], objects: Sequence[NewObject]
    ) -> None:
        """Record chunks and the objects that they lie in, in one transaction; one already known stays where it is."""
