"""Reading local files for READ requests."""

import errno
import os
import threading

import pytest
import trio

from heliosfs.fuse.reading import LocalReader
from heliosfs.tiers.reading import MAX_READ, DiskReads
from heliosfs.tiers.silence import Asked

pytestmark = pytest.mark.trio

DATA = os.urandom(3 * MAX_READ + 777)


@pytest.fixture
def fd(tmp_path):
    (tmp_path / "file").write_bytes(DATA)
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    yield fd
    os.close(fd)


def disk(threads: int = 8) -> DiskReads:
    return DiskReads(Asked(), threads)


RANGES = [(0, 0), (0, 1), (0, MAX_READ), (MAX_READ - 1, 4096), (3 * MAX_READ, MAX_READ), (len(DATA), 10), (1 << 40, 5)]


@pytest.mark.parametrize(("offset", "size"), RANGES)
async def test_cached_pages_are_read_on_the_spot(fd, offset, size):
    assert bytes(await LocalReader().read(fd, offset, size, disk())) == DATA[offset : offset + size]


def short(real):
    """preadv that finds only one page in the page cache."""

    def preadv(fd, buffers, offset, flags=0):
        if flags & os.RWF_NOWAIT:
            return real(fd, [buffers[0][:4096]], offset)
        return real(fd, buffers, offset)

    return preadv


def blocked(code):
    """preadv that can't without waiting."""

    def of(real):
        def preadv(fd, buffers, offset, flags=0):
            if flags & os.RWF_NOWAIT:
                raise OSError(code, os.strerror(code))
            return real(fd, [buffers[0][:100_000]], offset)

        return preadv

    return of


@pytest.mark.parametrize("fake", [short, blocked(errno.EAGAIN), blocked(errno.EOPNOTSUPP)])
@pytest.mark.parametrize(("offset", "size"), RANGES)
async def test_what_is_not_cached_is_read_by_a_thread_whole(fd, monkeypatch, fake, offset, size):
    monkeypatch.setattr(os, "preadv", fake(os.preadv))
    reader, reads = LocalReader(), disk()
    for _ in range(2):
        assert bytes(await reader.read(fd, offset, size, reads)) == DATA[offset : offset + size]


async def test_waiting_reads_have_a_buffer_each_and_buffers_are_bounded(fd, monkeypatch):
    monkeypatch.setattr(os, "preadv", blocked(errno.EAGAIN)(os.preadv))
    reader, reads = LocalReader(), disk(3)

    async def read(offset):
        assert bytes(await reader.read(fd, offset, 300_000, reads)) == DATA[offset : offset + 300_000]

    async with trio.open_nursery() as nursery:
        for number in range(40):
            nursery.start_soon(read, number * 70_000)
    assert len(reads._buffers) <= 3


async def test_an_error_of_the_disk_is_raised(fd, monkeypatch):
    monkeypatch.setattr(os, "preadv", blocked(errno.EIO)(os.preadv))
    with pytest.raises(OSError, match="Input/output"):
        await LocalReader().read(fd, 0, 10, disk())


async def test_reads_of_a_disk_that_hangs_end_when_it_is_given_up_and_hold_up_no_other(fd, tmp_path, monkeypatch):
    (tmp_path / "other").write_bytes(DATA)
    other = os.open(tmp_path / "other", os.O_RDONLY)
    hangs, works, go_on = disk(2), disk(2), threading.Event()
    real, outcomes = os.preadv, []

    def preadv(number, buffers, offset, flags=0):
        if flags & os.RWF_NOWAIT:
            raise BlockingIOError
        if number == fd:
            go_on.wait(30)
        return real(number, buffers, offset)

    async def stuck():
        with pytest.raises(OSError, match="does not answer") as failure:
            await LocalReader().read(fd, 0, 100, hangs)
        outcomes.append(failure.value.errno)

    monkeypatch.setattr(os, "preadv", preadv)
    try:
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(stuck)
            while hangs.busy < 2:
                await trio.sleep(0.01)
            with trio.fail_after(20):
                assert bytes(await LocalReader().read(other, 7, 100, works)) == DATA[7:107]
            hangs.give_up()
        assert outcomes == [errno.ETIMEDOUT] * 5
        await stuck()
    finally:
        go_on.set()
        os.close(other)
    while hangs.busy:
        await trio.sleep(0.01)
