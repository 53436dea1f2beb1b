"""Two days in the life of a small cache, in seconds: full disks, faults, restarts, clocks that jump. Every byte is
right, the room is never exceeded, and in the end every account is closed and nothing is left open.

The store's clock is trio's, which is virtual here. ``HELIOS_EVERY_CRASH`` (scripts/soak.py) runs more seeds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import trio
from trio.testing import MockClock

from helios.errors import HeliosError
from heliosfs.blobs import BlobHandle, BlobRef, BlobStore
from heliosfs.tiers.tier import Tier
from tests.support.accounts import busy_threads, descriptors, on_disk, settled
from tests.support.disks import fill_up, small_disk
from tests.support.origin import Made, Origin
from tests.support.stores import QUICK, running

MIB = 1 << 20
DAYS = 2
LIMITS = {"l1": 12 * MIB, "l2": 16 * MIB}
SUMS = 16 << 10
"""The sums of blobs that are just being finished are counted when they are."""

SEEDS = range(20) if os.environ.get("HELIOS_EVERY_CRASH") else range(1)

Caches = dict[str, Path]
"""The directories of a cache, by tier."""


class Days:
    """What happens to one cache, decided by a seed."""

    def __init__(self, disks: Caches, origin: Origin, seed: int, clock: MockClock) -> None:
        """``disks``: of L1, and of L2 where there is one."""
        self.disks, self.origin, self.clock = disks, origin, clock
        self.caches = {name: disk / "cache" for name, disk in disks.items()}
        self.random = random.Random(seed)
        self.wants = [self._add(number) for number in range(24)]
        self.handles: list[tuple[BlobRef, BlobHandle]] = []
        self.others: Path | None = None
        self.reads = self.refused = 0
        self.held: set[str] = set()
        """Tiers that had more than a few small files at some time."""
        self.wall = 0.0

    def _add(self, number: int) -> BlobRef:
        kind = self.random.choice(["safetensors", "json"])
        want = self.origin.add(Made(self.random.randrange(1000, 3 * MIB), number), f"{number}.{kind}")
        return dataclasses.replace(want, commit=f"{number // 3:040x}")

    async def live(self) -> None:
        end = trio.current_time() + DAYS * 86400
        gib = {name: limit / (1 << 30) for name, limit in LIMITS.items()}
        settings = msgspec.structs.replace(
            QUICK, cache_limit_gib=gib["l1"], l2_limit_gib=gib["l2"], request_deadline_s=5.0, pool_mib=4
        )
        l1, l2 = self.caches["l1"], self.caches.get("l2")
        while trio.current_time() < end:
            async with running(l1, [self.origin.url], settings, l2=l2) as store:
                until_s = trio.current_time() + self.random.uniform(3, 16) * 3600
                while trio.current_time() < min(until_s, end):
                    await self.step(store)
                    self.look(store)
                await self.close_all()
                self.give_room()
                self.origin.faults.clear()
                if trio.current_time() >= end:
                    await self.over(store)

    async def step(self, store: BlobStore) -> None:
        chance = self.random.random()
        if chance < 0.5:
            async with trio.open_nursery() as nursery:
                for _ in range(self.random.randrange(1, 4)):
                    nursery.start_soon(self.visit, store, self.random.choice(self.wants))
        elif chance < 0.6:
            store.prefetch(self.random.sample(self.wants, 3))
        elif chance < 0.68:
            await store.room.evict({want.sha256 for want in self.random.sample(self.wants, 3)})
        elif chance < 0.74:
            await self.pin(store)
        elif chance < 0.80:
            await self.close_all(self.random.randrange(len(self.handles) + 1))
        elif chance < 0.86:
            with trio.move_on_after(self.random.random() * 0.02):
                await self.visit(store, self.random.choice(self.wants))
        elif chance < 0.90:
            kind = self.random.choice(["status", "reset", "truncate"])
            self.origin.fault(kind, times=self.random.randrange(1, 4), after=self.random.randrange(2000))
        elif chance < 0.94:
            if self.others is None:
                self.others = fill_up(self.random.choice(list(self.disks.values())), self.random.choice([0, MIB]))
            else:
                self.give_room()
        if self.random.random() < 0.6:
            await trio.sleep(0.01)
            self.clock.jump(self.random.choice([1, 120, 900, 3600, 7200]) * self.random.random())
        if self.random.random() < 0.1:
            self.wall = self.random.uniform(-1e9, 1e9)

    async def visit(self, store: BlobStore, want: BlobRef) -> None:
        """Read here and there; now and then the file stays open."""
        handle = await store.open(want)
        stays = False
        try:
            for _ in range(self.random.randrange(4)):
                offset, size = self.random.randrange(want.size), self.random.randrange(400_000)
                try:
                    found = await handle.read(offset, size)
                except HeliosError:
                    if not self.origin.faults:
                        raise
                    self.refused += 1
                else:
                    assert found == self.origin.data(want, offset, size), f"{want.path} read wrong at {offset}"
                    self.reads += 1
            stays = self.random.random() < 0.2 and len(self.handles) < 6
        finally:
            if stays:
                self.handles.append((want, handle))
            else:
                with trio.CancelScope(shield=True):
                    await handle.close()

    async def pin(self, store: BlobStore) -> None:
        want = self.random.choice(self.wants)
        with contextlib.suppress(HeliosError):  # a full disk does not take it
            if self.random.random() < 0.4:
                await store.room.pins.pin("models/a/b", want.path, want.commit, [want.sha256], "pinned")
            else:
                for pin in store.room.pins.all():
                    await store.room.pins.unpin(pin.repo, pin.revision)

    async def close_all(self, count: int | None = None) -> None:
        closing = self.handles[:count]
        del self.handles[:count]
        for want, handle in closing:
            offset = self.random.randrange(want.size)
            with contextlib.suppress(HeliosError):
                assert await handle.read(offset, 1000) == self.origin.data(want, offset, 1000)
            await handle.close()

    def give_room(self) -> None:
        if self.others is not None:
            self.others.unlink()
            self.others = None

    def look(self, store: BlobStore) -> None:
        """What holds at any moment."""
        for tier in store.room.all():
            policy, cache = tier.policy, self.caches[tier.name]
            if policy.used > MIB:
                self.held.add(tier.name)
            if (there := on_disk(cache)) > policy.used + policy.reserved:
                there = on_disk(cache)  # what was renamed during the first look may have been seen twice
            assert there <= LIMITS[tier.name], tier.name
            assert there <= policy.used + policy.reserved + SUMS, f"{tier.name}: {self.differences(store, tier)}"
            assert policy.used >= 0 <= policy.reserved, tier.name
            assert policy.used == sum(entry.cost for entry in policy.entries.values()), tier.name
        assert store.pool.used <= store.pool.report().limit

    def differences(self, store: BlobStore, tier: Tier) -> str:
        """What the disk and the accounts say of each blob that they differ in."""
        found, known = tier.directory.scan(), tier.policy.entries
        return "; ".join(
            f"{key[:8]}: {found.get(key)} on the disk, {known.get(key)} known, open: {store._blobs.proved(key)}"
            for key in found.keys() | known.keys()
            if (key in found and found[key].cost) != (key in known and known[key].cost)
        )

    async def over(self, store: BlobStore) -> None:
        """Everybody went home."""
        await settled(store, 300)
        for tier in store.room.all():
            assert tier.policy.used == on_disk(self.caches[tier.name]), tier.name
        for pin in store.room.pins.all():
            await store.room.pins.unpin(pin.repo, pin.revision)
        answer = await store.room.evict({want.sha256 for want in self.wants})
        assert not answer.kept
        await settled(store)
        for tier in store.room.all():
            assert tier.policy.used == on_disk(self.caches[tier.name]) == 0, tier.name
            assert not store.usage().tiers[tier.name].blobs


@pytest.fixture(params=[1, 2], ids=["one tier", "two tiers"])
def disks(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Caches]:
    with contextlib.ExitStack() as stack:
        names = list(LIMITS)[: request.param]
        yield {name: stack.enter_context(small_disk(tmp_path / name, 24)) for name in names}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", SEEDS)
def test_two_days(disks: Caches, origin: Origin, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    files, threads, clock = descriptors(), busy_threads(), MockClock(rate=1.0)
    days = Days(disks, origin, seed, clock)
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + days.wall)
    trio.run(days.live, clock=clock)
    assert days.reads > 100
    assert days.held == disks.keys()
    for _ in range(100):
        if descriptors() <= files and busy_threads() <= threads:
            break
        time.sleep(0.05)
    assert descriptors() <= files
    assert busy_threads() <= threads
