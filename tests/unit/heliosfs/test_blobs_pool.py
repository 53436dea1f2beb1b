"""The memory pool under a blob store: what is read from it, and who is not needed for that."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from helios.errors import IntegrityError
from helios.metrics import MountMetrics
from heliosfs.blobs import BlobRef, BlobStore
from heliosfs.fuse.handles import BlobReader
from heliosfs.fuse.reading import LocalReader
from heliosfs.tiers.local import LocalBlob
from tests.support.origin import Made, Origin
from tests.support.stores import filled, read, roomy, running, until

MIB = 1 << 20
CHUNK = 4 * MIB
SETTINGS = roomy(request_deadline_s=1.0, connections=4, buffer_mib=32, pool_mib=32)
NO_ROOM = roomy(request_deadline_s=1.0, connections=4, buffer_mib=32, pool_mib=32, cache_limit_gib=1e-6)
"""The disk takes no file."""

pytestmark = pytest.mark.trio


async def held(store: BlobStore, want: BlobRef, offset: int, size: int) -> bytes | None:
    """What the channel would answer by itself, right after an open."""
    handle = await store.open(want)
    try:
        parts = handle.held(offset, size)
        return None if parts is None else b"".join(parts)
    finally:
        await handle.close()


async def test_small_files_stay_while_weights_pass_and_need_no_registry(tmp_path: Path, origin: Origin) -> None:
    config = origin.add(Made(700, seed=1), "config.json")
    tokenizer = origin.add(Made(2 * CHUNK - 5, seed=2), "tokenizer.json")
    weights = origin.add(Made(12 * CHUNK, seed=3), "model.safetensors", cuts=[1000] + [CHUNK] * 11 + [CHUNK - 1000])
    metrics = MountMetrics()
    async with running(tmp_path, [origin.url], NO_ROOM, metrics) as store:
        for want in (config, tokenizer):
            assert await read(store, want, 0, want.size) == origin.data(want, 0, want.size)
        handle = await store.open(weights)
        for offset in range(0, weights.size, MIB):
            assert await handle.read(offset, MIB) == origin.data(weights, offset, MIB)
        await handle.close()
        await until(lambda: not store._blobs)
        origin.fault("status", lambda request: True, times=None)
        asked = len(origin.requests)
        for want in (config, tokenizer):
            assert await held(store, want, 0, want.size) == origin.data(want, 0, want.size)
            assert await read(store, want, want.size - 600, 500) == origin.data(want, want.size - 600, 500)
        assert await held(store, weights, 0, 1000) == origin.data(weights, 0, 1000), "the header stayed too"
        assert await held(store, weights, 6 * CHUNK, CHUNK) is None, "what is not all there is not given"
        assert not [r for r in origin.requests[asked:] if r.query.get("blob") in (config.sha256, tokenizer.sha256)]
        report = store.pool.report()
        assert report.hits["small"] == 5
        assert report.used <= report.limit == 32 * MIB
        assert metrics.registry.get_sample_value("helios_mount_pool_hits_total", {"kind": "small"}) == 5
        assert metrics.registry.get_sample_value("helios_mount_read_bytes_total", {"tier": "memory"}) >= 1000


async def test_small_files_are_read_when_the_disk_gives_them_back_no_more(
    tmp_path: Path, origin: Origin, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = origin.add(Made(700, seed=1), "config.json")
    other = origin.add(Made(2 * CHUNK, seed=2), "model.bin")
    async with running(tmp_path, [origin.url], SETTINGS) as store:
        for want in (config, other):
            assert await read(store, want, 0, want.size) == origin.data(want, 0, want.size)
            await filled(store, want)
        await until(lambda: not store._blobs)

        def fail(*args: object) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        handle = await store.open(config)
        reader = BlobReader(handle, LocalReader(), config, lambda _: None)
        os.close(handle.local_fd() or -1)  # as a disk that went away
        assert await reader.read(100, 200) == origin.data(config, 100, 200)
        handle._blob.local.fd = -1
        await handle.close()
        await until(lambda: not store._blobs)
        monkeypatch.setattr(LocalBlob, "load", fail)
        origin.fault("status", lambda request: True, times=None)
        assert await read(store, config, 0, 700) == origin.data(config, 0, 700)


async def test_without_a_pool_reads_go_on(tmp_path: Path, origin: Origin) -> None:
    want = origin.add(Made(2 * CHUNK, seed=1), "data.txt")
    settings = roomy(request_deadline_s=1.0, connections=4, buffer_mib=32, pool_mib=0, cache_limit_gib=1e-6)
    async with running(tmp_path, [origin.url], settings) as store:
        handle = await store.open(want)
        for offset in (0, CHUNK - 10, CHUNK, 2 * CHUNK - 100):
            assert await handle.read(offset, 100) == origin.data(want, offset, 100)
        assert handle.held(0, 100) is None
        await handle.close()
        assert store.pool.used == 0
        await trio.lowlevel.checkpoint()


async def test_wrong_bytes_never_get_into_the_pool(
    tmp_path: Path, origin: Origin, expected_log_errors: Callable[[str], None]
) -> None:
    expected_log_errors("a chunk is corrupt")
    want = origin.add(Made(700, seed=1), "config.json")
    fault = origin.fault("corrupt", times=None, after=100)
    async with running(tmp_path, [origin.url], NO_ROOM) as store:
        with pytest.raises(IntegrityError):
            await read(store, want, 0, 700)
        assert store.pool.report().bytes["small"] == 0
        fault.times = 0
        assert await read(store, want, 0, 700) == origin.data(want, 0, 700)
        assert store.pool.report().bytes["small"] > 0
