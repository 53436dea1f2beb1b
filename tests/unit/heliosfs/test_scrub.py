"""The scrubber: how fast, in which order, what it leaves out, and that it goes on where it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from helios.metrics import MountMetrics
from heliosfs import scrub
from heliosfs.blobs import BlobStore
from heliosfs.care import Care
from heliosfs.scrub import IN_USE_EVERY, Pace, Scrubber
from tests.support.damage import flip
from tests.support.origin import Made, Origin
from tests.support.stores import filled, read, running, until

MIB = 1 << 20


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(1, 1 << 22)), max_size=50), st.floats(1.0, 1e9))
def test_the_pace_is_never_exceeded(steps: list[tuple[float, int]], rate: float) -> None:
    """Whatever time the looking takes: between two looks it is waited long enough, and not longer."""
    now, total = 0.0, 0
    pace = Pace(rate, lambda: now)
    for took, count in steps:
        now += took
        before = now
        wait = pace.wait(count)
        now += wait
        total += count
        assert now - before <= count / rate * (1 + 1e-9) + 1e-6
        assert total <= rate * now * (1 + 1e-9) + 1e-6


async def store_with(store: BlobStore, origin: Origin, sizes: list[int]) -> list[str]:
    wants = [origin.add(Made(size, seed), f"{seed}.bin") for seed, size in enumerate(sizes)]
    for want in wants:
        await read(store, want, 0, want.size)
        await filled(store, want)
    await until(lambda: not store._blobs and not any(map(store.room.l1.policy.holds, store.room.l1.policy.entries)))
    return sorted(want.sha256 for want in wants)


class Watched(Care):
    """Notes what is looked at, and where from."""

    looked: list[tuple[str, int]]

    async def check_whole(self, tier: Any, sha256: str, paced: Any, *, strong: bool, start: int = 0) -> Any:
        assert not strong
        self.looked.append((sha256, start))
        return await super().check_whole(tier, sha256, paced, strong=strong, start=start)


def scrubber_of(store: BlobStore, rate: float) -> tuple[Scrubber, Watched]:
    async def wanted(sha256: str) -> None:
        await trio.lowlevel.checkpoint()

    care = Watched(store, MountMetrics(), wanted)
    care.looked = []
    return Scrubber(store, care, rate, MountMetrics()), care


@pytest.mark.trio
async def test_every_blob_comes_once_a_pass_by_name_but_those_in_use_only_now_and_then(
    tmp_path: Path, origin: Origin
) -> None:
    async with running(tmp_path, [origin.url]) as store:
        names = await store_with(store, origin, [MIB, 2 * MIB, 3 * MIB])
        scrubber, care = scrubber_of(store, 4e11)
        store.room.l1.policy.hold(names[1])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(scrubber.run)
            await until(lambda: len(care.looked) >= IN_USE_EVERY * 3 - 1)
            nursery.cancel_scope.cancel()
        looked = [sha256 for sha256, _ in care.looked]
        idle = [names[0], names[2]]
        assert looked[: IN_USE_EVERY * 3 - 1][: 2 * (IN_USE_EVERY - 1) + 3] == idle * (IN_USE_EVERY - 1) + names
        store.room.l1.policy.let_go(names[1])


@pytest.mark.trio
async def test_it_goes_on_where_it_was(tmp_path: Path, origin: Origin, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(tmp_path, [origin.url]) as store:
        names = await store_with(store, origin, [9 * MIB, 9 * MIB, 9 * MIB])
        monkeypatch.setattr(scrub, "START_S", 0.0)
        scrubber, care = scrubber_of(store, 4e7)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(scrubber.run)
            await until(lambda: scrubber.checked > 13 * MIB)  # one blob, and a chunk of the next
            nursery.cancel_scope.cancel()
        assert [name for name, _ in care.looked] == names[:2]
        scrubber, care = scrubber_of(store, 4e7)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(scrubber.run)
            await until(lambda: len(care.looked) == 2)
            nursery.cancel_scope.cancel()
        assert care.looked[0] in [(names[1], 1), (names[1], 2)]
        assert care.looked[1] == (names[2], 0)
        (tmp_path / "scrub").write_bytes(b"nonsense")
        scrubber, care = scrubber_of(store, 4e7)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(scrubber.run)
            await until(lambda: care.looked)
            nursery.cancel_scope.cancel()
        assert care.looked[0] == (names[0], 0)


@pytest.mark.trio
async def test_paused_it_looks_at_nothing_and_orphans_go(
    tmp_path: Path, origin: Origin, expected_log_errors: Any
) -> None:
    expected_log_errors("a cached blob is damaged")
    orphan = tmp_path / "sums" / "00" / ("0" * 64)
    async with running(tmp_path, [origin.url]) as store:
        (name,) = await store_with(store, origin, [MIB])
        orphan.parent.mkdir(exist_ok=True)
        orphan.write_bytes(b"x")
        scrubber, care = scrubber_of(store, 4e11)
        scrubber.pause()
        flip(tmp_path / "blobs" / name[:2] / name, 5)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(scrubber.run)
            await trio.sleep(0.3)
            assert care.looked == []
            assert scrubber.document()["paused"]
            scrubber.resume()
            await until(lambda: scrubber.bad == 1 and not orphan.exists())
            nursery.cancel_scope.cancel()
        assert not store.status(name).complete


@pytest.mark.trio
async def test_a_rate_of_nothing_is_no_scrubbing(tmp_path: Path, origin: Origin) -> None:
    async with running(tmp_path, [origin.url]) as store:
        scrubber, _ = scrubber_of(store, 0.0)
        with trio.fail_after(5):
            await scrubber.run()
