"""Verified reads: no byte of a chunk leaves before the chunk has passed."""

import asyncio
import contextlib
import os
import threading

import pytest
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helios.errors import IntegrityError
from heliosfs.store.directory import DirectoryStore
from heliosfs.store.placement import PlacedBlob, PlacedObject, Placement, Run
from heliosfs.store.recipe import Recipe
from registry.hub.verified import Passed, VerifiedReader, Wanted
from tests.support.damage import flip

WANTED = Wanted("models/o/m", "c" * 40, "model.safetensors")
CHUNK = 1000
BLOB = "b" * 64


class Stored:
    """A blob of ``count`` chunks in two objects: the first two chunks in the middle of a pack, then the rest."""

    def __init__(self, root, count: int = 40, last: int = CHUNK) -> None:
        self.store = DirectoryStore(root)
        self.content = os.urandom(CHUNK * (count - 1) + last)
        chunks = [self.content[at : at + CHUNK] for at in range(0, len(self.content), CHUNK)]
        recipe = Recipe.build(BLOB, [(blake3(c).digest(), len(c)) for c in chunks])
        pack = b"p" * 77 + b"".join(chunks[:2]) + b"q" * 5
        rest = b"".join(chunks[2:])
        objects = []
        for key, data in (("public/packs/aa/x", pack), ("public/blobs/bb/y", rest)):
            self.store.put_bytes(key, data)
            objects.append(PlacedObject(key, f"/api/v1/objects/{key}", len(data)))
        runs = [Run(0, 2, 0, 77), Run(2, count - 2, 1, 0)]
        self.blob = PlacedBlob(recipe, Placement(BLOB, 1, 300.0, objects, runs))
        self.failures = 0

    def failed(self) -> None:
        self.failures += 1

    def flip(self, key: str, offset: int) -> None:
        flip(self.store.root / key, offset)


@pytest.fixture
def stored(tmp_path):
    found = Stored(tmp_path / "store")
    with contextlib.closing(found.store):
        yield found


async def collect(reader: VerifiedReader, blob: PlacedBlob, start: int, stop: int, into: bytearray) -> None:
    async with contextlib.aclosing(reader.parts(blob, start, stop, WANTED)) as parts:
        async for part in parts:
            data = os.pread(part.file.fileno(), part.count, part.offset)
            assert len(data) == part.count
            into += data


def read(reader: VerifiedReader, blob: PlacedBlob, start: int, stop: int) -> bytes:
    out = bytearray()
    asyncio.run(collect(reader, blob, start, stop, out))
    return bytes(out)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_range_is_exact(stored, data):
    size = len(stored.content)
    start = data.draw(st.integers(0, size - 1))
    stop = data.draw(st.integers(start + 1, size))
    with contextlib.closing(VerifiedReader(stored.store, stored.failed)) as reader:
        for _ in range(2):
            assert read(reader, stored.blob, start, stop) == stored.content[start:stop]
    assert stored.failures == 0


@pytest.mark.parametrize("chunk", [0, 1, 2, 7, 20, 39])
def test_nothing_of_a_damaged_chunk_or_behind_it_leaves(stored, chunk, expected_log_errors):
    expected_log_errors("a chunk in the store is damaged")
    key, at = ("public/packs/aa/x", 77 + chunk * CHUNK) if chunk < 2 else ("public/blobs/bb/y", (chunk - 2) * CHUNK)
    stored.flip(key, at + 500)
    with contextlib.closing(VerifiedReader(stored.store, stored.failed)) as reader:
        out = bytearray()
        with pytest.raises(
            IntegrityError, match=rf"model.safetensors of models/o/m: chunk {chunk} \(bytes {chunk}"
        ) as e:
            asyncio.run(collect(reader, stored.blob, 0, len(stored.content), out))
        assert key in e.value.hint
        assert bytes(out) == stored.content[: len(out)]
        assert len(out) <= chunk * CHUNK
        with pytest.raises(IntegrityError):
            read(reader, stored.blob, chunk * CHUNK + 1, chunk * CHUNK + 2)
        # The chunks around it are fine and are served.
        if chunk + 1 < 40:
            low = (chunk + 1) * CHUNK
            assert read(reader, stored.blob, low, len(stored.content)) == stored.content[low:]
    assert stored.failures == 2


def test_the_log_names_model_file_and_chunk(stored, expected_log_errors, caplog):
    expected_log_errors("a chunk in the store is damaged")
    stored.flip("public/blobs/bb/y", 0)
    with contextlib.closing(VerifiedReader(stored.store, stored.failed)) as reader, pytest.raises(IntegrityError):
        read(reader, stored.blob, 2000, 2001)
    (record,) = [r for r in caplog.records if r.levelname == "ERROR"]
    assert (record.model, record.file, record.chunk) == ("models/o/m", "model.safetensors", 2)


def test_damage_done_after_a_chunk_passed_is_noticed(stored, expected_log_errors):
    expected_log_errors("a chunk in the store is damaged")
    with contextlib.closing(VerifiedReader(stored.store, stored.failed)) as reader:
        assert read(reader, stored.blob, 0, len(stored.content)) == stored.content
        stored.flip("public/blobs/bb/y", 0)
        with pytest.raises(IntegrityError):
            read(reader, stored.blob, 2000, 3000)


@pytest.mark.parametrize("how", ["gone", "short"])
def test_an_object_that_is_gone_or_short_is_damage_too(stored, how, expected_log_errors):
    expected_log_errors("a chunk in the store is damaged")
    path = stored.store.root / "public/blobs/bb/y"
    path.unlink() if how == "gone" else os.truncate(path, 5)
    with contextlib.closing(VerifiedReader(stored.store, stored.failed)) as reader, pytest.raises(IntegrityError):
        read(reader, stored.blob, 2000, 3000)
    assert stored.failures == 1


def test_a_fresh_chunk_is_not_hashed_again(stored, monkeypatch):
    import registry.hub.verified as verified

    hashed = []
    compare = verified._compare
    monkeypatch.setattr(verified, "_compare", lambda data, digest: (hashed.append(digest), compare(data, digest)))
    now = [0.0]
    reader = VerifiedReader(stored.store, stored.failed, Passed(60, clock=lambda: now[0]))
    with contextlib.closing(reader):
        for _ in range(3):
            read(reader, stored.blob, 0, len(stored.content))
        assert len(hashed) == 40
        now[0] = 61
        read(reader, stored.blob, 0, 10)
        assert len(hashed) == 41


def test_a_store_without_local_files(stored, expected_log_errors):
    class Remote(DirectoryStore):
        def open_local(self, key):
            return None

    remote = object.__new__(Remote)
    remote.__dict__ = stored.store.__dict__
    with contextlib.closing(VerifiedReader(remote, stored.failed)) as reader:
        assert read(reader, stored.blob, 1500, 9_999) == stored.content[1500:9_999]
        stored.flip("public/blobs/bb/y", 0)
        expected_log_errors("a chunk in the store is damaged")
        with pytest.raises(IntegrityError):
            read(reader, stored.blob, 1500, 9_999)


def test_a_client_that_leaves_closes_the_files(stored):
    before = set(os.listdir("/proc/self/fd"))

    async def leave(after: int) -> None:
        async with contextlib.aclosing(reader.parts(stored.blob, 0, len(stored.content), WANTED)) as parts:
            for _ in range(after):
                await anext(parts)

    reader = VerifiedReader(stored.store, stored.failed)
    with contextlib.closing(reader):
        for after in range(6):
            asyncio.run(leave(after))

    left = {os.readlink(f"/proc/self/fd/{fd}") for fd in set(os.listdir("/proc/self/fd")) - before if _open(fd)}
    assert not [name for name in left if str(stored.store.root) in name]
    assert not [t for t in threading.enumerate() if t.name.startswith("verify")]


def _open(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


class TestPassed:
    def test_only_the_same_bytes_of_the_same_file_are_fresh(self):
        now = [0.0]
        passed = Passed(10, clock=lambda: now[0])
        passed.add("k", (1, 2), 0, b"d")
        assert passed.fresh("k", (1, 2), 0, b"d")
        assert not passed.fresh("k", (1, 3), 0, b"d")
        assert not passed.fresh("k2", (1, 2), 0, b"d")
        assert not passed.fresh("k", (1, 2), 1, b"d")
        assert not passed.fresh("k", (1, 2), 0, b"e")
        now[0] = 10
        assert not passed.fresh("k", (1, 2), 0, b"d")

    def test_it_is_bounded(self):
        passed = Passed(10, limit=100)
        for file in range(30):
            for offset in range(10):
                passed.add(f"k{file}", (0,), offset, b"d")
        assert passed._count <= 100
        assert sum(map(len, passed._files.values())) == passed._count
        assert passed.fresh("k29", (0,), 0, b"d")
        assert not passed.fresh("k0", (0,), 0, b"d")
        for offset in range(1000):
            passed.add("one", (0,), offset, b"d")
        assert sum(map(len, passed._files.values())) == passed._count <= 100
        assert passed.fresh("one", (0,), 999, b"d")
