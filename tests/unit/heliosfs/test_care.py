"""Bits that rot in the cache: found, taken away, fetched again, whoever has the blob open meanwhile."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing

from helios.metrics import MountMetrics
from heliosfs.blobs import BlobRef, BlobStore
from heliosfs.care import Care, Checked
from heliosfs.store.directory import DirectoryStore
from heliosfs.store.keys import PUBLIC, blob_key
from heliosfs.tiers import examine, quarantine
from heliosfs.tiers.directory import TierDirectory
from heliosfs.tiers.examine import load_sums
from heliosfs.tiers.local import LocalBlob
from heliosfs.tiers.places import Places
from heliosfs.tiers.quarantine import Quarantine
from tests.support.damage import flip
from tests.support.origin import Made, Origin
from tests.support.stores import QUICK, filled, read, running, until

MIB = 1 << 20
CHUNK = 4 * MIB
SIZE = 2 * CHUNK + 12345
Expect = Callable[[str], None]
pytestmark = pytest.mark.trio


@pytest.fixture
def want(origin: Origin) -> BlobRef:
    return origin.add(Made(SIZE), "model.safetensors")


async def at_once(count: int) -> None:
    await trio.lowlevel.checkpoint()


def care_of(store: BlobStore, lost: list[str] | None = None) -> Care:
    async def wanted(sha256: str) -> None:
        if lost is not None:
            lost.append(sha256)

    return Care(store, MountMetrics(), wanted)


def whole(cache: Path, want: BlobRef) -> Path:
    return cache / "blobs" / want.sha256[:2] / want.sha256


async def filled_and_closed(store: BlobStore, want: BlobRef) -> None:
    await read(store, want, 0, want.size)
    await filled(store, want)
    await until(lambda: not store._blobs and not store.room.l1.policy.holds(want.sha256))


async def scrubbed(store: BlobStore, care: Care, want: BlobRef) -> Checked | None:
    return await care.check_whole(store.tiers[0], want.sha256, at_once, strong=False)


def in_quarantine(cache: Path) -> list[Path]:
    return sorted((cache / "quarantine").iterdir()) if (cache / "quarantine").exists() else []


def on_disk(cache: Path) -> int:
    places = [cache / place for place in ("blobs", "partial", "sums", "quarantine")]
    return sum(p.lstat().st_blocks * 512 for place in places for p in place.rglob("*") if p.is_file())


async def test_sums_are_there_as_soon_as_a_blob_is_whole(tmp_path: Path, origin: Origin, want: BlobRef) -> None:
    async with running(tmp_path, [origin.url]) as store:
        await filled_and_closed(store, want)
        sums = load_sums(str(tmp_path / "sums" / want.sha256[:2] / want.sha256), want.sha256)
        assert sums is not None
        assert sums.recipe.digest == want.recipe_digest
        assert sums.values is not None
        assert await scrubbed(store, care_of(store), want) == Checked(SIZE)
        assert store.room.l1.policy.used == on_disk(tmp_path)
        assert (await store.room.evict([want.sha256])).removed == 1
        assert on_disk(tmp_path) == 0, "they go with the blob"


async def test_chunks_of_an_earlier_life_get_their_sums_at_the_first_look(tmp_path: Path, origin: Origin) -> None:
    want = origin.add(Made(SIZE), "tokenizer.json")
    path = tmp_path / "sums" / want.sha256[:2] / want.sha256
    async with running(tmp_path, [origin.url]) as store:
        store._filler._fits = lambda blob: False  # type: ignore[method-assign]
        await read(store, want, 0, 10)
        await until(lambda: not store._blobs)
    async with running(tmp_path, [origin.url]) as store:
        await filled_and_closed(store, want)
        sums = load_sums(str(path), want.sha256)
        assert sums is not None
        assert sums.values is None
        assert await scrubbed(store, care_of(store), want) == Checked(SIZE)
        sums = load_sums(str(path), want.sha256)
        assert sums is not None
        assert sums.values is not None
        path.unlink()
        assert await scrubbed(store, care_of(store), want) == Checked(SIZE)
        assert load_sums(str(path), want.sha256) is not None, "made from the name alone"
        await until(lambda: store.room.l1.policy.used == on_disk(tmp_path))


@pytest.mark.parametrize("strong", [True, False])
async def test_a_rotten_blob_goes_to_the_quarantine_and_the_next_reader_gets_the_right_bytes(
    tmp_path: Path, origin: Origin, want: BlobRef, strong: bool, expected_log_errors: Expect
) -> None:
    expected_log_errors("a cached blob is damaged")
    lost: list[str] = []
    async with running(tmp_path, [origin.url]) as store:
        await filled_and_closed(store, want)
        flip(whole(tmp_path, want), CHUNK + 7)
        care = care_of(store, lost)
        found = await (care.check(want.sha256, at_once) if strong else scrubbed(store, care, want))
        assert found is not None
        assert "chunk 1 of 3" in found.reason
        (aside,) = in_quarantine(tmp_path)
        assert found.outcome == f"kept as {aside}"
        assert lost == [want.sha256]
        assert care.bad == 1
        assert not store.status(want.sha256).complete
        assert store.room.l1.policy.used == on_disk(tmp_path)
        assert await read(store, want, 0, SIZE) == origin.data(want, 0, SIZE)
        await filled(store, want)
        assert await care.check(want.sha256, at_once) == Checked(SIZE)
        await until(lambda: store.room.l1.policy.used == on_disk(tmp_path))
    async with running(tmp_path, [origin.url]) as store:
        assert store.room.l1.policy.used == on_disk(tmp_path), "also after a restart"
        assert store.usage().tiers["l1"].blobs == 1


async def test_who_has_it_open_reads_the_right_bytes_again(
    tmp_path: Path, origin: Origin, want: BlobRef, expected_log_errors: Expect
) -> None:
    expected_log_errors("a cached blob is damaged")
    files = len(os.listdir("/proc/self/fd"))
    async with running(tmp_path, [origin.url]) as store:
        handle = await store.open(want)
        await filled(store, want)
        await until(lambda: handle.local_fd() is not None)
        fd = handle.local_fd()
        assert fd is not None
        flip(whole(tmp_path, want), 99)
        assert bytes(await handle.read(99, 1)) != origin.data(want, 99, 1), "nothing has looked yet"
        assert (await care_of(store).check(want.sha256, at_once)).reason
        assert handle.local_fd() is None
        assert await handle.read(0, SIZE) == origin.data(want, 0, SIZE)
        assert os.pread(fd, 1, 99) != origin.data(want, 99, 1), "a descriptor stays what it is, and open"
        await filled(store, want)
        again = await store.open(want)
        assert again.local_fd() == handle.local_fd() != fd
        assert store.healer.was_wrong(want.sha256)
        await handle.close()
        await again.close()
        await until(lambda: not store._blobs and not store.room.l1.policy.holds(want.sha256))
        assert store.room.l1.policy.used == on_disk(tmp_path)
    await until(lambda: len(os.listdir("/proc/self/fd")) <= files)


async def test_who_opens_it_while_it_is_taken_away_gets_the_right_bytes(
    tmp_path: Path, origin: Origin, want: BlobRef, monkeypatch: pytest.MonkeyPatch, expected_log_errors: Expect
) -> None:
    """The opener has found the file, but not said so yet, when it goes."""
    expected_log_errors("a cached blob is damaged")
    found, go = threading.Event(), threading.Event()
    load = LocalBlob.load

    def slowly(self: LocalBlob, recipe_digest: str, *others: Places) -> object:
        result = load(self, recipe_digest, *others)
        found.set()
        go.wait(20)
        return result

    async with running(tmp_path, [origin.url]) as store:
        await filled_and_closed(store, want)
        flip(whole(tmp_path, want), 5)
        monkeypatch.setattr(LocalBlob, "load_at_once", lambda self, digest: False)
        monkeypatch.setattr(LocalBlob, "load", slowly)
        handles = []

        async def opener() -> None:
            handles.append(await store.open(want))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(opener)
            await until(found.is_set)
            nursery.start_soon(care_of(store).check, want.sha256, at_once)
            await until(lambda: in_quarantine(tmp_path))
            await trio.testing.wait_all_tasks_blocked(0.05)
            go.set()
        (handle,) = handles
        assert await handle.read(0, SIZE) == origin.data(want, 0, SIZE)
        await handle.close()


async def test_wrong_chunks_of_an_open_partial_blob_are_fetched_again(
    tmp_path: Path, origin: Origin, expected_log_errors: Expect
) -> None:
    expected_log_errors("a partial blob is damaged")
    want = origin.add(Made(SIZE), "tokenizer.json")
    async with running(tmp_path, [origin.url]) as store:
        store._filler._fits = lambda blob: False  # type: ignore[method-assign]
        handle = await store.open(want)
        await handle.read(0, CHUNK + 1)
        await until(lambda: store.tiers[0].files.held(want.sha256)[0] == 2 * CHUNK)  # in the journal
        flip(tmp_path / "partial" / f"{want.sha256}.data", 50)
        found = await care_of(store).check(want.sha256, at_once)
        assert found == Checked(2 * CHUNK, "chunk 0 of 3 does not have its hash", "those chunks are fetched again")
        assert store.status(want.sha256).local_bytes == CHUNK
        held = TierDirectory.held(store.room.l1.directory, want.sha256)
        assert held[0] <= CHUNK, "a kill now does not bring it back"
        assert await handle.read(0, 100) == origin.data(want, 0, 100)
        await handle.close()
        await until(lambda: not store._blobs)
        assert await care_of(store).check(want.sha256, at_once) == Checked(2 * CHUNK)
    async with running(tmp_path, [origin.url]) as store:
        assert await read(store, want, 0, SIZE) == origin.data(want, 0, SIZE)
        await filled(store, want)


async def test_a_wrong_partial_blob_that_nobody_has_open_is_removed(
    tmp_path: Path, origin: Origin, expected_log_errors: Expect
) -> None:
    expected_log_errors("a partial blob is damaged")
    want = origin.add(Made(SIZE), "tokenizer.json")
    async with running(tmp_path, [origin.url]) as store:
        store._filler._fits = lambda blob: False  # type: ignore[method-assign]
        await read(store, want, 0, CHUNK + 1)
        await until(lambda: not store._blobs and not store.room.l1.policy.holds(want.sha256))
        flip(tmp_path / "partial" / f"{want.sha256}.data", 50)
        found = await care_of(store).check(want.sha256, at_once)
        assert found.outcome == "what was here of it was removed"
        assert store.status(want.sha256).local_bytes == 0
        assert store.room.l1.policy.used == on_disk(tmp_path) == 0
        assert await read(store, want, 0, 100) == origin.data(want, 0, 100)


async def test_a_rotten_link_to_the_store_is_dropped_and_the_object_is_named_and_left_alone(
    tmp_path: Path, origin: Origin, expected_log_errors: Expect
) -> None:
    expected_log_errors("a cached blob is damaged")
    expected_log_errors("a chunk is corrupt")
    data = random.Random(7).randbytes(SIZE)
    want = origin.add(data, "model.safetensors")
    key = blob_key(PUBLIC, want.sha256)
    with DirectoryStore(tmp_path / "store") as objects:
        staged = objects.staging() / "blob"
        staged.write_bytes(data)
        objects.put_file(key, staged)
    stored, cache = tmp_path / "store" / key, tmp_path / "cache"
    async with running(cache, [origin.url], beside=tmp_path / "store") as store:
        await filled_and_closed(store, want)
        flip(stored, CHUNK + 99)
        damaged = stored.read_bytes()
        found = await scrubbed(store, care_of(store), want)
        assert found is not None
        assert str(stored) in found.outcome
        assert in_quarantine(cache) == []
        assert stored.read_bytes() == damaged
        assert stored.stat().st_nlink == 1
        assert await read(store, want, 0, SIZE) == data, "the wrong chunk comes from the source"


async def test_the_quarantine_is_bounded(tmp_path: Path) -> None:
    place = Quarantine(tmp_path, max_bytes=100 << 10)
    path = tmp_path / "blob"

    def put(size: int) -> quarantine.Taken | None:
        path.write_bytes(b"x" * size)
        return place.take(str(path), "a" * 64, path.stat().st_ino)

    for _ in range(quarantine.MAX_FILES + 4):
        put(4096)
    assert place.usage() == (quarantine.MAX_FILES, quarantine.MAX_FILES * 4096)
    grown = put(88 << 10)
    assert grown is not None
    assert grown.grown == (88 << 10) - (quarantine.MAX_FILES - 3) * 4096
    assert place.usage() == (4, (88 << 10) + 3 * 4096)
    large = put(200 << 10)
    assert large is not None
    assert large.path is None
    assert not path.exists()
    path.write_bytes(b"x")
    assert place.take(str(path), "b" * 64, path.stat().st_ino + 1) is None
    assert path.exists(), "another file has its name by now"


SMALL = msgspec.structs.replace(QUICK, cache_limit_gib=12 / 1024, cache_min_free=0.0, l2_min_free=0.0)


async def test_a_rotten_blob_in_the_second_tier_is_healed_as_one_in_the_first(
    tmp_path: Path, origin: Origin, expected_log_errors: Expect
) -> None:
    expected_log_errors("a cached blob is damaged")
    first, second = (origin.add(Made(SIZE, seed), f"{seed}.bin") for seed in (1, 2))
    l1, l2 = tmp_path / "l1", tmp_path / "l2"
    async with running(l1, [origin.url], SMALL, l2=l2) as store:
        for want in (first, second):  # L1 has room for one of them
            await filled_and_closed(store, want)
        places = {name: directory for directory in (l1, l2) for name in here(directory)}
        assert sorted(places.values()) == [l1, l2]
        handles = [await store.open(want) for want in (first, second)]
        for want in (first, second):
            flip(whole(places[want.sha256], want), CHUNK)
            found = await care_of(store).check(want.sha256, at_once)
            assert (found.taken, found.in_use) == (True, True)
            kept = [] if places[want.sha256] == l1 else [f"{want.sha256}.1"]  # L1's limit is too small for that
            assert [path.name for path in in_quarantine(places[want.sha256])] == kept
        for want, handle in zip((first, second), handles, strict=True):
            assert await handle.read(0, SIZE) == origin.data(want, 0, SIZE)
            await handle.close()
        await until(lambda: not store._blobs and not store.pending().copying)
        for tier in store.tiers:
            await until(lambda tier=tier: tier.room.policy.used == on_disk(tier.files.root))  # type: ignore[misc]


async def test_what_a_disk_that_is_gone_says_is_held_against_no_blob(
    tmp_path: Path, origin: Origin, want: BlobRef, monkeypatch: pytest.MonkeyPatch, expected_log_errors: Expect
) -> None:
    async with running(tmp_path, [origin.url]) as store:
        await filled_and_closed(store, want)

        def refuse(*args: object) -> int:
            raise OSError(errno.EIO, "Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr(examine.DiskReader, "read", refuse)
            patch.setattr(TierDirectory, "check", refuse)
            found = await care_of(store).check(want.sha256, at_once)
            assert (found.taken, found.outcome) == (False, "it stays: its disk does not answer")
        assert await care_of(store).check(want.sha256, at_once) == Checked(SIZE)
        expected_log_errors("a cached blob is damaged")
        monkeypatch.setattr(examine.DiskReader, "read", refuse)  # one file that can't be read on a disk that works
        assert (await care_of(store).check(want.sha256, at_once)).taken


def here(root: Path) -> set[str]:
    return {path.name for path in (root / "blobs").glob("*/*")}
