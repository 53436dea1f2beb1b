"""What a blob store holds, promises and has under way: all of it must be nothing once nobody uses it."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

from heliosfs.blobs import BlobStore
from tests.support.stores import until


def open_accounts(store: BlobStore) -> dict[str, int]:
    """Everything that is not zero and should be, by name."""
    engine, policies = store._engine, [tier.policy for tier in store.room.all()]
    lanes = engine._lanes._lanes
    counts = {
        "blobs": len(store._blobs),
        "fills": store.usage().filling,
        "queued": store.usage().queued,
        "opening": store._filler.opening,
        "planner's chunks in flight": engine.planner.in_flight,
        "engine's blobs": len(engine._blobs),
        "buffers": engine._buffers.count - engine._buffers.free,
        "jobs": sum(lane.running for lane in lanes),
        "threads at sources": sum(int(lane.limiter.borrowed_tokens) for lane in lanes),
        "threads at the disk": sum(int(t.files.threads.borrowed_tokens) + t.files.reads.busy for t in store.tiers)
        + int(store.room._askers.borrowed_tokens),
        "holds": sum(policy.held for policy in policies),
        "reserved": sum(policy.reserved for policy in policies),
        "leaving": sum(policy.leaving for policy in policies),
        "tickets": sum(len(policy._tickets) for policy in policies),
        "loans": len(store.room._loans),
        "removals": sum(len(tier._remover._queue) for tier in store.room.all()),
    }
    return {name: count for name, count in counts.items() if count}


async def settled(store: BlobStore, timeout_s: float = 30.0) -> None:
    """Wait until every account is closed; says which one is not."""
    left: dict[str, int] = {}

    def closed() -> bool:
        nonlocal left
        left = open_accounts(store)
        return not left

    try:
        await until(closed, timeout_s)
    except Exception as error:
        error.add_note(f"still open: {left}")
        raise


def on_disk(cache: Path) -> int:
    """Bytes that removing the blobs would free, as the filesystem says; a link to the store's object frees nothing."""
    sizes: dict[Path, int] = {}
    linked = set()
    for place in ("blobs", "partial", "sums"):
        for path in (cache / place).rglob("*"):
            try:
                status = path.lstat()
            except FileNotFoundError:
                continue
            if stat.S_ISREG(status.st_mode):
                sizes[path] = status.st_blocks * 512
                if status.st_nlink > 1:
                    linked.add(path.name)
    return sum(size for path, size in sizes.items() if path.name not in linked)


def descriptors() -> int:
    """Open files of this process."""
    return len(os.listdir("/proc/self/fd"))


def busy_threads() -> set[str]:
    """Threads that do something; trio keeps idle ones for a while."""
    return {thread.name for thread in threading.enumerate() if not thread.name.startswith("Trio thread")}
