"""Threads look at the disk while the loop goes on: what they saw is old when they tell it. The accounts stay exact."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest
import trio
import trio.testing

from heliosfs.blobs import BlobStore
from heliosfs.tiers.directory import TierDirectory
from heliosfs.tiers.local import LocalBlob
from tests.support.accounts import settled
from tests.support.origin import Made, Origin
from tests.support.stores import filled, on_disk, read, running, until

MIB = 1 << 20
CHUNK = 4 * MIB
pytestmark = pytest.mark.trio


class Held:
    """A method whose first call waits in its thread, before its work or after it, until ``go_on`` is set."""

    def __init__(self, patch: pytest.MonkeyPatch, kind: type, name: str, *, after: bool) -> None:
        self.at_it, self.go_on = trio.Event(), trio.Event()
        self._method, self._after, self._calls = getattr(kind, name), after, 0
        patch.setattr(kind, name, lambda *args: self._call(*args))

    def _call(self, *args: object) -> object:
        self._calls += 1
        if self._calls > 1:
            return self._method(*args)
        if not self._after:
            self._wait()
        result = self._method(*args)
        if self._after:
            self._wait()
        return result

    def _wait(self) -> None:
        trio.from_thread.run_sync(self.at_it.set)
        trio.from_thread.run(self.go_on.wait)


def fill_nothing(store: BlobStore) -> None:
    store._filler._fits = lambda blob: False  # type: ignore[method-assign]


async def test_a_scan_that_begins_while_a_blob_is_removed_brings_nothing_back(
    tmp_path: Path, origin: Origin, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = origin.add(Made(MIB), "model.safetensors")
    removal = Held(monkeypatch, TierDirectory, "remove", after=False)
    async with running(tmp_path, [origin.url]) as store:
        scan = Held(monkeypatch, TierDirectory, "scan", after=True)
        await read(store, want, 0, 10)
        await filled(store, want)
        await settled(store)
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(store.room.evict, [want.sha256])
                await removal.at_it.wait()
                nursery.start_soon(store.room.l1.scan)
                await scan.at_it.wait()  # it has seen the file
                removal.go_on.set()
                await until(lambda: not store.room.l1.policy.entries)
                scan.go_on.set()
        assert store.room.l1.policy.used == on_disk(tmp_path) == 0


async def test_a_scan_that_is_overtaken_by_another_takes_nothing_away(
    tmp_path: Path, origin: Origin, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = origin.add(Made(MIB), "model.safetensors")
    async with running(tmp_path, [origin.url]) as store:
        scan = Held(monkeypatch, TierDirectory, "scan", after=True)
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(store.room.l1.scan)
                await scan.at_it.wait()  # it has seen nothing
                await read(store, want, 0, 10)
                await filled(store, want)
                await settled(store)
                await store.room.l1.scan()
                scan.go_on.set()
        assert store.room.l1.policy.used == on_disk(tmp_path) > MIB


async def test_what_is_written_and_closed_while_an_earlier_life_is_measured_counts(
    tmp_path: Path, origin: Origin, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = origin.add(Made(3 * CHUNK), "data.txt")
    async with running(tmp_path, [origin.url]) as store:
        fill_nothing(store)
        measured = Held(monkeypatch, TierDirectory, "measure", after=True)
        await read(store, want, 0, 10)
        with trio.fail_after(20):
            await measured.at_it.wait()  # there was one chunk
        await read(store, want, CHUNK, 10)
        await until(lambda: not store._blobs and not store.room.l1.policy.reserved)
        measured.go_on.set()
        await settled(store)
        assert store.room.l1.policy.used == on_disk(tmp_path) > 2 * CHUNK


async def test_a_blob_that_is_opened_while_an_earlier_life_is_measured_is_measured_when_it_is_closed(
    tmp_path: Path, origin: Origin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though nothing was written by who opened it, and what was there went with its earlier life."""
    want = origin.add(Made(MIB), "model.safetensors")
    async with running(tmp_path, [origin.url]) as store:
        await read(store, want, 0, 10)
        await filled(store, want)
        await settled(store)
        handle = await store.open(want)
        measured = Held(monkeypatch, TierDirectory, "measure", after=True)
        for path in tmp_path.rglob(want.sha256):
            path.unlink()
        await handle.close()
        with trio.fail_after(20):
            await measured.at_it.wait()
        local = store.room.blob(want.sha256, want.size)
        measured.go_on.set()
        await until(lambda: store.room.l1.policy.holds(want.sha256) == 1)
        store.room.closed(local)
        await settled(store)
        assert store.room.l1.policy.used == on_disk(tmp_path) == 0


async def test_what_a_disk_took_of_a_chunk_before_it_was_full_counts(
    tmp_path: Path, origin: Origin, monkeypatch: pytest.MonkeyPatch
) -> None:
    want, pwrite = origin.add(Made(2 * MIB), "data.txt"), os.pwrite

    def full(fd: int, data: bytes | memoryview, offset: int) -> int:
        if len(data) < 2 * MIB:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(fd, data[:MIB], offset)

    async with running(tmp_path, [origin.url]) as store:
        fill_nothing(store)
        monkeypatch.setattr("heliosfs.tiers.local.os.pwrite", full)
        handle = await store.open(want)
        assert await handle.read(5, 100) == origin.data(want, 5, 100)
        await until(lambda: not store.room.l1.policy.reserved)
        assert store.room.l1.policy.used == on_disk(tmp_path) > MIB
        await handle.close()
        await settled(store)
        assert store.room.l1.policy.used == on_disk(tmp_path) > MIB
        assert (await store.room.evict([want.sha256])).removed == 1
        assert store.room.l1.policy.used == on_disk(tmp_path) == 0


async def test_chunks_that_are_wrong_are_forgotten_though_the_last_handle_goes_meanwhile(
    tmp_path: Path, origin: Origin, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = origin.add(Made(2 * CHUNK), "data.txt")
    async with running(tmp_path, [origin.url]) as store:
        fill_nothing(store)
        flush = Held(monkeypatch, LocalBlob, "sync", after=False)
        await read(store, want, 0, 10)
        forgotten: list[bool] = []

        async def forget() -> None:
            forgotten.append(await store.healer.chunks_wrong(want.sha256, [0]))

        with trio.fail_after(20):
            await flush.at_it.wait()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(forget)
                await trio.testing.wait_all_tasks_blocked()
                flush.go_on.set()
        assert forgotten == [True]
        await settled(store)
        assert store.status(want.sha256).local_bytes == 0
        assert store.room.l1.policy.used == on_disk(tmp_path)
        assert await read(store, want, 0, 10) == origin.data(want, 0, 10)


async def test_a_look_that_was_given_up_removes_nothing_of_a_later_life(
    tmp_path: Path, origin: Origin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who opened the blob has gone; its thread is about to remove half of a pair, of which it has seen nothing."""
    want = origin.add(Made(2 * CHUNK), "data.txt")
    at_it, go_on, remove = threading.Event(), threading.Event(), LocalBlob._remove_partial

    def slow(self: LocalBlob) -> None:
        if not at_it.is_set():
            at_it.set()
            assert go_on.wait(20)
        remove(self)

    monkeypatch.setattr(LocalBlob, "_remove_partial", slow)
    async with running(tmp_path, [origin.url]) as store:
        fill_nothing(store)
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(store.open, want)
                await until(at_it.is_set)
                scope.cancel()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, store, want, 0, 10)
            with trio.move_on_after(1):
                await until(lambda: store.room.l1.policy.entries and not store._blobs)
            go_on.set()
        await settled(store)
        assert store.room.l1.policy.used == on_disk(tmp_path) > CHUNK
        assert await read(store, want, CHUNK, 10) == origin.data(want, CHUNK, 10)
