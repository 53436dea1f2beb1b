"""A blob store over two disks: what moves between them, what is open stays, every byte of either is accounted for."""

from __future__ import annotations

import dataclasses
import errno
import os
import random
import subprocess
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from helios.config import MountSettings
from helios.errors import Conflict, UsageError
from helios.metrics import MountMetrics
from heliosfs.blobs import BlobRef, BlobStore, open_store
from heliosfs.tiers.policy import Priority, Verdict
from tests.support.origin import Made, Origin
from tests.support.stores import QUICK, filled, idle, on_disk, read, running, until

MIB = 1 << 20
Expect = Callable[[str], None]


def bounds(l1: float, l2: float) -> MountSettings:
    """Limits of the tiers in MiB."""
    return msgspec.structs.replace(
        QUICK, cache_limit_gib=l1 / 1024, cache_min_free=0.0, l2_limit_gib=l2 / 1024, l2_min_free=0.0
    )


class Disks:
    """Two directories for the tiers, and what lies in them."""

    def __init__(self, tmp_path: Path) -> None:
        self.l1, self.l2 = tmp_path / "l1", tmp_path / "l2"

    def running(
        self, origin: Origin, settings: MountSettings, metrics: MountMetrics | None = None
    ) -> AbstractAsyncContextManager[BlobStore]:
        return running(self.l1, [origin.url], settings, metrics, l2=self.l2)


@pytest.fixture
def disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Disks:
    """Opens a moment apart count as two uses here: tests don't wait for a minute."""
    monkeypatch.setattr("heliosfs.tiers.history.CORRELATED_S", 0.0)
    return Disks(tmp_path)


def add(origin: Origin, size: int, seed: int = 0, kind: str = "safetensors") -> BlobRef:
    """A blob of a model of its own."""
    want = origin.add(Made(size, seed), f"{seed}.{kind}")
    return dataclasses.replace(want, commit=f"{seed:040x}")


def tier(store: BlobStore, want: BlobRef) -> str:
    return store.status(want.sha256).tier


async def fill(store: BlobStore, want: BlobRef) -> None:
    """Open, wait until it is whole, close."""
    handle = await store.open(want)
    await filled(store, want)
    await handle.close()
    await idle(store)


async def exact(store: BlobStore, disks: Disks) -> None:
    """Each tier's account says what its disk says, and nothing is promised."""
    await until(lambda: not moving(store))
    for tier, root in zip(store.room.all(), (disks.l1, disks.l2), strict=True):
        assert tier.policy.used == on_disk(root), tier.name
        assert tier.policy.reserved == tier.policy.leaving == 0, tier.name


def moving(store: BlobStore) -> bool:
    policies = [tier.policy for tier in store.room.all()]
    return any(p.reserved or p.leaving or any("." in key for key in p.entries) for p in policies)


@pytest.mark.trio
async def test_what_leaves_l1_goes_to_l2_and_what_is_used_again_comes_back(disks: Disks, origin: Origin) -> None:
    wants = [add(origin, 10 * MIB, seed) for seed in range(3)]
    metrics = MountMetrics()
    sample = metrics.registry.get_sample_value
    async with disks.running(origin, bounds(23, 100), metrics) as store:
        for want in (*wants[1:], wants[0]):  # L1 has room for two, and nobody waits until it has for a third
            await fill(store, want)
        assert [tier(store, want) for want in wants] == ["l2", "l1", "l1"]
        await exact(store, disks)
        assert store.room.l2 is not None
        asked = len(origin.requests)
        for _ in range(4):
            assert await read(store, wants[0], MIB, 100) == origin.data(wants[0], MIB, 100)
        await until(lambda: tier(store, wants[0]) == "l1")
        await until(lambda: len(store.room.l2.policy.entries) == 1)  # the one that gave way
        assert sorted(tier(store, want) for want in wants[1:]) == ["l1", "l2"]
        for want in wants:
            assert await read(store, want, 0, want.size) == origin.data(want, 0, want.size)
        assert len(origin.requests) == asked, "nothing was fetched again"
        await idle(store)
        await exact(store, disks)
    assert (sample("helios_mount_cache_moves_total", {"move": "promotion"}) or 0) >= 1
    assert (sample("helios_mount_cache_moves_total", {"move": "demotion"}) or 0) >= 1
    assert sample("helios_mount_cache_used_bytes", {"tier": "l2"}) == on_disk(disks.l2)
    assert (sample("helios_mount_read_bytes_total", {"tier": "l2"}) or 0) > 0


@pytest.mark.trio
async def test_an_open_blob_keeps_its_file_while_it_is_copied(disks: Disks, origin: Origin) -> None:
    one, two = (add(origin, 10 * MIB, seed) for seed in range(2))
    async with disks.running(origin, bounds(12, 100)) as store:
        await fill(store, two)
        await fill(store, one)
        assert tier(store, one) == "l2"
        handle = await store.open(one)
        fd = handle.local_fd()
        assert fd is not None
        inode = os.fstat(fd).st_ino
        for _ in range(3):
            await read(store, one, 0, 1)
        whole = disks.l1 / "blobs" / one.sha256[:2] / one.sha256
        await until(whole.exists)
        await until((disks.l1 / "sums" / one.sha256[:2] / one.sha256).exists)  # what the scrubber needs comes along
        assert os.fstat(handle.local_fd() or -1).st_ino == inode
        assert tier(store, one) == "l2", "as long as it is open"
        assert await handle.read(MIB, 100) == origin.data(one, MIB, 100)
        assert (await store.room.evict([one.sha256])).kept == {one.sha256: "in use"}
        await handle.close()
        await until(lambda: on_disk(disks.l2) < 12 * MIB)
        handle = await store.open(one)
        assert os.fstat(handle.local_fd() or -1).st_ino == whole.stat().st_ino
        await handle.close()
        await idle(store)
        await exact(store, disks)


@pytest.mark.trio
async def test_a_blob_that_l1_refuses_is_filled_in_l2(disks: Disks, origin: Origin) -> None:
    pinned, want, huge = (add(origin, size * MIB, seed) for seed, size in enumerate((10, 20, 200)))
    async with disks.running(origin, bounds(15, 40)) as store:
        store.room.classify({pinned.sha256: Priority.PINNED})
        await fill(store, pinned)
        await fill(store, want)
        assert (tier(store, pinned), tier(store, want)) == ("l1", "l2")
        handle = await store.open(huge)  # fits nowhere
        assert await handle.read(100 * MIB, 100) == origin.data(huge, 100 * MIB, 100)
        await handle.close()
        assert (tier(store, pinned), tier(store, want)) == ("l1", "l2")
        assert (await store.room.evict([want.sha256])).removed == 1
        await idle(store)
        await exact(store, disks)


@pytest.mark.trio
async def test_a_partial_blob_in_l2_goes_on_there_after_a_restart(disks: Disks, origin: Origin) -> None:
    pinned, want = (add(origin, size * MIB, seed, "bin") for seed, size in enumerate((10, 40)))
    slow = msgspec.structs.replace(bounds(15, 60), connections=1)
    async with disks.running(origin, bounds(15, 60)) as store:
        store.room.classify({pinned.sha256: Priority.PINNED})
        await fill_by_reading(store, pinned)
        origin.throttle.rate = 20 * MIB
        handle = await store.open(want)
        await handle.read(0, 100)
        await until(lambda: store.status(want.sha256).local_bytes > 8 * MIB)
        assert tier(store, want) == "partial"
        await handle.close()
    origin.throttle.rate = None
    partial = disks.l2 / "partial" / f"{want.sha256}.data"
    assert partial.exists()
    async with disks.running(origin, slow) as store:
        await fill_by_reading(store, want)
        assert tier(store, want) == "l2"
        assert await read(store, want, 0, want.size) == origin.data(want, 0, want.size)
        await idle(store)
        await exact(store, disks)


async def fill_by_reading(store: BlobStore, want: BlobRef) -> None:
    handle = await store.open(want)
    await handle.read(0, 100)
    await filled(store, want)
    await handle.close()
    await idle(store)


@pytest.mark.trio
async def test_classes_hold_in_both_tiers(disks: Disks, origin: Origin) -> None:
    wants = [add(origin, 10 * MIB, seed) for seed in range(4)]
    async with disks.running(origin, bounds(12, 23)) as store:
        for want in (wants[2], wants[1], wants[0]):
            await fill(store, want)
        assert [tier(store, want) for want in wants[:3]] == ["l2", "l2", "l1"]
        store.room.classify({wants[0].sha256: Priority.PINNED, wants[2].sha256: Priority.SCRATCH})
        assert (await store.room.evict([wants[0].sha256])).kept == {wants[0].sha256: "pinned"}
        await until(lambda: tier(store, wants[0]) == "l1")  # what is pinned belongs there
        assert tier(store, wants[2]) == "remote", "what is of no account is not copied down"
        await fill(store, wants[3])
        assert tier(store, wants[0]) == "l1"
        assert tier(store, wants[3]) == "l2", "L1 is pinned full"
        await idle(store)
        await exact(store, disks)


@pytest.mark.trio
async def test_what_another_process_has_open_is_neither_removed_nor_copied_down(disks: Disks, origin: Origin) -> None:
    one, two = (add(origin, 10 * MIB, seed) for seed in range(2))
    async with disks.running(origin, bounds(12, 100)) as store:
        await fill(store, one)
        with (disks.l1 / "blobs" / one.sha256[:2] / one.sha256).open() as file:
            other = subprocess.Popen(["sleep", "600"], stdin=file)
        try:
            await fill(store, two)
            for _ in range(3):
                await read(store, two, 0, 1)  # it deserves L1 now
            await trio.sleep(2.2)  # two looks of whoever moves blobs
            assert (tier(store, one), tier(store, two)) == ("l1", "l2")
            assert one.sha256 not in store.room.all()[1].policy.entries
            assert (await store.room.evict([one.sha256])).kept == {one.sha256: "in use"}
            assert on_disk(disks.l1) <= 12 * MIB
        finally:
            other.kill()
            other.wait()
        await until(lambda: not store.room.l1.policy.entries[one.sha256].stuck)
        assert (await store.room.evict([one.sha256])).removed == 1
        await idle(store)
        await exact(store, disks)


@pytest.mark.trio
async def test_a_file_that_is_opened_while_it_is_removed_counts_until_it_is_closed(
    disks: Disks, origin: Origin, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = add(origin, 10 * MIB)
    path = disks.l1 / "blobs" / want.sha256[:2] / want.sha256
    late: list[int] = []

    def first_look_sees_nobody(fd: int) -> bool:
        monkeypatch.undo()
        late.append(os.open(path, os.O_RDONLY))
        return False

    async with disks.running(origin, bounds(100, 100)) as store:
        await fill(store, want)
        monkeypatch.setattr("heliosfs.tiers.directory.open_elsewhere", first_look_sees_nobody)
        assert (await store.room.evict([want.sha256])).removed == 1
        assert not path.exists()
        assert store.room.l1.policy.used >= want.size, "its room is not free yet"
        assert os.pread(late[0], 100, MIB) == origin.data(want, MIB, 100)
        await trio.sleep(1.2)  # a look changes nothing
        assert store.room.l1.policy.used >= want.size
        os.close(late[0])
        await until(lambda: store.room.l1.policy.used == 0)
        await idle(store)
        await exact(store, disks)


@pytest.mark.trio
async def test_a_link_to_the_store_is_never_copied(tmp_path: Path, disks: Disks, origin: Origin) -> None:
    from tests.unit.heliosfs.test_blobs_beside import DATA, put

    want = origin.add(DATA, "model.safetensors")
    put(tmp_path / "store", want)
    settings = bounds(1, 100)
    async with running(disks.l1, [origin.url], settings, beside=tmp_path / "store", l2=disks.l2) as store:
        for _ in range(4):
            await fill(store, want)
        assert tier(store, want) == "l1"
        await trio.sleep(2.2)  # two looks of whoever moves blobs
        assert on_disk(disks.l2) == 0
        assert store.room.l1.policy.used == 0


@pytest.mark.trio
async def test_a_damaged_file_is_not_copied_up(disks: Disks, origin: Origin, expected_log_errors: Expect) -> None:
    expected_log_errors("a cached file is damaged")
    one, two = (add(origin, 10 * MIB, seed) for seed in range(2))
    async with disks.running(origin, bounds(12, 100)) as store:
        await fill(store, two)
        await fill(store, one)
        below = disks.l2 / "blobs" / one.sha256[:2] / one.sha256
        below.chmod(0o644)
        with below.open("r+b") as file:
            file.seek(5 * MIB)
            file.write(b"rotten")
        below.chmod(0o444)
        for _ in range(3):
            await read(store, one, 0, 1)
        await until(lambda: not below.exists())
        assert not (disks.l1 / "blobs" / one.sha256[:2] / one.sha256).exists()
        assert await read(store, one, 5 * MIB, 100) == origin.data(one, 5 * MIB, 100), "fetched again"
        await idle(store)
        await exact(store, disks)


@pytest.mark.trio
async def test_a_restart_finds_both_tiers_and_removes_what_is_in_both(disks: Disks, origin: Origin) -> None:
    one, two = (add(origin, 10 * MIB, seed) for seed in range(2))
    async with disks.running(origin, bounds(12, 100)) as store:
        await fill(store, two)
        await fill(store, one)
    below = disks.l2 / "blobs" / one.sha256[:2] / one.sha256
    for path in (disks.l1 / "blobs" / one.sha256[:2] / one.sha256, disks.l2 / "partial" / f"{two.sha256}.moving"):
        path.parent.mkdir(exist_ok=True)  # killed after the copy was named, and in the middle of one
        path.write_bytes(below.read_bytes())
        path.chmod(0o444)
    async with disks.running(origin, bounds(30, 100)) as store:
        assert not list((disks.l2 / "partial").iterdir())
        assert (tier(store, one), tier(store, two)) == ("l1", "l1")
        await until(lambda: not below.exists())
        assert await read(store, one, 0, one.size) == origin.data(one, 0, one.size)
        await idle(store)
        await exact(store, disks)


@pytest.mark.trio
async def test_files_go_nowhere_else_while_something_is_lent_for_them(disks: Disks, origin: Origin) -> None:
    async with disks.running(origin, bounds(15, 60)) as store:
        room, size = store.room, 20 * MIB
        local = room.blob("ab" * 32, size)
        loan = room.lend(local, 4 * MIB)
        assert loan is not None
        assert room.ask(local, size, "g", size).verdict is Verdict.TOO_LARGE
        assert local.places.name == "l1", "a thread may be about to write there"
        room.give_back(loan)
        assert room.ask(local, size, "g", size).verdict is Verdict.GRANTED
        assert local.places.name == "l2"
        room.end(local.sha256)
        room.closed(local)
        await exact(store, disks)


@pytest.mark.trio
async def test_a_file_that_cannot_be_read_is_fetched_again_and_removed(
    disks: Disks, origin: Origin, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The disk works, but for the blocks of one file."""
    one, two = (add(origin, 10 * MIB, seed) for seed in range(2))
    async with disks.running(origin, bounds(12, 100)) as store:
        await fill(store, two)
        await fill(store, one)
        path = disks.l2 / "blobs" / one.sha256[:2] / one.sha256
        bad, preadv = path.stat().st_ino, os.preadv

        def fails(fd: int, *args: Any) -> int:
            if os.fstat(fd).st_ino == bad:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return preadv(fd, *args)

        monkeypatch.setattr(os, "preadv", fails)
        handle = await store.open(one)
        fd = handle.local_fd()
        for offset in (0, 5 * MIB, 9 * MIB):
            assert await handle.read(offset, 100) == origin.data(one, offset, 100)
        assert os.fstat(fd or -1).st_ino == bad, "whoever has the descriptor keeps it as long as the handle"
        await handle.close()
        await idle(store)
        await until(lambda: not path.exists() or path.stat().st_ino != bad)
        assert await read(store, one, 0, one.size) == origin.data(one, 0, one.size)
        await idle(store)
        await exact(store, disks)
    assert sum("a cached file can't be read" in r.message for r in caplog.records) == 1


@pytest.mark.trio
async def test_churn_over_two_disks(disks: Disks, origin: Origin) -> None:
    """Many readers, evictions, moves both ways: right bytes, both limits hold at every look, accounts end at zero."""
    wants = [add(origin, MIB * (1 + seed % 7) + seed, seed, "bin") for seed in range(20)]
    limits = {disks.l1: 16 * MIB, disks.l2: 24 * MIB}
    files = len(os.listdir("/proc/self/fd"))
    metrics = MountMetrics()
    sample = metrics.registry.get_sample_value
    async with disks.running(origin, bounds(16, 24), metrics) as store:
        worst = dict.fromkeys(limits, 0)

        def move_some(store: BlobStore) -> bool:
            """What is in L2 is used more than anything in L1; whether blobs have moved both ways."""
            for want in wants:
                if tier(store, want) == "l2":
                    store.room.history.use(want.sha256)
            return all(sample("helios_mount_cache_moves_total", {"move": way}) for way in ("demotion", "promotion"))

        async def visitor(seed: int) -> None:
            rng = random.Random(seed)
            for _ in range(16):
                want = rng.choice(wants)
                handle = await store.open(want)
                for _ in range(rng.randrange(1, 4)):
                    offset, size = rng.randrange(want.size), rng.randrange(300_000)
                    assert await handle.read(offset, size) == origin.data(want, offset, size)
                await trio.sleep(0.1 * rng.random())
                if rng.random() < 0.1:
                    await store.room.evict([rng.choice(wants).sha256])
                await handle.close()

        async def watch(scope: trio.CancelScope) -> None:
            with scope:
                while True:
                    for root in limits:
                        worst[root] = max(worst[root], await trio.to_thread.run_sync(on_disk, root))
                    await trio.sleep(0.01)

        watching = trio.CancelScope()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch, watching)
            async with trio.open_nursery() as visitors:
                for seed in range(10):
                    visitors.start_soon(visitor, seed)
            await idle(store)
            await until(lambda: move_some(store))
            await idle(store)
            watching.cancel()
        for root, limit in limits.items():
            assert 0 < worst[root] <= limit, root
        await idle(store)
        await exact(store, disks)
        keys = {key for tier in store.room.all() for key in tier.policy.entries}
        assert not (await store.room.evict(keys)).kept
        await exact(store, disks)
        assert on_disk(disks.l1) == on_disk(disks.l2) == 0
    await until(lambda: len(os.listdir("/proc/self/fd")) <= files)


def test_two_tiers_are_two_directories(tmp_path: Path) -> None:
    for second in (tmp_path / "l1", tmp_path, tmp_path / "l1" / "below"):
        with pytest.raises(UsageError, match="lie in each other"):
            open_store(tmp_path / "l1", [], QUICK, MountMetrics(), l2=second)
    settings = msgspec.structs.replace(QUICK, l2_limit_gib=-1.0)
    with pytest.raises(UsageError, match="l2_limit_gib"):
        open_store(tmp_path / "l1", [], settings, MountMetrics(), l2=tmp_path / "l2")


def test_an_l2_of_another_process_is_refused(tmp_path: Path) -> None:
    store = open_store(tmp_path / "one", [], QUICK, MountMetrics(), l2=tmp_path / "l2")
    try:
        with pytest.raises(Conflict, match=r"l2 is in use by process .*"):
            open_store(tmp_path / "two", [], QUICK, MountMetrics(), l2=tmp_path / "l2")
        with pytest.raises(Conflict, match="one is in use"):
            open_store(tmp_path / "one", [], QUICK, MountMetrics(), l2=tmp_path / "l3")
    finally:
        store.close()


@pytest.mark.trio
async def test_while_draining_nothing_is_brought_up(disks: Disks, origin: Origin) -> None:
    wants = [add(origin, 10 * MIB, seed) for seed in range(3)]
    async with disks.running(origin, bounds(23, 100)) as store:
        for want in (*wants[1:], wants[0]):
            await fill(store, want)
        assert tier(store, wants[0]) == "l2"
        store.halt()
        for _ in range(4):
            assert await read(store, wants[0], MIB, 100) == origin.data(wants[0], MIB, 100)
        await trio.sleep(2.5)
        assert tier(store, wants[0]) == "l2"
        await until(lambda: store.pending().nothing)
        store.resume()
        await until(lambda: tier(store, wants[0]) == "l1")
