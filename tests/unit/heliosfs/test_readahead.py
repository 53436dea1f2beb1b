"""Read-ahead through memory of files that are not filled: who gets how much, in which pieces, and when it goes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import trio

from heliosfs.blobs import BlobHandle, BlobRef
from heliosfs.fetch.chunks import IN_FLIGHT, MISSING, POOLED, Job
from heliosfs.fetch.planner import Limits, Planner
from heliosfs.fetch.readahead import IDLE, LEAST_SHARE
from heliosfs.store.recipe import MAX_CHUNK
from tests.support.origin import Made, Origin, Request
from tests.support.stores import QUICK, filled, roomy, running, until
from tests.unit.heliosfs.test_planner import recipe_of

MIB = 1 << 20
CHUNK = MAX_CHUNK
ROOM = 30 * MIB


class Reading:
    """A planner of files that are not filled, and the memory that it uses, as the engine would."""

    def __init__(self, memory: int = ROOM, files: int = 1, lengths: list[int] | None = None) -> None:
        self.planner = Planner()
        for number in range(files):
            self.planner.add(str(number), recipe_of(lengths or [CHUNK] * 100, "abcdef"[number]))
        self.limits = Limits(True, True, 256 * MIB, 16 * MIB, memory)
        self.jobs: list[Job] = []

    def start(self) -> list[Job]:
        """Start what may be started."""
        started = []
        while (job := self.planner.next(0.0, self.limits)) is not None:
            started.append(job)
            if job.ahead:
                assert self.planner.readahead.used <= self.limits.memory
        self.jobs += started
        return started

    def deliver(self) -> None:
        """Everything on its way comes, and the disk takes none of it."""
        for job in self.jobs:
            for index in range(job.first, job.stop):
                self.planner.arrived(job, index, kept=False, pooled=True)
            self.planner.ended(job)
        self.jobs = []

    def read(self, key: str, reader: int, start: int, stop: int, step: int = MIB) -> int:
        """Read on from ``start`` to ``stop`` in steps; returns how often the reader had to wait for something."""
        waits = 0
        for offset in range(start, stop, step):
            end = offset + step
            self.planner.read_at(key, reader, offset, end)
            chunks = range(offset // CHUNK, (end - 1) // CHUNK + 1)
            lacking = [index for index in chunks if self.planner.state(key, index) != POOLED]
            self.planner.want(key, lacking)
            self.start()
            if lacking:
                waits += 1
                self.deliver()
        return waits

    def pooled(self, key: str = "0") -> list[int]:
        return [index for index in range(100) if self.planner.state(key, index) == POOLED]


def test_a_reader_that_goes_forward_waits_seldom() -> None:
    reading = Reading()
    assert reading.read("0", 1, 0, 100 * CHUNK) <= 30, "one wait in three chunks where each round trip brings a window"
    assert reading.planner.readahead.used <= ROOM


def test_the_window_grows_with_what_was_read_in_a_row() -> None:
    reading = Reading()
    reading.read("0", 1, 0, MIB)
    assert reading.planner.ahead_jobs == 0
    assert reading.pooled() == [0], "who reads a header wants no more"
    reading.read("0", 1, MIB, 3 * MIB)
    assert [(job.first, job.stop) for job in reading.jobs] == [(1, 2)]


def test_who_jumps_about_gets_what_was_asked_for_alone() -> None:
    reading = Reading()
    for number in range(50):
        start = (number * 37 % 100) * CHUNK
        reading.planner.read_at("0", 1, start, start + CHUNK)
        reading.planner.want("0", [start // CHUNK])
        assert [job.ahead for job in reading.start()] == [False]
        reading.deliver()
        assert len(reading.pooled()) == 1, "and the last place is left"


def test_what_was_read_goes_at_once_and_what_was_not_stays() -> None:
    reading = Reading()
    reading.read("0", 1, 0, 10 * CHUNK)
    reading.deliver()
    assert reading.pooled()[0] == 9
    gone = reading.planner.readahead.past
    assert sorted(gone) == [("0", index) for index in range(9)], "each is told once"
    reading.planner.reader_left("0", 1)
    assert not reading.pooled()
    assert reading.planner.readahead.used == 0
    assert {index for _, index in gone} >= set(range(12))


def test_a_second_reader_of_the_file_keeps_what_it_has_yet_to_read() -> None:
    """Ranks of one model read the same file, one a little behind the other."""
    reading = Reading()
    for number in (1, 2):
        reading.read("0", number, 0, MIB)
    for offset in range(MIB, 40 * CHUNK, MIB):
        reading.read("0", 1, offset, offset + MIB)
        if offset >= 2 * CHUNK:
            late = offset - 2 * CHUNK
            assert not reading.read("0", 2, late, late + MIB), "the first one's chunks are here for it"


def test_chunks_come_in_ranges() -> None:
    lengths = [256 << 10] * 1600
    planner = Planner()
    planner.add("0", recipe_of(lengths))
    limits = Limits(True, True, 256 * MIB, 16 * MIB, ROOM)
    jobs = []
    for offset in range(0, 400 * MIB, MIB):
        planner.read_at("0", 1, offset, offset + MIB)
        while (job := planner.next(0.0, limits)) is not None:
            jobs.append(job)
            for index in range(job.first, job.stop):
                planner.arrived(job, index, kept=False, pooled=True)
            planner.ended(job)
    late = [job.stop - job.first for job in jobs if 2 * ROOM <= planner_offset(job) < 399 * MIB - ROOM]
    assert min(late) * (256 << 10) >= ROOM // 4 - (1 << 20)


def test_on_a_slow_link_ranges_are_as_small_as_it_wants_them() -> None:
    reading = Reading()
    reading.limits = Limits(True, True, 12 * MIB, CHUNK + MIB, ROOM)
    reading.read("0", 1, 0, 20 * CHUNK)
    reading.deliver()
    reading.planner.read_at("0", 1, 20 * CHUNK, 20 * CHUNK + MIB)
    assert [job.stop - job.first for job in reading.start()] == [1, 1], "and more of them than one"


def planner_offset(job: Job) -> int:
    return job.first * (256 << 10)


def test_readers_share_the_memory_and_take_nothing_from_each_other() -> None:
    reading = Reading(files=3)
    seen: dict[str, set[int]] = {"0": set(), "1": set(), "2": set()}
    for offset in range(0, 60 * CHUNK, MIB):
        for key in seen:
            reading.planner.read_at(key, 1, offset, offset + MIB)
            reading.planner.want(
                key, [offset // CHUNK] if reading.planner.state(key, offset // CHUNK) != POOLED else []
            )
            reading.start()
            reading.deliver()
            seen[key] |= set(reading.pooled(key))
    gone = reading.planner.readahead.past
    assert len(gone) == len(set(gone)), "nothing was fetched twice"
    assert all(len(chunks) >= 58 for chunks in seen.values()), "each got ahead all the time"


def test_many_readers_do_not_each_get_too_little() -> None:
    reading = Reading(memory=4 * LEAST_SHARE)
    for offset in range(0, CHUNK, MIB):
        for number in range(12):
            start = number * 8 * CHUNK + offset
            reading.planner.read_at("0", number, start, start + MIB)
    assert len(reading.start()) >= 4
    assert reading.planner.readahead.used <= 4 * LEAST_SHARE


def test_who_does_not_read_on_does_not_keep_others_from_reading_ahead() -> None:
    reading = Reading(files=2)
    reading.read("0", 1, 0, 20 * CHUNK)
    reading.start()
    reading.deliver()
    assert len(reading.pooled("0")) >= 6
    waits = [reading.read("1", 1, start, start + IDLE // 4) for start in range(0, 100 * CHUNK - IDLE // 4, IDLE // 4)]
    assert not reading.pooled("0")
    assert waits[-1] < waits[0]


def test_without_memory_nothing_is_read_ahead() -> None:
    reading = Reading(memory=MIB)
    assert reading.read("0", 1, 0, 20 * CHUNK) == 20
    assert all(not job.ahead for job in reading.jobs)


def test_a_file_that_is_filled_needs_none_unless_the_disk_takes_nothing() -> None:
    reading = Reading()
    reading.planner.fill("0", (0, 0))
    for offset in range(0, 2 * CHUNK, MIB):
        reading.planner.read_at("0", 1, offset, offset + MIB)
    assert not any(job.ahead for job in reading.start())
    for job in reading.jobs:
        reading.planner.ended(job)
    reading.jobs = []
    reading.limits = Limits(True, True, 256 * MIB, 16 * MIB, ROOM, filling=False)
    assert all(job.ahead for job in reading.start())
    reading.deliver()
    assert reading.pooled()
    reading.limits = Limits(True, True, 256 * MIB, 16 * MIB, ROOM)
    reading.start()
    assert not reading.pooled(), "what is filled again is fetched to the disk"
    assert reading.planner.state("0", 2) == IN_FLIGHT


def test_a_chunk_that_left_the_memory_early_is_asked_for_again() -> None:
    reading = Reading()
    reading.read("0", 1, 0, 4 * CHUNK)
    reading.deliver()
    reading.planner.want("0", [5])
    assert next((job.first, job.demand) for job in reading.start()) == (5, True)
    reading.planner.lost("0", [5])
    reading.deliver()
    assert reading.planner.state("0", 50) == MISSING


# --- in a store, over real connections -------------------------------------------------------------------------------

NO_ROOM = roomy(request_deadline_s=10.0, connections=4, buffer_mib=64, pool_mib=64, cache_limit_gib=1e-6)
"""The disk takes no file."""


async def read_on(handle: BlobHandle, origin: Origin, want: BlobRef, stop: int) -> None:
    """Read from the start in the kernel's steps, as a mount does."""
    for offset in range(0, stop, MIB):
        parts = handle.held(offset, MIB)
        data = b"".join(parts) if parts is not None else bytes(await handle.read(offset, MIB))
        assert data == origin.data(want, offset, MIB)
        await trio.lowlevel.checkpoint()


def at_once(requests: Sequence[Request]) -> int:
    """The most chunks of one object that were on their way at the same time."""
    asked = [request for request in requests if request.span is not None]
    most = 0
    for now in asked:
        chunks: set[int] = set()
        for other in asked:
            if other.span is not None and other.at <= now.at < other.ended:
                chunks |= set(range(other.span[0] // CHUNK, other.span[1] // CHUNK + 1))
        most = max(most, len(chunks))
    return most


@pytest.mark.trio
async def test_what_the_disk_has_no_room_for_is_read_ahead_through_memory(tmp_path: Path, origin: Origin) -> None:
    origin.delay_s = 0.05
    want = origin.add(Made(30 * CHUNK))
    async with running(tmp_path, [origin.url], NO_ROOM) as store:
        handle = await store.open(want)
        await read_on(handle, origin, want, want.size)
        await handle.close()
        await until(lambda: not store._blobs)
        assert at_once(origin.requests) >= 3, "the link is used, not one chunk a round trip"
        assert any(length >= 2 * CHUNK for _, length in origin.spans()), "in ranges"
        assert origin.settled() == want.size, "and nothing was fetched twice"
        report = store.pool.report()
        assert report.used <= report.limit
        assert report.bytes["readahead"] == 0, "what was read is kept no longer"


@pytest.mark.trio
async def test_a_reader_that_stops_leaves_nothing_in_memory(tmp_path: Path, origin: Origin) -> None:
    want = origin.add(Made(30 * CHUNK))
    async with running(tmp_path, [origin.url], NO_ROOM) as store:
        handle = await store.open(want)
        await read_on(handle, origin, want, 8 * CHUNK)
        await until(lambda: store.pool.report().bytes["readahead"] >= 3 * CHUNK)
        await trio.sleep(0.2)
        assert store.pool.report().bytes["readahead"] <= 32 * MIB
        origin.fault("stall", times=None, after=MIB)
        for offset in range(8 * CHUNK, 10 * CHUNK, MIB):
            assert handle.held(offset, MIB) is not None, "what comes next is here"
            await trio.sleep(0.01)
        await handle.close()
        await until(lambda: not store.pool.report().bytes["readahead"])


@pytest.mark.trio
async def test_readers_of_two_files_read_ahead_side_by_side(tmp_path: Path, origin: Origin) -> None:
    origin.delay_s = 0.02
    wants = [origin.add(Made(25 * CHUNK, seed=number), f"{number}.safetensors") for number in range(3)]
    async with running(tmp_path, [origin.url], NO_ROOM) as store:
        handles = [await store.open(want) for want in wants]
        async with trio.open_nursery() as nursery:
            for handle, want in zip(handles, wants, strict=True):
                nursery.start_soon(read_on, handle, origin, want, want.size)
        for handle in handles:
            await handle.close()
        assert origin.settled() == sum(want.size for want in wants), "none pushed out what another had yet to read"


@pytest.mark.trio
async def test_when_there_is_room_again_the_file_is_filled(tmp_path: Path, origin: Origin) -> None:
    want = origin.add(Made(20 * CHUNK))
    async with running(tmp_path, [origin.url], QUICK) as store:
        store.halt()
        handle = await store.open(want)
        await read_on(handle, origin, want, 6 * CHUNK)
        await until(lambda: store.status(want.sha256).local_bytes or store.pool.report().bytes["readahead"])
        store.resume()
        await filled(store, want)
        assert bytes(await handle.read(0, want.size)) == origin.data(want, 0, want.size)
        await handle.close()
        await until(lambda: not store._blobs)
        assert store.pool.report().bytes["readahead"] == 0
