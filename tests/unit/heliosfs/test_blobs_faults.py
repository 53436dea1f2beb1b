"""What goes wrong with sources and disks: never a wrong byte, never a hang, an error that says what it was."""

from __future__ import annotations

import errno
import logging
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import trio

from helios.errors import DeadlineExceeded, IntegrityError, Unavailable
from helios.metrics import MountMetrics
from heliosfs.blobs import BlobHandle
from heliosfs.tiers.local import LocalBlob
from tests.support.origin import COMMIT, Made, Origin, Request
from tests.support.stores import QUICK, filled, read, roomy, running, until

MIB = 1 << 20
CHUNK = 4 * MIB
Expect = Callable[[str], None]


def chunk(number: int) -> Callable[[Request], bool]:
    """Requests for the blob's object that hold a chunk of the 4 MiB grid."""
    return lambda r: r.span is not None and "/objects/" in r.path and r.span[0] <= number * CHUNK <= r.span[1]


def from_chunk(number: int) -> Callable[[Request], bool]:
    """Requests for the blob's object that start with a chunk."""
    return lambda r: r.span is not None and "/objects/" in r.path and r.span[0] == number * CHUNK


def dead_url() -> str:
    """The URL of a port where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


# --- wrong bytes ---


@pytest.mark.trio
async def test_a_corrupt_chunk_is_never_delivered(
    tmp_path: Path, origin: Origin, expected_log_errors: Expect, caplog: pytest.LogCaptureFixture
) -> None:
    expected_log_errors("a chunk is corrupt")
    want = origin.add(Made(6 * CHUNK), "data.txt")
    fault = origin.fault("corrupt", from_chunk(2), times=None, after=12345)
    metrics = MountMetrics()
    async with running(tmp_path, [origin.url], metrics=metrics) as store:
        handle = await store.open(want)
        with pytest.raises(
            IntegrityError, match=r"models/test/model data\.txt at byte 8388708: chunk 2 of .* is corrupt"
        ):
            await handle.read(2 * CHUNK + 100, 10)
        assert fault.hits == 2, "asked again, with a fresh placement, before it counted"
        assert origin.count("/placements") == 2
        # every other byte is fine, and the file is filled around it
        await until(lambda: store.status(want.sha256).local_bytes == 5 * CHUNK)
        for number in (0, 1, 3, 4, 5):
            assert await handle.read(number * CHUNK, 100) == origin.data(want, number * CHUNK, 100)
        fault.times = 0  # the source is repaired: the next read tries again
        assert await handle.read(2 * CHUNK + 100, 10) == origin.data(want, 2 * CHUNK + 100, 10)
        await filled(store, want)
        await handle.close()
    record = next(r for r in caplog.records if r.message.startswith("a chunk is corrupt"))
    assert (record.levelno, record.name) == (logging.ERROR, "heliosfs.fetch")
    fields = vars(record)
    assert fields["model"] == f"models/test/model@{COMMIT}"
    assert (fields["file"], fields["chunk"]) == ("data.txt", 2)
    assert fields["source"] == origin.url.removeprefix("http://")
    labels = {"source": fields["source"]}
    assert metrics.registry.get_sample_value("helios_mount_verify_failures_total", labels) == 1


@pytest.mark.trio
async def test_a_corrupt_chunk_comes_from_another_source(
    tmp_path: Path, origin: Origin, other: Origin, expected_log_errors: Expect
) -> None:
    expected_log_errors("a chunk is corrupt")
    want = origin.add(Made(3 * CHUNK))
    other.add(Made(3 * CHUNK))
    origin.fault("corrupt", chunk(1), times=None, after=5)
    async with running(tmp_path, [origin.url, other.url]) as store:
        assert await read(store, want, CHUNK, 100) == origin.data(want, CHUNK, 100)
        await filled(store, want)
        assert await read(store, want, 0, 3 * CHUNK) == origin.data(want, 0, 3 * CHUNK)
    assert other.sent() >= CHUNK


@pytest.mark.trio
async def test_a_lying_recipe_is_refused(tmp_path: Path, origin: Origin, other: Origin) -> None:
    want = origin.add(Made(2 * CHUNK))
    other.add(Made(2 * CHUNK))
    origin.fault("corrupt", "/recipe", times=None, after=70)
    async with running(tmp_path / "one", [origin.url]) as store:
        with pytest.raises(IntegrityError, match="does not match its digest"):
            await read(store, want, 0, 10)
    async with running(tmp_path / "two", [origin.url, other.url]) as store:
        assert await read(store, want, 0, 10) == origin.data(want, 0, 10)


@pytest.mark.trio
async def test_a_fill_that_cannot_end_is_let_go(
    tmp_path: Path, origin: Origin, expected_log_errors: Expect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody has it open and the last chunk is damaged everywhere: what is here is kept, nothing is held for it."""
    expected_log_errors("a chunk is corrupt")
    want = origin.add(Made(3 * CHUNK))
    origin.fault("corrupt", from_chunk(1), times=None)
    origin.fault("corrupt", lambda r: chunk(1)(r) and not from_chunk(1)(r), times=None, after=CHUNK)
    async with running(tmp_path, [origin.url]) as store:
        assert await read(store, want, 0, 10) == origin.data(want, 0, 10)
        await until(lambda: store.usage().filling == 0)
        await until(lambda: not store._blobs)
        assert store.status(want.sha256).local_bytes == 2 * CHUNK


# --- placements move ---


@pytest.mark.trio
@pytest.mark.parametrize("how", ["move", "shuffle"])
async def test_a_stale_placement_is_asked_for_again(tmp_path: Path, origin: Origin, how: str) -> None:
    """404, or other bytes under the old name: the placement is fetched once more and nobody notices."""
    want = origin.add(Made(4 * CHUNK), "data.txt", spread=1)
    metrics = MountMetrics()
    async with running(tmp_path, [origin.url], roomy(buffer_mib=8), metrics) as store:
        handle = await store.open(want)
        await handle.read(0, 1)
        await filled(store, want)
        await handle.close()
    moved = origin.add(Made(4 * CHUNK, seed=1), "data.txt", spread=1)
    origin.throttle.rate = 30e6
    async with running(tmp_path, [origin.url], metrics=metrics) as store:
        handle = await store.open(moved)
        await handle.read(0, 1)
        getattr(origin, how)(moved)
        assert await handle.read(3 * CHUNK, 100) == origin.data(moved, 3 * CHUNK, 100)
        await filled(store, moved)
        await handle.close()
    failures = [s for m in metrics.registry.collect() if "failures" in m.name for s in m.samples]
    assert not [s for s in failures if s.name.endswith("_total") and s.value], "not counted as an error"


@pytest.mark.trio
async def test_a_lease_ends(tmp_path: Path) -> None:
    with Origin(rate=40e6, lease_s=0.2) as origin:
        want = origin.add(Made(16 * CHUNK))
        async with running(tmp_path, [origin.url]) as store:
            assert await read(store, want, 0, 1) == origin.data(want, 0, 1)
            await filled(store, want)
        assert origin.count("/placements") >= 3


@pytest.mark.trio
async def test_a_blob_that_is_gone_is_an_error_not_enoent(tmp_path: Path, origin: Origin) -> None:
    want = origin.add(Made(CHUNK), "data.txt")
    origin.fault("status", "/objects/", times=None, status=404)
    async with running(tmp_path, [origin.url]) as store:
        started = time.monotonic()
        with pytest.raises(Unavailable, match=r"data\.txt at byte 0: .* status 404"):
            await read(store, want, 0, 10)
        assert time.monotonic() - started < QUICK.request_deadline_s, "waiting would not bring it back"


# --- connections ---


@pytest.mark.trio
@pytest.mark.parametrize("kind", ["truncate", "reset", "status", "stall", "corrupt"])
@pytest.mark.parametrize("where", ["/recipe", "/placements", "/objects/"])
async def test_one_failure_is_survived(tmp_path: Path, origin: Origin, kind: str, where: str) -> None:
    """With a single source the same one is asked again."""
    want = origin.add(Made(3 * CHUNK), "data.txt")
    origin.fault(kind, where, after=0 if where != "/objects/" else 1000)  # type: ignore[arg-type]
    # the client gives up at 0.9 of the deadline, so that there is time for a second try: also on a busy machine
    async with running(tmp_path, [origin.url], roomy(request_deadline_s=6.0)) as store:
        assert await read(store, want, 2 * CHUNK - 5, 10) == origin.data(want, 2 * CHUNK - 5, 10)
        await filled(store, want)


@pytest.mark.trio
@pytest.mark.parametrize("kind", ["truncate", "reset", "status", "stall"])
async def test_another_source_takes_over(tmp_path: Path, origin: Origin, other: Origin, kind: str) -> None:
    want = origin.add(Made(8 * CHUNK))
    other.add(Made(8 * CHUNK))
    origin.fault(kind, "", times=None, after=1000)  # type: ignore[arg-type]
    async with running(tmp_path, [origin.url, other.url], roomy(request_deadline_s=1.0)) as store:
        with trio.fail_after(15):
            assert await read(store, want, 5 * CHUNK, 10) == origin.data(want, 5 * CHUNK, 10)
        await filled(store, want)


@pytest.mark.trio
async def test_a_source_that_failed_goes_to_the_back(tmp_path: Path, other: Origin) -> None:
    wants = [other.add(Made(CHUNK, seed), f"{seed}.txt") for seed in range(5)]
    metrics = MountMetrics()
    dead = dead_url()
    async with running(tmp_path, [dead, other.url], metrics=metrics) as store:
        for want in wants:
            assert await read(store, want, 0, 10) == other.data(want, 0, 10)
    labels = {"source": dead.removeprefix("http://"), "reason": "unavailable"}
    failures = metrics.registry.get_sample_value("helios_mount_fetch_failures_total", labels)
    assert failures is not None
    assert failures < 10, "five recipes and five chunks would have been ten"


@pytest.mark.trio
async def test_a_stalled_source_ends_in_an_error(tmp_path: Path, origin: Origin) -> None:
    """Nothing hangs: a READ fails a while after the deadline; other files are not held up."""
    want = origin.add(Made(CHUNK), "stuck.txt")
    fine = origin.add(Made(CHUNK, 1), "fine.txt")
    origin.fault("stall", lambda r: want.sha256 in r.path, times=None, after=5000)
    async with running(tmp_path, [origin.url], roomy(request_deadline_s=0.8)) as store:
        started = trio.current_time()

        async def stuck() -> None:
            with pytest.raises(DeadlineExceeded, match=r"stuck\.txt at byte 0"):
                await read(store, want, 0, 10)

        async with trio.open_nursery() as readers:
            readers.start_soon(stuck)
            await trio.sleep(0.2)
            assert await read(store, fine, 0, 10) == origin.data(fine, 0, 10)
            assert trio.current_time() - started < 0.8
        assert 0.7 < trio.current_time() - started < 10


@pytest.mark.trio
async def test_a_read_ends_at_its_deadline_though_the_source_is_left_alone(tmp_path: Path, origin: Origin) -> None:
    """After several failures the source is in a pause that is longer than what is left of the deadline."""
    settings = msgspec.structs.replace(QUICK, request_deadline_s=3.5)
    want = origin.add(Made(2 * CHUNK), "data.txt")
    origin.fault("status", "/objects/", times=None)
    async with running(tmp_path, [origin.url], settings) as store:
        handle = await store.open(want)
        begin = trio.current_time()
        with pytest.raises(Unavailable):
            await handle.read(0, 10)
        assert 3.5 <= trio.current_time() - begin < 6, "the pauses alone would last until 6.2 s"
        await handle.close()


@pytest.mark.trio
async def test_a_trickle_is_a_stall(tmp_path: Path, origin: Origin) -> None:
    want = origin.add(Made(CHUNK), "data.txt")
    origin.throttle.rate = 100_000  # 40 s for the chunk
    async with running(tmp_path, [origin.url], roomy(request_deadline_s=1.2)) as store:
        with pytest.raises(DeadlineExceeded):
            await read(store, want, 0, 10)
        origin.throttle.rate = None
        assert await read(store, want, 0, 10) == origin.data(want, 0, 10)


@pytest.mark.trio
async def test_a_registry_that_is_away_for_a_moment(tmp_path: Path, origin: Origin) -> None:
    """A restart of the registry is not seen by readers; a longer absence is an error, not a hang."""
    want = origin.add(Made(2 * CHUNK), "data.txt")
    down = origin.fault("reset", "", times=None)
    async with running(tmp_path, [origin.url]) as store:

        async def back() -> None:
            await trio.sleep(1.0)
            down.times = 0

        async with trio.open_nursery() as nursery:
            nursery.start_soon(back)
            assert await read(store, want, 0, 10) == origin.data(want, 0, 10)
        await filled(store, want)
    async with running(tmp_path / "other", [dead_url()], roomy(request_deadline_s=0.5)) as store:
        with pytest.raises(Unavailable, match="can't be reached"):
            await read(store, want, 0, 10)
    async with running(tmp_path / "none", []) as store:
        with pytest.raises(Unavailable, match="no source"):
            await read(store, want, 0, 10)


@pytest.mark.trio
async def test_exit_does_not_wait_for_a_stalled_source(tmp_path: Path, origin: Origin) -> None:
    want = origin.add(Made(2 * CHUNK))
    origin.fault("stall", "/objects/", times=None)
    async with running(tmp_path, [origin.url], roomy()) as store:
        handle = await store.open(want)
        with trio.move_on_after(0.3):
            await handle.read(0, 10)
        started = trio.current_time()
    assert trio.current_time() - started < 5


# --- the disk ---


def mount_tmpfs(path: Path, mib: int) -> None:
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(path)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 24 MiB."""
    if os.getuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    path = tmp_path / "disk"
    mount_tmpfs(path, 24)
    yield path
    subprocess.run(["umount", str(path)], check=True)


async def walk(handle: BlobHandle, origin: Origin, size: int) -> None:
    """Read a blob from start to end in 128 KiB steps, as the kernel does."""
    for offset in range(0, size, 128 << 10):
        data = await handle.read(offset, 128 << 10)
        assert data == origin.data(handle._blob.want, offset, 128 << 10)


@pytest.mark.trio
async def test_a_full_disk_is_read_past(small_disk: Path, origin: Origin, caplog: pytest.LogCaptureFixture) -> None:
    """What can't be kept is still read, each chunk fetched about once; with room again the file is filled."""
    want = origin.add(Made(12 * CHUNK), "model.safetensors")
    async with running(small_disk, [origin.url]) as store:
        handle = await store.open(want)
        await walk(handle, origin, want.size)
        assert not [r for r in caplog.records if "can't be written" in r.message], "the last of the disk is left alone"
        assert sum("no room for a whole file" in r.message for r in caplog.records) == 1
        assert origin.sent() == want.size, "nothing is fetched more than once"
        assert store.usage().memory <= 32 * MIB
        before = origin.sent()
        await handle.read(want.size - 100, 100)
        await handle.read(want.size - 200, 100)
        assert origin.sent() == before, "the last chunk is still in memory"
        subprocess.run(["mount", "-o", "remount,size=100m", str(small_disk)], check=True)
        await filled(store, want)
        await walk(handle, origin, want.size)
        await handle.close()


@pytest.mark.trio
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
async def test_writes_that_fail(
    tmp_path: Path, origin: Origin, monkeypatch: pytest.MonkeyPatch, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    want = origin.add(Made(5 * CHUNK))
    write = LocalBlob.write
    broken = True

    def fail(self: LocalBlob, *args: object) -> None:
        if broken:
            raise OSError(number, os.strerror(number))
        write(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(LocalBlob, "write", fail)
    async with running(tmp_path, [origin.url]) as store:
        handle = await store.open(want)
        await walk(handle, origin, want.size)
        assert store.status(want.sha256).local_bytes == 0
        assert sum("can't be written" in r.message for r in caplog.records) == 1
        broken = False
        await filled(store, want)
        await walk(handle, origin, want.size)
        await handle.close()
        assert store.usage().memory <= 32 * MIB


@pytest.mark.trio
async def test_a_flush_that_fails_costs_a_fetch_not_a_byte(
    tmp_path: Path, origin: Origin, monkeypatch: pytest.MonkeyPatch, expected_log_errors: Expect
) -> None:
    """After a failed fdatasync nothing written since the last one is believed."""
    expected_log_errors("could not be flushed")
    want = origin.add(Made(4 * CHUNK), "data.txt")
    origin.throttle.rate = 12e6
    sync = LocalBlob.sync
    failed = []

    def fail(self: LocalBlob) -> None:
        if not failed:
            failed.append(1)
            os.pwrite(self.fd, b"\0" * CHUNK, 0)  # what a kernel that dropped the page would leave
            raise OSError(errno.EIO, "Input/output error")
        sync(self)

    monkeypatch.setattr(LocalBlob, "sync", fail)
    monkeypatch.setattr("heliosfs.fetch.settle.FLUSH_AGE_S", 0.3)
    async with running(tmp_path, [origin.url]) as store:
        handle = await store.open(want)
        await handle.read(0, 1)
        await filled(store, want)
        assert failed
        await walk(handle, origin, want.size)
        await handle.close()
    assert origin.sent() > want.size


@pytest.mark.trio
async def test_a_finish_that_fails_is_tried_again(
    tmp_path: Path, origin: Origin, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = origin.add(Made(CHUNK))
    finish = LocalBlob.finish
    tries = []

    def fail(self: LocalBlob) -> None:
        tries.append(1)
        if len(tries) < 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        finish(self)

    monkeypatch.setattr(LocalBlob, "finish", fail)
    monkeypatch.setattr("heliosfs.fetch.engine.DISK_PAUSE_S", 0.2)
    async with running(tmp_path, [origin.url]) as store:
        handle = await store.open(want)
        assert await handle.read(0, 10) == origin.data(want, 0, 10)
        await filled(store, want)
        await handle.close()
    assert origin.sent() == want.size


@pytest.mark.trio
async def test_a_chunk_that_cannot_be_read_back_is_fetched_again(
    tmp_path: Path, origin: Origin, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = origin.add(Made(3 * CHUNK), "data.txt")
    origin.throttle.rate = 10e6
    preadv = os.preadv
    bad = [2]

    def fail(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if bad[0] and offset == 1000:
            bad[0] -= 1
            raise OSError(errno.EIO, "Input/output error")
        return preadv(fd, buffers, offset, flags)

    monkeypatch.setattr("heliosfs.tiers.reading.os.preadv", fail)
    async with running(tmp_path, [origin.url]) as store:
        handle = await store.open(want)
        assert await handle.read(1000, 10) == origin.data(want, 1000, 10)
        await handle.close()
    assert bad == [0]
    assert sum(offset == 0 for offset, _ in origin.spans()) == 3


@pytest.mark.trio
async def test_a_flush_that_fails_at_the_end_is_not_believed_when_it_is_tried_again(
    tmp_path: Path, origin: Origin, monkeypatch: pytest.MonkeyPatch, expected_log_errors: Expect
) -> None:
    """The kernel says once that it lost what was written; the next fsync succeeds, and the data is on no disk."""
    expected_log_errors("the cache could not be flushed")
    want = origin.add(Made(100_000), "model.safetensors")
    sync, failures = os.fdatasync, [errno.EIO]

    def fails_once(fd: int) -> None:
        if failures:
            raise OSError(failures.pop(), "Input/output error")
        sync(fd)

    monkeypatch.setattr(os, "fdatasync", fails_once)
    async with running(tmp_path, [origin.url]) as store:
        handle = await store.open(want)
        await filled(store, want)
        assert await handle.read(0, want.size) == origin.data(want, 0, want.size)
        assert origin.sent() == 2 * want.size
        await handle.close()
