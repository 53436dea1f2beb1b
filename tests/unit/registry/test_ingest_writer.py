"""The raw-or-packs decision against a model, with small chunks of any length and any share known."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from heliosfs.store import pack
from heliosfs.store.directory import DirectoryStore
from heliosfs.store.recipe import Recipe
from registry.ingest import ChunkLocation, NewObject, staged, writer
from registry.ingest.slabs import Slab
from registry.ingest.writer import KNOWN_SHIFT, BlobWriter
from tests.support.ingest import MemoryIndex, audit, reader, seeded

PALETTE = [seeded(length, i) for i, length in enumerate([1, 100, 4095, 4096, 4097, 8192, 12_289, 20_000] * 6)]


@pytest.fixture(scope="module", params=["direct", "cached"])
def store(request: pytest.FixtureRequest) -> Iterator[DirectoryStore]:
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as root:
        patch.setattr(pack, "TARGET", 30_000)
        patch.setattr(writer, "SLAB", 0 if request.param == "direct" else 1 << 40)
        with DirectoryStore(Path(root)) as opened:
            yield opened


def fill(slab: Slab, offset: int, chunks: list[bytes]) -> Slab:
    slab.assign(offset, [len(chunk) for chunk in chunks])[:] = b"".join(chunks)
    slab.ids = [blake3(chunk).digest() for chunk in chunks]
    return slab


@settings(max_examples=60)
@given(
    chunks=st.lists(st.sampled_from(PALETTE), max_size=60),
    known=st.sets(st.sampled_from(PALETTE), max_size=10),
    expected=st.booleans(),
    data=st.data(),
)
def test_every_chunk_is_stored_once_and_the_blob_can_be_read(
    store: DirectoryStore, chunks: list[bytes], known: set[bytes], expected: bool, data: st.DataObject
) -> None:
    for info in list(store.list("")):
        store.delete(info.key)
    for left in store.staging().iterdir():  # of an example that failed
        if left.name != ".lock":
            left.unlink()
    index = MemoryIndex()
    for number, chunk in enumerate(sorted(known)):
        key = f"public/packs/00/{number:032x}"
        store.put_bytes(key, b"head" + chunk)
        location = ChunkLocation(key, 4, len(chunk), len(chunk))
        index.chunks["public", blake3(chunk).digest()] = location
    olds = {info.key for info in store.list("")}
    content = b"".join(chunks)

    made = BlobWriter(store, index, "public", len(content), known=expected)
    slabs = [Slab(), Slab()]
    offset = turn = 0
    rest = list(chunks)
    while rest:
        count = data.draw(st.integers(1, len(rest)))
        slab = fill(slabs[turn % 2], offset, rest[:count])
        made.add(slab)
        staged.flush(slab)
        offset += len(slab.data)
        turn += 1
        rest = rest[count:]
    stored: list[NewObject] = []
    digest = hashlib.sha256(content).hexdigest()
    locations, new = made.put(digest, stored)
    made.abort()

    recipe = Recipe.build(digest, [(blake3(chunk).digest(), len(chunk)) for chunk in chunks])
    if chunks:
        assert reader(store, recipe, locations).read(0, len(content)) == content
    assert [p.name for p in store.staging().iterdir()] == [".lock"]
    assert {(info.key, info.size) for info in store.list("") if info.key not in olds} == {
        (o.key, o.size) for o in stored
    }

    repeated = len(content) - sum(map(len, set(chunks)))
    shared = repeated + sum(len(chunk) for chunk in set(chunks) & known)
    fresh = set(chunks) - known
    if not expected and shared <= len(content) >> KNOWN_SHIFT:
        assert [o.key.split("/")[1] for o in stored] == ["blobs"]
        assert new == len(content)
    else:
        assert {o.key.split("/")[1] for o in stored} <= {"packs"}
        assert new == sum(map(len, fresh))
        overhead = pack.HEAD_SIZE + pack.TRAILER_SIZE
        assert sum(o.size for o in stored) == new + len(stored) * overhead + len(fresh) * pack.ENTRY_SIZE
        assert all(o.size - overhead - len(fresh) * pack.ENTRY_SIZE < 30_000 + 20_000 for o in stored)
    for key in olds:
        store.delete(key)
    audit(store)
