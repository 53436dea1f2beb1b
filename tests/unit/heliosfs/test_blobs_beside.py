"""A cache beside the registry's object store: what is there already is verified where it lies and never copied."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from helios.errors import IntegrityError
from helios.metrics import MountMetrics
from heliosfs.blobs import BlobRef
from heliosfs.store.directory import DirectoryStore
from heliosfs.store.keys import PUBLIC, blob_key
from tests.support.damage import flip
from tests.support.origin import Origin
from tests.support.stores import filled, read, running, until

MIB = 1 << 20
CHUNK = 4 * MIB
SIZE = 3 * CHUNK + 12345
DATA = random.Random(7).randbytes(SIZE)
Expect = Callable[[str], None]


def put(root: Path, want: BlobRef, data: bytes = DATA) -> Path:
    """Make the blob's object in the directory store at ``root``."""
    key = blob_key(PUBLIC, want.sha256)
    with DirectoryStore(root) as store:
        path = store.staging() / "blob"
        path.write_bytes(data)
        store.put_file(key, path)
    return root / key


@pytest.mark.trio
@pytest.mark.parametrize("path", ["model.safetensors", "tokenizer.json"])
async def test_an_object_beside_the_cache_is_linked_not_fetched(tmp_path: Path, origin: Origin, path: str) -> None:
    want, metrics = origin.add(DATA, path), MountMetrics()
    stored = put(tmp_path / "store", want)
    cache = tmp_path / "cache"
    async with running(cache, [origin.url], metrics=metrics, beside=tmp_path / "store") as store:
        handle = await store.open(want)
        assert await handle.read(CHUNK - 5, 10) == DATA[CHUNK - 5 : CHUNK + 5]
        await filled(store, want)
        assert await handle.read(0, SIZE) == DATA
        fd = handle.local_fd()
        assert fd is not None
        assert os.fstat(fd).st_ino == stored.stat().st_ino, "one file, two names"
        await handle.close()
    assert stored.stat().st_nlink == 2
    assert stored.read_bytes() == DATA
    assert stored.stat().st_mode & 0o777 == 0o444
    assert origin.sent() == 0
    assert metrics.fetched_bytes.labels("store")._value.get() == SIZE
    stored.unlink()
    async with running(cache, []) as store:
        assert await read(store, want, 0, SIZE) == DATA, "the store may forget it"


@pytest.mark.trio
async def test_what_was_verified_is_not_verified_again(tmp_path: Path, origin: Origin) -> None:
    want = origin.add(DATA, "tokenizer.json")
    put(tmp_path / "store", want)
    metrics = MountMetrics()
    async with running(tmp_path / "cache", [origin.url], beside=tmp_path / "store") as store:
        handle = await store.open(want)
        store._filler._fits = lambda blob: False  # type: ignore[method-assign]
        assert await handle.read(0, 10) == DATA[:10]
        await handle.close()
        await until(lambda: not store._blobs)
        assert store.status(want.sha256).local_bytes == CHUNK
    async with running(tmp_path / "cache", [origin.url], metrics=metrics, beside=tmp_path / "store") as store:
        assert await read(store, want, 0, SIZE) == DATA
        await filled(store, want)
    assert metrics.fetched_bytes.labels("store")._value.get() == SIZE - CHUNK
    assert origin.sent() == 0


@pytest.mark.trio
async def test_an_object_on_another_filesystem_is_copied(
    tmp_path: Path, origin: Origin, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = origin.add(DATA)
    stored = put(tmp_path / "store", want)

    def link(*args: object, **options: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", link)
    async with running(tmp_path / "cache", [origin.url], beside=tmp_path / "store") as store:
        assert await read(store, want, 0, SIZE) == DATA
        await filled(store, want)
    assert origin.sent() == SIZE
    assert stored.stat().st_nlink == 1


@pytest.mark.trio
async def test_an_object_that_anybody_may_change_or_of_another_size_is_copied(tmp_path: Path, origin: Origin) -> None:
    loose, short = origin.add(DATA, "loose.bin"), origin.add(DATA[1:], "short.bin")
    put(tmp_path / "store", loose).chmod(0o644)
    put(tmp_path / "store", short, DATA[1:-1])
    async with running(tmp_path / "cache", [origin.url], beside=tmp_path / "store") as store:
        assert await read(store, loose, 0, SIZE) == DATA
        assert await read(store, short, 0, SIZE) == DATA[1:]
        await filled(store, loose)
        await filled(store, short)
    assert origin.sent() == 2 * SIZE - 1


@pytest.mark.trio
async def test_a_damaged_object_is_never_delivered_nor_changed(
    tmp_path: Path, origin: Origin, caplog: pytest.LogCaptureFixture, expected_log_errors: Expect
) -> None:
    expected_log_errors("a chunk is corrupt")
    want = origin.add(DATA, "model.safetensors")
    stored = put(tmp_path / "store", want)
    flip(stored, CHUNK + 99)
    origin.fault("corrupt", lambda r: "/objects/" in r.path, times=None, after=99)
    damaged = stored.read_bytes()
    with caplog.at_level(logging.INFO):
        async with running(tmp_path / "cache", [origin.url], beside=tmp_path / "store") as store:
            handle = await store.open(want)
            assert await handle.read(0, CHUNK) == DATA[:CHUNK]
            assert await handle.read(2 * CHUNK, SIZE) == DATA[2 * CHUNK :]
            with pytest.raises(IntegrityError, match=r"chunk 1 of .* is corrupt"):
                await handle.read(2 * CHUNK - 1, 2)
            await handle.close()
    assert any(record.__dict__.get("chunk") == 1 for record in caplog.records if "corrupt" in record.message)
    assert stored.read_bytes() == damaged
    assert stored.stat().st_nlink == 1, "what has shown a wrong byte is not kept"


@pytest.mark.trio
async def test_a_damaged_chunk_comes_from_a_source_that_has_it_right(
    tmp_path: Path, origin: Origin, other: Origin, expected_log_errors: Expect
) -> None:
    expected_log_errors("a chunk is corrupt")
    want = origin.add(DATA, "model.safetensors")
    other.add(DATA, "model.safetensors")
    stored = put(tmp_path / "store", want)
    flip(stored, CHUNK + 99)
    damaged = stored.read_bytes()
    origin.fault("corrupt", lambda r: "/objects/" in r.path, times=None, after=99)
    async with running(tmp_path / "cache", [origin.url, other.url], beside=tmp_path / "store") as store:
        handle = await store.open(want)
        with trio.fail_after(20):
            assert await handle.read(0, SIZE) == DATA
            assert await handle.read(CHUNK, CHUNK) == DATA[CHUNK : 2 * CHUNK]
        await handle.close()
    assert stored.read_bytes() == damaged, "the store is the registry's to repair"
    async with running(tmp_path / "cache", [other.url]) as store:
        assert await read(store, want, 0, SIZE) == DATA
        await filled(store, want)
