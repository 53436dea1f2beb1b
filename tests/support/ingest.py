"""For tests of ingest: an index in memory, sources, seeded models, and the audit of a store."""

from __future__ import annotations

import hashlib
import json
import random
import threading
from collections.abc import Callable, Mapping, Sequence

from blake3 import blake3

from heliosfs.store import pack
from heliosfs.store.objects import ObjectStore
from heliosfs.store.placement import Placement
from heliosfs.store.recipe import Recipe
from registry.blobs import BlobReader
from registry.ingest import ChunkLocation, IngestedBlob


class MemoryIndex:
    """A ``ChunkIndex`` that checks what it is asked. ``fail_add`` makes the next ``add_blob`` raise."""

    def __init__(self) -> None:
        self.chunks: dict[tuple[str, bytes], ChunkLocation] = {}
        self.blobs: dict[tuple[str, str], IngestedBlob] = {}
        self.calls = 0
        self.fail_add: Exception | None = None
        self._lock = threading.Lock()

    def find(self, domain: str, ids: Sequence[bytes]) -> list[ChunkLocation | None]:
        assert 0 < len(ids) <= 256
        assert all(len(id_) == 32 for id_ in ids)
        with self._lock:
            self.calls += 1
            return [self.chunks.get((domain, id_)) for id_ in ids]

    def recipe_of(self, domain: str, sha256: str) -> str | None:
        with self._lock:
            blob = self.blobs.get((domain, sha256))
        return None if blob is None else blob.entry.recipe

    def add_blob(self, domain: str, blob: IngestedBlob) -> None:
        with self._lock:
            if self.fail_add is not None:
                error, self.fail_add = self.fail_add, None
                raise error
            assert len(blob.locations) == len(blob.recipe)
            self.blobs.setdefault((domain, blob.entry.sha256), blob)
            for (id_, _), location in zip(blob.recipe.chunks(), blob.locations, strict=True):
                self.chunks.setdefault((domain, id_), location)


class Bytes:
    """A source that gives at most ``most`` bytes a call, and calls ``at(offset)`` before each."""

    def __init__(self, data: bytes, most: int = 1 << 30, at: Callable[[int], None] = lambda _offset: None) -> None:
        self._data, self._most, self._at = data, most, at
        self.offset = 0

    def readinto(self, buffer: memoryview, /) -> int:
        assert len(buffer) > 0
        self._at(self.offset)
        part = self._data[self.offset : self.offset + min(len(buffer), self._most)]
        buffer[: len(part)] = part
        self.offset += len(part)
        return len(part)


def seeded(size: int, seed: int) -> bytes:
    """Random bytes that are the same each time."""
    return random.Random(seed).randbytes(size)


def safetensors(tensors: Mapping[str, bytes], **metadata: str) -> bytes:
    """A safetensors file of U8 tensors."""
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name, data in tensors.items():
        header[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded + b"".join(tensors.values())


def reader(store: ObjectStore, recipe: Recipe, locations: Sequence[ChunkLocation]) -> BlobReader:
    """A reader of a blob that lies at these locations."""
    placement = Placement.build(recipe, locations, 1, 300, lambda key: (f"/{key}", store.info(key).size))
    return BlobReader(store, recipe, placement)


def stored_bytes(store: ObjectStore) -> int:
    """Bytes of all objects."""
    return sum(info.size for info in store.list(""))


def audit(store: ObjectStore) -> dict[str, int]:
    """Check every object against its name or its own index; returns how many there are of each kind."""
    kinds: dict[str, int] = {}
    for info in store.list(""):
        _, kind, _, name = info.key.split("/")
        kinds[kind] = kinds.get(kind, 0) + 1
        buffer = bytearray(info.size)
        store.read_into(info.key, 0, memoryview(buffer))
        data = bytes(buffer)
        if kind == "packs":
            trailer = data[-pack.TRAILER_SIZE :]
            offset, length = pack.index_span(trailer, len(data))
            for entry in pack.parse(data[: pack.HEAD_SIZE], data[offset : offset + length], trailer, len(data)):
                assert blake3(data[entry.offset : entry.offset + entry.length]).digest() == entry.id
        else:
            assert hashlib.sha256(data).hexdigest() == name, info.key
            if kind == "recipes":
                Recipe.decode(data, name)
    return kinds
