"""Disks that fail under a tier: real filesystems, pulled out, unmounted, filled up, made read-only. Readers go on."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import trio

from helios.metrics import MountMetrics
from heliosfs.blobs import BlobRef, BlobStore
from heliosfs.tiers.health import State
from heliosfs.tiers.policy import Priority
from tests.support.disks import LoopDisk, loop_disk
from tests.support.origin import Made, Origin
from tests.support.stores import filled, idle, read, running, until
from tests.unit.heliosfs.test_two_tiers import MIB, add, bounds, fill, tier

LOST = "a tier of the cache can't be used"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[LoopDisk]:
    with loop_disk(tmp_path, 96) as disk:
        yield disk


@pytest.fixture(autouse=True)
def quick_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("heliosfs.tiers.history.CORRELATED_S", 0.0)


def state(store: BlobStore) -> State:
    assert store.room.l2 is not None
    return store.room.l2.health.state


async def two_in_l2(store: BlobStore, origin: Origin) -> list[BlobRef]:
    """Three blobs, of which two have gone to L2; L1 has room for one."""
    wants = [add(origin, 10 * MIB, seed) for seed in range(3)]
    for want in reversed(wants):
        await fill(store, want)
    assert [tier(store, want) for want in wants] == ["l2", "l2", "l1"]
    return wants


def counts_again(store: BlobStore, wants: list[BlobRef]) -> bool:
    """Whether L2 says that it has blobs; one that was read often may be on its way up already."""
    assert store.room.l2 is not None
    return not store.room.l2.policy.entries.keys().isdisjoint(want.sha256 for want in wants)


async def fill_new(store: BlobStore, origin: Origin) -> BlobRef:
    """Fill a blob that is used more than anything that is here."""
    want = add(origin, 10 * MIB, 9)
    for _ in range(40):
        store.room.history.use(want.sha256)
    await until(lambda: store.room.l1.policy.held <= 1)  # who was just read may go then
    handle = await store.open(want)
    await filled(store, want)
    await handle.close()
    await until(lambda: store._blobs.get(want) is None)
    return want


async def all_are_right(store: BlobStore, origin: Origin, wants: list[BlobRef]) -> None:
    for want in wants:
        for offset in (0, want.size // 2, want.size - 100):
            assert await read(store, want, offset, 100) == origin.data(want, offset, 100)


@pytest.mark.trio
async def test_a_disk_that_is_pulled_out_costs_only_itself(
    tmp_path: Path, disk: LoopDisk, origin: Origin, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = MountMetrics()
    settings = bounds(12, 0)
    async with running(tmp_path / "l1", [origin.url], settings, metrics, l2=disk.path / "l2") as store:
        wants = await two_in_l2(store, origin)
        handle = await store.open(wants[0])
        assert await handle.read(0, 100) == origin.data(wants[0], 0, 100)
        disk.pull_out()
        assert await handle.read(MIB, 100) == origin.data(wants[0], MIB, 100), "from elsewhere"
        await until(lambda: state(store) is State.AWAY)
        await handle.close()
        await all_are_right(store, origin, wants)
        new = await fill_new(store, origin)  # L1 goes on, and what it pushes out just goes
        assert tier(store, new) == "l1"
        await idle(store)
        assert metrics.registry.get_sample_value("helios_mount_cache_up", {"tier": "l2"}) == 0
        assert metrics.registry.get_sample_value("helios_mount_cache_up", {"tier": "l1"}) == 1
        disk.unmount()
        disk.mount()
        await until(lambda: state(store) is State.WORKS)
        assert counts_again(store, wants), "what it has counts again"
        await all_are_right(store, origin, wants)
        await idle(store)
    assert sum(LOST in r.message for r in caplog.records) == 1
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]


@pytest.mark.trio
async def test_a_disk_that_is_unmounted_lazily_is_let_go_and_taken_back(
    tmp_path: Path, disk: LoopDisk, origin: Origin, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(tmp_path / "l1", [origin.url], bounds(12, 0), l2=disk.path / "l2") as store:
        wants = await two_in_l2(store, origin)
        handle = await store.open(wants[0])
        disk.unmount("-l")
        await until(lambda: state(store) is State.AWAY)
        assert await handle.read(MIB, 100) == origin.data(wants[0], MIB, 100), "an open file stays readable"
        await all_are_right(store, origin, wants)
        await fill_new(store, origin)
        assert not list(disk.path.iterdir()), "nothing is put where the disk was"
        disk.mount()
        await until(lambda: state(store) is State.WORKS)
        assert counts_again(store, wants)
        await handle.close()
        await all_are_right(store, origin, wants)
        await idle(store)
        disk.unmount("-l")
        await until(lambda: state(store) is State.AWAY)
    assert sum(LOST in r.message for r in caplog.records) == 2


@pytest.mark.trio
async def test_a_disk_that_becomes_read_only_is_still_read(
    tmp_path: Path, disk: LoopDisk, origin: Origin, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(tmp_path / "l1", [origin.url], bounds(12, 0), l2=disk.path / "l2") as store:
        wants = await two_in_l2(store, origin)
        disk.make_read_only()
        await until(lambda: state(store) is State.READ_ONLY)
        asked = len(origin.requests)
        await all_are_right(store, origin, wants)
        assert len(origin.requests) == asked, "what it has is there"
        assert (await store.room.evict([wants[0].sha256])).removed == 0
        await fill_new(store, origin)
        disk.make_read_only(False)
        await until(lambda: state(store) is State.WORKS)
        await idle(store)
        await until(lambda: (store.room.l2 is not None) and not store.room.l2.policy.leaving)
        assert (await store.room.evict([wants[0].sha256])).removed == 1
    assert sum(LOST in r.message for r in caplog.records) == 1
    async with running(tmp_path / "l1", [origin.url], bounds(12, 0), l2=disk.path / "l2") as store:
        pass
    disk.make_read_only()  # one that is read-only at start
    async with running(tmp_path / "l1", [origin.url], bounds(12, 0), l2=disk.path / "l2") as store:
        assert state(store) is State.READ_ONLY
        asked = len(origin.requests)
        await all_are_right(store, origin, [want for want in wants if tier(store, want) == "l2"])
        assert len(origin.requests) == asked


@pytest.mark.trio
async def test_a_disk_shared_with_others_who_fill_it(tmp_path: Path, disk: LoopDisk, origin: Origin) -> None:
    others = disk.path / "others"
    others.write_bytes(b"x" * (20 * MIB))
    pinned = add(origin, 10 * MIB, 20)
    settings = msgspec.structs.replace(bounds(12, 0), l2_min_free=0.1)
    async with running(tmp_path / "l1", [origin.url], settings, l2=disk.path / "l2") as store:
        store.room.classify({pinned.sha256: Priority.PINNED})
        await fill(store, pinned)
        wants = [add(origin, 10 * MIB, seed) for seed in range(8)]
        for want in wants:
            handle = await store.open(want)
            for offset in range(0, want.size, 2 * MIB):
                assert await handle.read(offset, 1000) == origin.data(want, offset, 1000)
            await handle.close()
        await idle(store)
        assert free(disk) >= 0.1
        with others.open("ab") as file:
            file.write(b"x" * (7 * MIB))
            file.flush()
            os.fsync(file.fileno())
        await until(lambda: free(disk) >= 0.1)
        await all_are_right(store, origin, wants)
        await idle(store)
        with others.open("ab", buffering=0) as file:  # to the last block
            try:
                while True:
                    file.write(b"x" * MIB)
            except OSError:
                pass
        await all_are_right(store, origin, [pinned, *wants])
        assert others.exists()
        await idle(store)


def free(disk: LoopDisk) -> float:
    found = os.statvfs(disk.path)
    return found.f_bavail / found.f_blocks


@pytest.mark.trio
async def test_a_directory_that_is_removed_and_one_that_comes_back(tmp_path: Path, origin: Origin) -> None:
    l2 = tmp_path / "l2"
    async with running(tmp_path / "l1", [origin.url], bounds(12, 0), l2=l2) as store:
        wants = await two_in_l2(store, origin)
        l2.rename(tmp_path / "elsewhere")
        await until(lambda: state(store) is State.AWAY)
        await all_are_right(store, origin, wants)
        assert not l2.exists(), "it is not made again behind anybody's back"
        (tmp_path / "elsewhere").rename(l2)
        await until(lambda: state(store) is State.WORKS)
        assert counts_again(store, wants)
        await idle(store)
        shutil.rmtree(l2)
        await until(lambda: state(store) is State.AWAY)
        await all_are_right(store, origin, wants)


@pytest.mark.trio
async def test_another_directory_in_its_place_is_another_tier(tmp_path: Path, origin: Origin) -> None:
    l2, settings = tmp_path / "l2", bounds(12, 0)
    async with running(tmp_path / "other-l1", [origin.url], settings, l2=tmp_path / "other") as store:
        new = add(origin, 10 * MIB, 9)
        await fill(store, add(origin, 10 * MIB, 8))
        await fill(store, new)
        assert tier(store, new) == "l2"
    async with running(tmp_path / "l1", [origin.url], settings, l2=l2) as store:
        wants = await two_in_l2(store, origin)
        l2.rename(tmp_path / "elsewhere")
        (tmp_path / "other").rename(l2)
        await until(lambda: tier(store, new) == "l2")
        assert tier(store, wants[1]) == "remote"
        await all_are_right(store, origin, [new, *wants])
        await idle(store)


@pytest.mark.trio
async def test_an_l2_that_is_not_there_at_start_is_taken_when_it_comes(tmp_path: Path, origin: Origin) -> None:
    l2 = tmp_path / "disk" / "l2"
    async with running(tmp_path / "l1", [origin.url], bounds(12, 0), l2=tmp_path / "l2") as store:
        wants = await two_in_l2(store, origin)
    (tmp_path / "disk").write_text("no directory")
    async with running(tmp_path / "l1", [origin.url], bounds(12, 0), l2=l2) as store:
        assert state(store) is State.AWAY
        await all_are_right(store, origin, wants)
        (tmp_path / "disk").unlink()
        (tmp_path / "disk").mkdir()
        (tmp_path / "l2").rename(l2)
        await until(lambda: state(store) is State.WORKS)
        assert counts_again(store, wants)


@pytest.mark.trio
async def test_without_l1s_disk_what_is_read_goes_to_l2(tmp_path: Path, disk: LoopDisk, origin: Origin) -> None:
    async with running(disk.path / "l1", [origin.url], bounds(0, 0), l2=tmp_path / "l2") as store:
        one, two = (add(origin, 10 * MIB, seed) for seed in range(2))
        await fill(store, one)
        assert tier(store, one) == "l1"
        disk.pull_out()
        await until(lambda: store.room.l1.health.state is State.AWAY)
        for want in (one, two):
            handle = await store.open(want)
            await filled(store, want)
            assert await handle.read(MIB, 100) == origin.data(want, MIB, 100)
            await handle.close()
            assert tier(store, want) == "l2"
        await idle(store)


@pytest.mark.trio
async def test_a_disk_that_is_pulled_out_while_it_is_written(tmp_path: Path, disk: LoopDisk, origin: Origin) -> None:
    """A fill that goes to L2 and a copy to it are under way: readers get every byte, and nobody hangs."""
    pinned = add(origin, 10 * MIB, 20)
    want = origin.add(Made(60 * MIB, 30), "large.safetensors")
    async with running(tmp_path / "l1", [origin.url], bounds(12, 0), l2=disk.path / "l2") as store:
        store.room.classify({pinned.sha256: Priority.PINNED})
        await fill(store, pinned)
        origin.throttle.rate = 60 * MIB
        handle = await store.open(want)
        await until(lambda: store.status(want.sha256).local_bytes > 4 * MIB)
        disk.pull_out()
        with trio.fail_after(60):
            for offset in range(0, want.size, 5 * MIB):
                assert await handle.read(offset, 1000) == origin.data(want, offset, 1000)
        await handle.close()
        origin.throttle.rate = None
        await until(lambda: state(store) is State.AWAY)
        assert await read(store, pinned, 0, 100) == origin.data(pinned, 0, 100)
        await idle(store)
