"""A blob store with little room: right bytes always, room never exceeded, nothing in use removed, accounts at 0."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import logging
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import trio

from helios.config import MountSettings
from helios.errors import UsageError
from helios.metrics import MountMetrics
from heliosfs.blobs import BlobRef, BlobStore, open_store
from heliosfs.tiers.directory import TierDirectory
from heliosfs.tiers.keeping import KeepingFiles, Pin, Uses
from heliosfs.tiers.local import LocalBlob
from heliosfs.tiers.policy import Priority
from tests.support.origin import Made, Origin
from tests.support.stores import QUICK, filled, idle, on_disk, read, running, until

MIB = 1 << 20
CHUNK = 4 * MIB
Expect = Callable[[str], None]


def little(mib: float, min_free: float = 0.0) -> MountSettings:
    return msgspec.structs.replace(QUICK, cache_limit_gib=mib / 1024, cache_min_free=min_free)


def here(store: BlobStore) -> set[str]:
    return set(store.room.l1.policy.entries)


def add(origin: Origin, size: int, seed: int = 0, kind: str = "safetensors") -> BlobRef:
    """A blob of a model of its own."""
    want = origin.add(Made(size, seed), f"{seed}.{kind}")
    return dataclasses.replace(want, commit=f"{seed:040x}")


async def fill(store: BlobStore, want: BlobRef) -> None:
    """Open, wait until it is whole, close."""
    handle = await store.open(want)
    await filled(store, want)
    await handle.close()
    await idle(store)


@pytest.mark.trio
async def test_the_least_used_goes_when_room_is_needed(tmp_path: Path, origin: Origin) -> None:
    wants = [add(origin, 10 * MIB, seed) for seed in range(4)]
    metrics = MountMetrics()
    async with running(tmp_path, [origin.url], little(33), metrics) as store:
        for want in wants[:3]:
            await fill(store, want)
        assert len(here(store)) == 3
        await fill(store, wants[3])
        assert here(store) == {want.sha256 for want in wants[1:]}
        assert not store.status(wants[0].sha256).local_bytes
        assert await read(store, wants[0], MIB, 100) == origin.data(wants[0], MIB, 100)
        await idle(store)
        assert store.room.l1.policy.used == on_disk(tmp_path) <= 33 * MIB
        assert store.room.l1.policy.reserved == store.room.l1.policy.leaving == 0
    sample = metrics.registry.get_sample_value
    assert (sample("helios_mount_cache_evictions_total", {"tier": "l1", "reason": "room"}) or 0) >= 1
    assert sample("helios_mount_cache_limit_bytes", {"tier": "l1"}) == 33 * MIB


@pytest.mark.trio
async def test_what_is_open_stays_and_what_does_not_fit_beside_it_is_still_read(
    tmp_path: Path, origin: Origin, caplog: pytest.LogCaptureFixture
) -> None:
    one, other = (add(origin, 20 * MIB, seed) for seed in range(2))
    async with running(tmp_path, [origin.url], little(30)) as store:
        held = await store.open(one)
        await filled(store, one)
        handle = await store.open(other)
        for offset in range(0, other.size, MIB):
            assert await handle.read(offset, MIB) == origin.data(other, offset, MIB)
            assert store.room.l1.policy.used <= 30 * MIB
        assert sum("no room for a whole file" in r.message for r in caplog.records) == 1
        assert on_disk(tmp_path) <= 30 * MIB
        assert await held.read(0, one.size) == origin.data(one, 0, one.size)
        await held.close()
        store.room.l1.reconsider()
        await filled(store, other)  # now the first one may go
        await handle.close()
        assert here(store) == {other.sha256}
        assert on_disk(tmp_path) <= 30 * MIB


@pytest.mark.trio
async def test_a_model_that_does_not_fit_is_not_filled_and_pushes_nobody_out(tmp_path: Path, origin: Origin) -> None:
    kept = add(origin, 10 * MIB)
    huge = add(origin, 60 * MIB, 1)
    async with running(tmp_path, [origin.url], little(40)) as store:
        await fill(store, kept)
        handle = await store.open(huge)
        for _ in range(2):
            for offset in range(0, huge.size, CHUNK):
                assert await handle.read(offset, 1000) == origin.data(huge, offset, 1000)
        await handle.close()
        await idle(store)
        assert kept.sha256 in here(store)
        assert on_disk(tmp_path) <= 40 * MIB
        assert store.status(kept.sha256).complete


@pytest.mark.trio
async def test_churn(tmp_path: Path, origin: Origin) -> None:
    """Many readers, more blobs than room: bytes are right, the limit holds at every look, and in the end nothing is
    promised, held or open."""
    wants = [add(origin, MIB * (1 + seed % 7) + seed, seed, "bin") for seed in range(16)]
    limit = 24 * MIB
    files = len(os.listdir("/proc/self/fd"))
    async with running(tmp_path, [origin.url], little(24)) as store:
        worst = 0

        async def visitor(seed: int) -> None:
            rng = random.Random(seed)
            for _ in range(25):
                want = rng.choice(wants)
                handle = await store.open(want)
                for _ in range(rng.randrange(4)):
                    offset, size = rng.randrange(want.size), rng.randrange(300_000)
                    assert await handle.read(offset, size) == origin.data(want, offset, size)
                if rng.random() < 0.3:
                    await trio.sleep(0.02)
                if rng.random() < 0.1:
                    await store.room.evict([rng.choice(wants).sha256])
                await handle.close()

        async def watch(scope: trio.CancelScope) -> None:
            nonlocal worst
            with scope:
                while True:
                    worst = max(worst, await trio.to_thread.run_sync(on_disk, tmp_path))
                    await trio.sleep(0.01)

        watching = trio.CancelScope()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch, watching)
            async with trio.open_nursery() as visitors:
                for seed in range(12):
                    visitors.start_soon(visitor, seed)
            watching.cancel()
        await idle(store)
        policy = store.room.l1.policy
        assert 0 < worst <= limit
        assert policy.used == on_disk(tmp_path)
        assert policy.reserved == policy.leaving == 0
        gone = await store.room.evict(list(policy.entries))
        assert not gone.kept
        assert policy.used == on_disk(tmp_path) == 0
        assert store.usage().tiers["l1"].blobs == store.usage().tiers["l1"].partials == 0
    await until(lambda: len(os.listdir("/proc/self/fd")) <= files)


@pytest.mark.trio
async def test_an_open_file_is_not_evicted_and_a_closed_one_is(tmp_path: Path, origin: Origin) -> None:
    want = origin.add(Made(6 * MIB), "model.safetensors")
    async with running(tmp_path, [origin.url]) as store:
        handle = await store.open(want)
        await filled(store, want)
        fd = os.dup(handle.local_fd() or -1)  # as the kernel has it in passthrough
        answer = await store.room.evict([want.sha256])
        assert answer.kept == {want.sha256: "in use"}
        assert await handle.read(0, 100) == origin.data(want, 0, 100)
        await handle.close()
        await idle(store)
        answer = await store.room.evict([want.sha256])
        assert answer.kept == {want.sha256: "in use"}, "removing it would free nothing yet"
        assert os.pread(fd, 100, MIB) == origin.data(want, MIB, 100)
        os.close(fd)
        answer = await store.room.evict([want.sha256])
        assert (answer.removed, answer.kept) == (1, {})
        assert answer.freed >= want.size
        assert await read(store, want, 0, 100) == origin.data(want, 0, 100)


@pytest.mark.trio
async def test_who_opens_a_blob_that_is_being_removed_gets_it_anew(
    tmp_path: Path, origin: Origin, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = origin.add(Made(6 * MIB), "model.safetensors")
    at_it, go_on = trio.Event(), trio.Event()
    remove = TierDirectory.remove

    def slow(self: TierDirectory, sha256: str) -> int:
        trio.from_thread.run_sync(at_it.set)
        trio.from_thread.run(go_on.wait)
        return remove(self, sha256)

    monkeypatch.setattr(TierDirectory, "remove", slow)
    async with running(tmp_path, [origin.url]) as store:
        await fill(store, want)
        async with trio.open_nursery() as nursery:
            nursery.cancel_scope.deadline = trio.current_time() + 20
            nursery.start_soon(store.room.evict, [want.sha256])
            await at_it.wait()

            async def late() -> None:
                assert await read(store, want, MIB, 100) == origin.data(want, MIB, 100)

            nursery.start_soon(late)
            await trio.sleep(0.1)
            go_on.set()
        await filled(store, want)
        await idle(store)
        assert store.room.l1.policy.used == on_disk(tmp_path)


@pytest.mark.trio
async def test_a_partial_blob_goes_too(tmp_path: Path, origin: Origin) -> None:
    want = origin.add(Made(8 * CHUNK), "tokenizer.json")
    async with running(tmp_path, [origin.url], little(20)) as store:
        await read(store, want, 0, 100)
        await idle(store)
        assert 0 < store.status(want.sha256).local_bytes < want.size
        assert store.room.l1.policy.used == on_disk(tmp_path)
        assert (await store.room.evict([want.sha256])).removed == 1
        assert list((tmp_path / "partial").iterdir()) == []
        assert await read(store, want, 0, 100) == origin.data(want, 0, 100)


@pytest.mark.trio
async def test_classes_decide_who_goes(tmp_path: Path, origin: Origin) -> None:
    wants = [add(origin, 10 * MIB, seed) for seed in range(3)]
    async with running(tmp_path, [origin.url], little(23)) as store:
        store.room.classify({wants[0].sha256: Priority.PINNED})
        for want in wants[:2]:
            await fill(store, want)
        await fill(store, wants[2])
        assert here(store) == {wants[0].sha256, wants[2].sha256}
        assert (await store.room.evict([wants[0].sha256])).kept == {wants[0].sha256: "pinned"}


@pytest.mark.trio
async def test_files_removed_behind_our_back(tmp_path: Path, origin: Origin, monkeypatch: pytest.MonkeyPatch) -> None:
    wants = [add(origin, 6 * MIB, seed) for seed in range(2)]
    async with running(tmp_path, [origin.url], little(64)) as store:
        for want in wants:
            await fill(store, want)
        handle = await store.open(wants[1])
        for path in (tmp_path / "blobs").rglob("*"):
            if path.is_file():
                path.unlink()
        await store.room.l1.scan()
        assert here(store) == {wants[1].sha256}
        assert store.room.l1.policy.used >= wants[1].size, "an open file keeps its room"
        assert await handle.read(0, 100) == origin.data(wants[1], 0, 100)
        await handle.close()
        await idle(store)
        assert store.room.l1.policy.used == 0
        assert await read(store, wants[0], 0, 100) == origin.data(wants[0], 0, 100)
        await filled(store, wants[0])
        await idle(store)
        assert store.room.l1.policy.used == on_disk(tmp_path)


@pytest.mark.trio
async def test_a_linked_file_costs_nothing_until_the_store_forgets_it(tmp_path: Path, origin: Origin) -> None:
    from tests.unit.heliosfs.test_blobs_beside import DATA, SIZE, put

    want = origin.add(DATA, "model.safetensors")
    stored = put(tmp_path / "store", want)
    async with running(tmp_path / "cache", [origin.url], little(1), beside=tmp_path / "store") as store:
        handle = await store.open(want)
        await filled(store, want)
        await handle.close()
        await idle(store)
        assert store.room.l1.policy.used == 0
        assert store.status(want.sha256).complete, "much larger than the limit"
        stored.unlink()
        await store.room.l1.scan()
        assert store.room.l1.policy.used >= SIZE
        await until(lambda: not here(store))


@pytest.mark.trio
async def test_a_restart_knows_what_is_here_and_how_it_was_used(tmp_path: Path, origin: Origin) -> None:
    wants = [add(origin, 10 * MIB, seed) for seed in range(3)]
    async with running(tmp_path, [origin.url], little(50)) as store:
        for want in wants:
            await fill(store, want)
        before = {key: use.hits for key, use in store.room.history.uses.items()}
        used = store.room.l1.policy.used
    async with running(tmp_path, [origin.url], little(50)) as store:
        assert {key: use.hits for key, use in store.room.history.uses.items()} == before
        assert store.room.l1.policy.used == used == on_disk(tmp_path)
        assert store.room.now() < 3600
    async with running(tmp_path, [origin.url], little(15)) as store:
        await until(lambda: len(here(store)) == 1)  # the limit is lower now
        assert here(store) == {wants[2].sha256}


@pytest.mark.trio
async def test_a_clock_that_jumps_changes_nothing(
    tmp_path: Path, origin: Origin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wall clock time is in no decision, and time goes on from where the last run was."""
    wants = [add(origin, 10 * MIB, seed) for seed in range(4)]
    now, last = time.time(), 0.0
    for want, jump in zip(wants, (0.0, 1e9, -1.5e9, 3e8), strict=True):
        monkeypatch.setattr(time, "time", lambda jump=jump: now + jump)
        monkeypatch.setattr(time, "time_ns", lambda jump=jump: int((now + jump) * 1e9))
        async with running(tmp_path, [origin.url], little(33)) as store:
            assert last <= store.room.now() < last + 60
            await fill(store, want)
            last = store.room.now()
    async with running(tmp_path, [origin.url], little(33)) as store:
        assert here(store) == {want.sha256 for want in wants[1:]}, "the one used first went"
        used = [store.room.history.uses[want.sha256].last for want in wants]
        assert used == sorted(used)


@pytest.mark.trio
@pytest.mark.parametrize("damage", [b"", b"helios-uses 1\n{}", b"helios-uses 2\n" + b"x" * 200, b"\0" * 300])
async def test_damaged_statistics_are_only_forgotten(tmp_path: Path, origin: Origin, damage: bytes) -> None:
    want = origin.add(Made(MIB), "model.safetensors")
    async with running(tmp_path, [origin.url]) as store:
        await fill(store, want)
    (tmp_path / "uses").write_bytes(damage)
    async with running(tmp_path, [origin.url]) as store:
        assert not store.room.history.uses
        assert store.status(want.sha256).complete


def test_damaged_pins_are_set_aside(tmp_path: Path, expected_log_errors: Expect) -> None:
    expected_log_errors("what is pinned is not known any more")
    files, pin = KeepingFiles(tmp_path), Pin("models/a/b", "main", "c" * 40, "pinned", ["d" * 64])
    assert files.load_pins() == []
    files.save_pins([pin])
    assert files.load_pins() == [pin]
    damaged = (tmp_path / "pins").read_bytes().replace(b"main", b"niam")
    (tmp_path / "pins").write_bytes(damaged)
    assert files.load_pins() == []
    assert (tmp_path / "pins.damaged").read_bytes() == damaged


def test_pins_of_version_1_are_read(tmp_path: Path) -> None:
    """docs/format.md; these bytes never change."""
    text = (
        b"helios-pins 1\n"
        b'{"pins":[{"blobs":["dd"],"commit":"cc","priority":"critical","repo":"models/a/b","revision":"v1"}]}'
    )
    record = text + b"\n" + hashlib.sha256(text).hexdigest().encode() + b"\n"
    (tmp_path / "pins").write_bytes(record)
    files = KeepingFiles(tmp_path)
    assert files.load_pins() == [Pin("models/a/b", "v1", "cc", "critical", ["dd"])]
    files.save_pins(files.load_pins())
    assert (tmp_path / "pins").read_bytes() == record


def test_a_save_that_is_cut_off_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = KeepingFiles(tmp_path)
    files.save_uses(Uses(5.0, {"a": (1.0, 2, 3.0, 4.0)}))

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        files.save_uses(Uses(9.0))
    assert files.load_uses() == Uses(5.0, {"a": (1.0, 2, 3.0, 4.0)})


# --- disks ---


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 48 MiB."""
    if os.getuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    path = tmp_path / "disk"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(path)], check=True)
    yield path
    subprocess.run(["umount", str(path)], check=True)


@pytest.mark.trio
async def test_a_disk_that_others_fill_gets_room_back(small_disk: Path, origin: Origin) -> None:
    wants = [add(origin, 10 * MIB, seed) for seed in range(4)]
    settings = msgspec.structs.replace(QUICK, cache_min_free=0.1)
    async with running(small_disk / "cache", [origin.url], settings) as store:
        for want in wants:
            await fill(store, want)
        assert len(here(store)) == 4
        (small_disk / "others").write_bytes(b"x" * (6 * MIB))
        await until(lambda: len(here(store)) == 3)
        await until(lambda: os.statvfs(small_disk).f_bavail >= 0.1 * os.statvfs(small_disk).f_blocks)
        for want in wants:
            assert await read(store, want, 0, 100) == origin.data(want, 0, 100)


@pytest.mark.trio
async def test_a_disk_that_became_read_only_is_read_and_not_emptied(
    tmp_path: Path, origin: Origin, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wants = [add(origin, 10 * MIB, seed) for seed in range(3)]

    def fail(*args: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    async with running(tmp_path, [origin.url], little(24)) as store:
        for want in wants[:2]:
            await fill(store, want)
        with monkeypatch.context() as patch:
            patch.setattr("heliosfs.tiers.directory.unlink", fail)
            patch.setattr(LocalBlob, "write", fail)
            answer = await store.room.evict([wants[0].sha256])
            assert answer.removed == 0
            assert "Read-only" in answer.kept[wants[0].sha256]
            handle = await store.open(wants[2])
            for offset in range(0, wants[2].size, CHUNK):
                assert await handle.read(offset, 1000) == origin.data(wants[2], offset, 1000)
            await handle.close()
            for want in wants[:2]:
                assert await read(store, want, 0, 100) == origin.data(want, 0, 100)
            await idle(store)
            assert len(here(store)) == 2
            assert store.room.l1.policy.used == on_disk(tmp_path)
            assert store.room.l1.policy.reserved == store.room.l1.policy.leaving == 0
        await store.room.l1.scan()  # it can be written again
        await fill(store, wants[2])
        assert on_disk(tmp_path) <= 24 * MIB
    assert sum("can't be removed" in r.message for r in caplog.records) == 1
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]


@pytest.mark.parametrize(("limit", "free"), [(-1.0, 0.05), (0.0, 1.0), (0.0, -0.1)])
def test_bounds_that_make_no_sense_are_refused(tmp_path: Path, limit: float, free: float) -> None:
    settings = MountSettings(cache_limit_gib=limit, cache_min_free=free)
    with pytest.raises(UsageError, match="cache_limit_gib"):
        open_store(tmp_path, [], settings, MountMetrics())
