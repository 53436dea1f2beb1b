"""Blob stores for tests: one that runs while a block does, and what tests wait for."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from helios.config import MountSettings
from helios.metrics import MountMetrics
from heliosfs.blobs import BlobRef, BlobStore, open_store
from heliosfs.tiers.doubt import settle
from heliosfs.tiers.local import Loaded, LocalBlob
from heliosfs.tiers.places import Places


def roomy(**changes: Any) -> MountSettings:
    """Settings of a cache that leaves nothing of its disk free: that of whoever runs the tests may be nearly full."""
    return MountSettings(**{"cache_min_free": 0.0, "l2_min_free": 0.0, **changes})


QUICK = roomy(request_deadline_s=2.0, connections=4, buffer_mib=32, pool_mib=32)
"""Settings for tests: a failure shows soon."""


@asynccontextmanager
async def running(
    cache: Path,
    urls: Sequence[str],
    settings: MountSettings = QUICK,
    metrics: MountMetrics | None = None,
    beside: Path | None = None,
    l2: Path | None = None,
) -> AsyncIterator[BlobStore]:
    """A store that works while the block runs; then everything of it must end within seconds."""
    store = open_store(cache, urls, settings, metrics or MountMetrics(), beside=beside, l2=l2)
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(store.run)
            try:
                yield store
            finally:
                nursery.cancel_scope.cancel()
                nursery.cancel_scope.deadline = trio.current_time() + 8
    finally:
        store.close()


def look(blob: LocalBlob, recipe_digest: str, *others: Places) -> Loaded:
    """What the disk has of a blob, found out as a mount does: a whole file whose sums did not last is hashed."""
    found = blob.load(recipe_digest, *others)
    if found.doubted is not None and settle(found.doubted, blob.sha256):
        found = blob.load(recipe_digest, *others)
    return found


async def until(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    """Wait until something is true."""
    with trio.fail_after(timeout_s):
        while not condition():
            await trio.sleep(0.01)


async def filled(store: BlobStore, want: BlobRef, timeout_s: float = 30.0) -> None:
    """Wait until a blob is whole."""
    await until(lambda: store.status(want.sha256).complete, timeout_s)


async def read(store: BlobStore, want: BlobRef, offset: int, size: int) -> bytes:
    """Open, read, close."""
    handle = await store.open(want)
    try:
        return bytes(await handle.read(offset, size))
    finally:
        await handle.close()


async def idle(store: BlobStore) -> None:
    """Wait until nothing is open, filled or measured."""
    await until(
        lambda: (
            not store._blobs and not store.usage().filling and not any(tier.policy.held for tier in store.room.all())
        )
    )


def on_disk(cache: Path) -> int:
    """Bytes that blobs take, as the filesystem says."""
    total = 0
    for place in ("blobs", "partial", "sums"):
        for path in (cache / place).rglob("*"):
            try:
                total += path.lstat().st_blocks * 512 if path.is_file() else 0
            except FileNotFoundError:
                continue
    return total
