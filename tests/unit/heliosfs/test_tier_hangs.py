"""A disk that hangs under a tier: a FUSE filesystem whose process is stopped. What others can serve goes on."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from heliosfs.blobs import BlobRef, BlobStore
from heliosfs.tiers.directory import TierDirectory
from heliosfs.tiers.health import State
from heliosfs.tiers.leases import open_elsewhere
from heliosfs.tiers.local import LocalBlob
from heliosfs.tiers.silence import Asked, waits_for_nobody
from heliosfs.tiers.tier import Tier
from tests.support.hanging import HangingDisk, hanging_disk
from tests.support.origin import Made, Origin
from tests.support.stores import filled, read, running, until
from tests.unit.heliosfs.test_blobs_beside import put
from tests.unit.heliosfs.test_two_tiers import MIB, add, bounds, fill, tier

SOON_S = 12.0
"""The patience with a disk, and what a busy machine adds."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[HangingDisk]:
    with hanging_disk(tmp_path) as disk:
        yield disk


PATIENT = msgspec.structs.replace(bounds(0, 0), request_deadline_s=8.0)
"""Where disks, not sources, are what is waited for."""


async def right(store: BlobStore, origin: Origin, want: BlobRef) -> None:
    with trio.fail_after(SOON_S):
        assert await read(store, want, want.size // 2, 100) == origin.data(want, want.size // 2, 100)


@pytest.mark.trio
@pytest.mark.parametrize("hangs", ["l1", "l2"])
async def test_what_is_opened_does_not_wait_for_a_disk_that_hangs(
    tmp_path: Path, disk: HangingDisk, origin: Origin, hangs: str
) -> None:
    """Files of the other tier, and of none; the disk counts as away until it answers again, and its files come back."""
    roots = {"l1": tmp_path / "l1", "l2": tmp_path / "l2"} | {hangs: disk.path / "tier"}
    async with running(roots["l1"], [origin.url], bounds(12, 0), l2=roots["l2"]) as store:
        wants = [add(origin, 10 * MIB, seed) for seed in range(3)]
        for want in reversed(wants):
            await fill(store, want)
        places = [tier(store, want) for want in wants]
        assert set(places) == {"l1", "l2"}
        new = add(origin, 10 * MIB, 9)
        mine: Tier | None = getattr(store.room, hangs)
        assert mine is not None
        begun = origin.sent()
        disk.stop()
        try:
            await right(store, origin, wants[1 - places.index(hangs) if hangs == places[0] else 0])
            for want in [*wants, new]:
                await right(store, origin, want)
            assert mine.health.state is State.AWAY
            assert mine.health.reason == "it does not answer"
            assert origin.sent() > begun, "what it has comes from elsewhere meanwhile"
            with trio.fail_after(2):
                for want in wants:
                    store.status(want.sha256)
                store.usage()
                await right(store, origin, wants[0])
        finally:
            disk.go_on()
        await until(lambda: mine.health.state is State.WORKS)
        with trio.fail_after(SOON_S):
            for want in [*wants, new]:
                assert await read(store, want, 0, want.size) == origin.data(want, 0, want.size)


@pytest.mark.trio
async def test_a_fill_goes_on_elsewhere_when_its_disk_hangs(tmp_path: Path, disk: HangingDisk, origin: Origin) -> None:
    """Its threads and buffers are left behind; a READ of the open file that asks the loop is answered."""
    want = origin.add(Made(40 * MIB, 5), "model.safetensors")
    origin.throttle.rate = 20e6
    async with running(disk.path / "l1", [origin.url], bounds(0, 0), l2=tmp_path / "l2") as store:
        handle = await store.open(want)
        assert await handle.read(0, 100) == origin.data(want, 0, 100)
        await until(lambda: origin.sent() > 8 * MIB)
        disk.stop()
        try:
            await until(lambda: store.room.l1.health.state is State.AWAY)
            origin.throttle.rate = None
            with trio.fail_after(SOON_S):
                assert await handle.read(30 * MIB, 100) == origin.data(want, 30 * MIB, 100)
            await filled(store, want)
            assert tier(store, want) == "l2"
        finally:
            disk.go_on()
        assert await handle.read(0, want.size) == origin.data(want, 0, want.size)
        await handle.close()
        await until(lambda: store.room.l1.health.state is State.WORKS)
        assert store._engine._buffers.free == store._engine._buffers.count


@pytest.mark.trio
async def test_a_cache_does_not_wait_for_the_store_beside_it(tmp_path: Path, disk: HangingDisk, origin: Origin) -> None:
    """Its own disk works, so it goes on being filled, from the network, and the store's files count again later."""
    wants = [add(origin, 100_000, seed) for seed in range(8)]
    for want in wants:
        put(tmp_path / "below/store", want, origin.data(want, 0, want.size))
    async with running(tmp_path / "l1", [origin.url], PATIENT, beside=disk.path / "store") as store:
        disk.stop()
        try:
            with trio.fail_after(SOON_S):
                async with trio.open_nursery() as nursery:
                    for want in wants[:6]:  # more than threads that ask the store
                        nursery.start_soon(right, store, origin, want)
            with trio.fail_after(3):
                await fill(store, wants[6])
            assert store.room.l1.health.state is State.WORKS
        finally:
            disk.go_on()
        await right(store, origin, wants[7])


@pytest.mark.trio
@pytest.mark.parametrize("call", ["link", "lstat"])
async def test_an_object_is_linked_on_a_disk_that_hangs(
    tmp_path: Path, disk: HangingDisk, origin: Origin, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Whichever step it is: the READ is answered from elsewhere. When the disk answers again, the step that was left
    behind does nothing to what is made there then."""
    want, other = add(origin, 10 * MIB), add(origin, 10 * MIB, 1)
    for each in (want, other):
        put(tmp_path / "below/store", each, origin.data(each, 0, each.size))
    real, armed = getattr(os, call), threading.Event()
    l1, l2, objects = disk.path / "l1", tmp_path / "l2", disk.path / "store"

    def hanging(path: Any, *args: Any, **options: Any) -> Any:
        if armed.is_set() and str(path).startswith((str(objects), str(l1 / "partial"))):
            armed.clear()
            disk.stop()
        return real(path, *args, **options)

    async with running(l1, [origin.url], PATIENT, beside=objects, l2=l2) as store:
        monkeypatch.setattr(os, call, hanging)
        armed.set()
        try:
            await right(store, origin, want)
            assert not armed.is_set()
            await until(lambda: store.room.l1.health.state is State.AWAY)
        finally:
            disk.go_on()
        await until(lambda: store.room.l1.health.state is State.WORKS)
        for each in (want, other):
            with trio.fail_after(SOON_S):
                assert await read(store, each, 0, each.size) == origin.data(each, 0, each.size)
        await filled(store, other)
        assert (l1 / "blobs" / other.sha256[:2] / other.sha256).stat().st_nlink == 2, "it was linked"


@pytest.mark.trio
async def test_a_tier_does_not_come_back_before_the_last_write_that_it_was_left_with(
    tmp_path: Path, disk: HangingDisk, origin: Origin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a write makes files, by name: those of the tier's next life must not be there yet."""
    want, goes, begun = add(origin, 10 * MIB), threading.Event(), threading.Event()
    create = LocalBlob._create

    def slowly(self: LocalBlob, *args: Any) -> None:
        if self.places.name == "l1" and not begun.is_set():
            begun.set()
            goes.wait(30)
        create(self, *args)

    monkeypatch.setattr(LocalBlob, "_create", slowly)
    async with running(disk.path / "l1", [origin.url], PATIENT, l2=tmp_path / "l2") as store:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(right, store, origin, want)
            await until(begun.is_set)
            disk.stop()
            await until(lambda: store.room.l1.health.state is State.AWAY)
            disk.go_on()
        await trio.sleep(2.5)  # it answers, and would be taken back after one
        assert store.room.l1.health.state is State.AWAY
        goes.set()
        await until(lambda: store.room.l1.health.state is State.WORKS)
        assert await read(store, want, 0, want.size) == origin.data(want, 0, want.size)


@pytest.mark.trio
@pytest.mark.parametrize("call", ["check", "disk", "measure"])
async def test_a_disk_that_hangs_while_it_is_looked_at_is_noticed(
    tmp_path: Path, disk: HangingDisk, origin: Origin, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Whichever call of a look it is that does not come back."""
    want = add(origin, 10 * MIB)
    real, armed = getattr(TierDirectory, call), threading.Event()

    def hanging(self: TierDirectory, *args: Any) -> Any:
        if armed.is_set() and self.root == disk.path / "l1":
            disk.stop()
        return real(self, *args)

    async with running(disk.path / "l1", [origin.url], bounds(0, 0), l2=tmp_path / "l2") as store:
        await fill(store, want)
        monkeypatch.setattr(TierDirectory, call, hanging)
        with (disk.path / "l1/blobs" / want.sha256[:2] / want.sha256).open("rb"):
            armed.set()
            try:
                if call == "measure":
                    assert (await store.room.evict([want.sha256])).kept == {want.sha256: "in use"}
                await until(lambda: store.room.l1.health.state is State.AWAY)
            finally:
                armed.clear()
                disk.go_on()
        await until(lambda: store.room.l1.health.state is State.WORKS)


def test_the_oldest_call_counts() -> None:
    now = [0.0]
    asked = Asked(lambda: now[0])
    with asked.call():
        now[0] = 2.0
        with asked.call():
            now[0] = 5.0
            assert asked.longest() == 5.0
        assert asked.longest() == 5.0
    assert asked.longest() == 0.0


def test_a_filesystem_of_another_process_may_keep_us_waiting(tmp_path: Path, disk: HangingDisk) -> None:
    assert waits_for_nobody(Path("/dev/shm"))
    assert not waits_for_nobody(disk.path)


@pytest.mark.trio
async def test_an_opening_that_is_given_up_leaves_nothing_open(
    tmp_path: Path, origin: Origin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its thread goes on and may find the file; who opens it next does not meet it."""
    want, goes = add(origin, 2 * MIB), threading.Event()
    load = LocalBlob.load

    def slowly(self: LocalBlob, *args: Any) -> Any:
        goes.wait(10)
        return load(self, *args)

    async with running(tmp_path / "l1", [origin.url]) as store:
        await fill(store, want)
        whole = tmp_path / "l1/blobs" / want.sha256[:2] / want.sha256
        monkeypatch.setattr(LocalBlob, "load", slowly)
        monkeypatch.setattr(LocalBlob, "load_at_once", lambda self, digest: False)
        with trio.move_on_after(0.2) as scope:
            await store.open(want)
        assert scope.cancelled_caught
        goes.set()
        assert await read(store, want, MIB, 100) == origin.data(want, MIB, 100)
        await until(lambda: not open_elsewhere_at(whole))


def open_elsewhere_at(path: Path) -> bool:
    with path.open("rb") as file:
        return open_elsewhere(file.fileno())
