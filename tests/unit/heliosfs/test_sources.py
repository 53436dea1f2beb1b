"""Several sources, each of which has only a part right: all are asked before a READ is told that there is no more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import trio

from helios.errors import HeliosError, IntegrityError, Unavailable
from heliosfs.blobs import BlobHandle
from tests.support.origin import Fault, Made, Origin, Request
from tests.support.stores import QUICK, filled, roomy, running
from tests.unit.heliosfs.test_blobs_faults import dead_url

MIB = 1 << 20
CHUNK = 4 * MIB
Expect = Callable[[str], None]


def third(number: int) -> Callable[[Request], bool]:
    """Requests that begin with every third chunk, from the chunk ``number`` on."""
    return lambda r: r.span is not None and "/objects/" in r.path and r.span[0] // CHUNK % 3 == number


def wrong_once(origin: Origin, byte: int) -> Fault:
    """The byte of the blob is wrong in the first answer that has it and nothing else wrong."""

    def has_it(request: Request) -> bool:
        if request.span is None or not request.span[0] <= byte <= request.span[1]:
            return False
        fault.after = byte - request.span[0]
        return True

    fault = origin.fault("corrupt", has_it)
    return fault


async def read_all(handle: BlobHandle, origin: Origin, offsets: range) -> list[HeliosError]:
    """Read 100 bytes at each offset, all at once; returns what failed. Wrong bytes end the test."""
    failures = []

    async def one(offset: int) -> None:
        try:
            data = await handle.read(offset, 100)
        except HeliosError as error:
            failures.append(error)
        else:
            assert data == origin.data(handle._blob.want, offset, 100)

    async with trio.open_nursery() as readers:
        for offset in offsets:
            readers.start_soon(one, offset)
    return failures


@pytest.mark.trio
@pytest.mark.parametrize("how", ["corrupt", "not found", "down"])
async def test_many_reads_at_once_find_the_source_that_has_it(
    tmp_path: Path, origin: Origin, other: Origin, expected_log_errors: Expect, how: str
) -> None:
    """All buffers are in use when a chunk turns out to be wrong: the other source is asked all the same."""
    want = origin.add(Made(24 * CHUNK), "data.txt")
    other.add(Made(24 * CHUNK), "data.txt")
    if how == "corrupt":
        expected_log_errors("a chunk is corrupt")
        fault = origin.fault("corrupt", third(0), times=None, after=5)
    else:
        fault = origin.fault("status", third(0), times=None, status=404 if how == "not found" else 503)
    settings = roomy(request_deadline_s=10.0, buffer_mib=8)
    async with running(tmp_path, [origin.url, other.url], settings) as store:
        handle = await store.open(want)
        assert await read_all(handle, origin, range(0, want.size, CHUNK)) == []
        await filled(store, want)
        await handle.close()
    assert fault.hits


@pytest.mark.trio
async def test_two_sources_of_which_each_has_something_wrong_are_one_that_is_right(
    tmp_path: Path, origin: Origin, other: Origin, expected_log_errors: Expect
) -> None:
    """Also within one range: the source that was left for one chunk is asked for the next one."""
    expected_log_errors("a chunk is corrupt")
    cuts = [64 << 10] * 64
    want = origin.add(Made(CHUNK), "data.txt", cuts=cuts)
    other.add(Made(CHUNK), "data.txt", cuts=cuts)
    # whatever is asked of a source, its second chunk is wrong, or its first one: the second source has less right
    origin.fault("corrupt", lambda r: r.span is not None and r.span[0] % (128 << 10) == 0, times=None, after=5)
    other.fault("corrupt", lambda r: r.span is not None and r.span[0] % (128 << 10) != 0, times=None, after=5)
    other.fault("corrupt", lambda r: r.span is not None, times=None, after=(64 << 10) + 5)
    origin.fault("corrupt", lambda r: r.span is not None, times=None, after=(64 << 10) + 5)
    async with running(tmp_path, [origin.url, other.url]) as store:
        handle = await store.open(want)
        assert await read_all(handle, origin, range(0, want.size, 64 << 10)) == []
        await filled(store, want)
        await handle.close()


@pytest.mark.trio
async def test_each_chunk_of_a_range_is_asked_for_again_before_it_counts_as_wrong(
    tmp_path: Path, origin: Origin
) -> None:
    """A source may know a better copy of each chunk that it is told of, and of that one alone."""
    size = 32 << 10
    want = origin.add(Made(128 * size), "data.txt", cuts=[size] * 128)
    faults = [wrong_once(origin, number * size) for number in range(16)]
    async with running(tmp_path, [origin.url]) as store:
        handle = await store.open(want)
        assert await handle.read(0, 16 * size) == origin.data(want, 0, 16 * size)
        await handle.close()
    assert all(fault.hits == 1 for fault in faults)


@pytest.mark.trio
async def test_a_chunk_that_nobody_has_right_is_told_and_costs_no_other(
    tmp_path: Path, origin: Origin, other: Origin, expected_log_errors: Expect
) -> None:
    expected_log_errors("a chunk is corrupt")
    want = origin.add(Made(15 * CHUNK), "data.txt", spread=1)
    other.add(Made(15 * CHUNK), "data.txt", spread=1)
    gone = lambda r: "/packs/" in r.path and int(r.path.rpartition("-")[2]) % 3 == 1  # noqa: E731
    origin.fault("corrupt", lambda r: "/packs/" in r.path and r.path.endswith(("0", "5")), times=None, after=5)
    origin.fault("status", gone, times=None, status=404)
    other.fault("status", gone, times=None, status=404)
    settings = msgspec.structs.replace(QUICK, buffer_mib=8)
    async with running(tmp_path, [origin.url, other.url], settings) as store:
        handle = await store.open(want)
        failures = await read_all(handle, origin, range(0, want.size, CHUNK))
        assert len(failures) == 5
        assert all("status 404" in str(failure) for failure in failures)
        assert {type(failure) for failure in failures} <= {Unavailable, IntegrityError}
        await handle.close()


@pytest.mark.trio
async def test_a_source_that_failed_once_takes_over_from_one_that_says_nothing(
    tmp_path: Path, origin: Origin, other: Origin
) -> None:
    """What may have passed is tried again long before the silent one's deadline."""
    want = origin.add(Made(CHUNK), "data.txt")
    other.add(Made(CHUNK), "data.txt")
    once = origin.fault("status", "/objects/", status=503)
    silent = other.fault("stall", "/objects/", times=None)
    async with running(tmp_path, [origin.url, other.url], roomy(request_deadline_s=60.0)) as store:
        handle = await store.open(want)
        with trio.fail_after(30):
            assert await handle.read(0, 100) == origin.data(want, 0, 100)
        await handle.close()
    assert (once.hits, silent.hits) == (1, 1)


@pytest.mark.trio
async def test_wrong_bytes_of_one_source_are_no_reason_to_fail_while_another_is_slow_to_answer(
    tmp_path: Path, origin: Origin, other: Origin, expected_log_errors: Expect
) -> None:
    """The right one answers late, twice as late as a flight may be silent where somebody else could take over."""
    expected_log_errors("a chunk is corrupt")
    want = origin.add(Made(CHUNK), "data.txt")
    other.add(Made(CHUNK), "data.txt")
    wrong = origin.fault("corrupt", "/objects/", times=None, after=5)
    async with running(tmp_path, [origin.url, other.url], roomy(request_deadline_s=20.0)) as store:
        handle = await store.open(want)
        other.delay_s = 3.0
        assert await handle.read(0, 100) == origin.data(want, 0, 100)
        await handle.close()
    assert wrong.hits == 2, "once, and once more with a fresh placement: nothing better was to be had from it"


@pytest.mark.trio
async def test_a_read_that_no_source_can_serve_ends_soon_after_the_deadline(
    tmp_path: Path, origin: Origin, other: Origin
) -> None:
    """One fails at once, again and again, the other says nothing: they do not hand the chunk to and fro for ever."""
    want = origin.add(Made(CHUNK), "data.txt")
    other.add(Made(CHUNK), "data.txt")
    origin.fault("status", "/objects/", times=None, status=503)
    other.fault("stall", "/objects/", times=None)
    async with running(tmp_path, [origin.url, other.url]) as store:
        handle = await store.open(want)
        with trio.fail_after(5 * QUICK.request_deadline_s), pytest.raises(Unavailable):
            await handle.read(0, 100)
        await handle.close()


@pytest.mark.trio
async def test_who_sends_wrong_bytes_is_not_asked_on_and_on_while_another_is_away(
    tmp_path: Path, other: Origin, expected_log_errors: Expect
) -> None:
    """It is tried again when the one that is away is, which is ever more seldom."""
    expected_log_errors("a chunk is corrupt")
    want = other.add(Made(CHUNK), "data.txt")
    wrong = other.fault("corrupt", "/objects/", times=None, after=5)
    settings = msgspec.structs.replace(QUICK, request_deadline_s=4.0)
    async with running(tmp_path, [dead_url(), other.url], settings) as store:
        handle = await store.open(want)
        with pytest.raises(Unavailable):
            await handle.read(0, 100)
        await handle.close()
    assert 2 <= wrong.hits <= 20
