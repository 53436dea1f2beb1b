"""Reading blobs by range: bytes that were checked, from chunks that are encoded or not."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from helios.errors import IntegrityError, InvalidInput
from heliosfs.store import codec
from heliosfs.store.directory import DirectoryStore
from heliosfs.store.recipe import Recipe
from registry.ingest import ChunkLocation
from tests.support.ingest import reader, seeded

OBJECT = seeded(4000, 1)
KEYS = ["public/packs/00/0", "public/packs/00/1"]


CODED = "public/packs/00/2"


def encoded() -> tuple[bytes, dict[ChunkLocation, bytes]]:
    """An object of encoded chunks, and what they are."""
    data, found = bytearray(), {}
    for name in sorted(codec.CODECS.keys() - {codec.NONE}):
        for size in (20, 41, 90):
            chunk = bytes([size, 1]) * size
            stored = codec.encode(name, chunk)
            assert stored is not None
            found[ChunkLocation(CODED, len(data), len(chunk), len(stored), name)] = chunk
            data += stored
    return bytes(data), found


CODED_OBJECT, ENCODED = encoded()


@pytest.fixture(scope="module")
def store() -> Iterator[DirectoryStore]:
    with tempfile.TemporaryDirectory() as root, DirectoryStore(Path(root)) as opened:
        for key in KEYS:
            opened.put_bytes(key, OBJECT)
        opened.put_bytes(CODED, CODED_OBJECT)
        yield opened


@st.composite
def blobs(draw: st.DrawFn) -> tuple[Recipe, list[ChunkLocation], bytes]:
    """Chunks that lie anywhere in two objects, often behind each other, some of them encoded."""
    locations: list[ChunkLocation] = []
    parts: list[bytes] = []
    for length in draw(st.lists(st.integers(1, 100), max_size=12)):
        if draw(st.integers(0, 2)) == 0:
            locations.append(draw(st.sampled_from(list(ENCODED))))
            parts.append(ENCODED[locations[-1]])
            continue
        if locations and locations[-1].object_key != CODED and draw(st.booleans()):
            key, offset = locations[-1].object_key, locations[-1].offset + locations[-1].length
        else:
            key, offset = draw(st.sampled_from(KEYS)), draw(st.integers(0, 1000))
        locations.append(ChunkLocation(key, offset, length, length))
        parts.append(OBJECT[offset : offset + length])
    content = b"".join(parts)
    recipe = Recipe.build(hashlib.sha256(content).hexdigest(), [(blake3(p).digest(), len(p)) for p in parts])
    return recipe, locations, content


@given(blobs(), st.integers(0, 1300), st.integers(0, 1300))
def test_any_range_comes_back(
    store: DirectoryStore, blob: tuple[Recipe, list[ChunkLocation], bytes], start: int, count: int
) -> None:
    recipe, locations, content = blob
    opened = reader(store, recipe, locations)
    want = content[start : start + count]
    assert opened.size == len(content)
    assert opened.read(start, count) == want
    assert opened.verify(start, count) == len(recipe.covering(start, count))


@pytest.mark.parametrize(("start", "count"), [(-1, 1), (0, -1)])
def test_what_is_no_range_is_refused(store: DirectoryStore, start: int, count: int) -> None:
    opened = reader(
        store, Recipe.build("0" * 64, [(blake3(OBJECT).digest(), 4000)]), [ChunkLocation(KEYS[0], 0, 4000, 4000)]
    )
    for call in (opened.read, opened.verify):
        with pytest.raises(InvalidInput):
            list(call(start, count))  # type: ignore[operator]


def test_a_placement_that_contradicts_the_recipe_is_refused(store: DirectoryStore) -> None:
    recipe = Recipe.build("0" * 64, [(blake3(OBJECT).digest(), 4000)])
    with pytest.raises(IntegrityError, match="leaves its object of 4000 bytes"):
        reader(store, recipe, [ChunkLocation(KEYS[0], 1, 4000, 4000)])
    with pytest.raises(IntegrityError, match="0 chunks are placed"):
        reader(store, recipe, [])


def test_an_object_that_was_cut_is_an_integrity_error(tmp_path: Path) -> None:
    with DirectoryStore(tmp_path) as store:
        store.put_bytes(KEYS[0], OBJECT)
        recipe = Recipe.build("0" * 64, [(blake3(OBJECT).digest(), 4000)])
        opened = reader(store, recipe, [ChunkLocation(KEYS[0], 0, 4000, 4000)])
        path = tmp_path / KEYS[0]
        path.chmod(0o644)
        path.write_bytes(OBJECT[:100])
        with pytest.raises(IntegrityError, match="ends at byte 100"):
            opened.verify()


def test_an_encoded_chunk_that_is_damaged_is_an_integrity_error(tmp_path: Path) -> None:
    """Damage that the codec notices, and damage that only the hash shows."""
    at, chunk = next(iter(ENCODED.items()))
    other = codec.encode(at.codec, bytes(len(chunk)))
    assert other is not None
    for stored in (bytes(at.encoded_length), other + bytes(at.encoded_length)):
        at = ChunkLocation(CODED, 0, at.length, min(len(stored), len(other)), at.codec)
        with DirectoryStore(tmp_path / str(len(stored))) as store:
            store.put_bytes(CODED, stored)
            opened = reader(store, Recipe.build("0" * 64, [(blake3(chunk).digest(), len(chunk))]), [at])
            with pytest.raises(IntegrityError, match="chunk 0 of blob 0000"):
                opened.verify()
