"""Filling that somebody waits for, and filling that is stopped: what warming and draining are made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import trio

from helios.errors import Conflict, EntryNotFound, IntegrityError, NoSpace
from heliosfs.blobs import BlobRef
from heliosfs.control.warm import WarmWork
from heliosfs.fetch.fill import MAX_CLOSED
from heliosfs.store.manifest import FileEntry
from heliosfs.tiers.directory import TierDirectory
from heliosfs.tree.snapshot import Snapshot
from heliosfs.warming import LARGE, Note, Tally, in_loading_order, select, warm
from tests.support.accounts import settled
from tests.support.origin import Made, Origin
from tests.support.stores import QUICK, filled, read, running, until

MIB = 1 << 20
CHUNK = 4 * MIB
Expect = Callable[[str], None]
pytestmark = pytest.mark.trio


async def test_fill_returns_when_the_blob_is_whole_and_tells_how_far_it_is(tmp_path: Path, origin: Origin) -> None:
    want, told = origin.add(Made(3 * CHUNK + 5), "model.txt"), []
    origin.throttle.rate = 40e6
    async with running(tmp_path, [origin.url]) as store:
        await store.fill(want, told.append)
        assert store.status(want.sha256).complete
        assert told == sorted(told)
        assert told[0] < want.size
        await store.fill(want)
        await store.fill(origin.add(b"", "empty"))
    assert origin.sent() == want.size


async def test_what_was_queued_may_be_taken_back_at_any_moment(tmp_path: Path, origin: Origin) -> None:
    wants = [origin.add(Made(MIB, seed), f"{seed}.bin") for seed in range(4)]
    async with running(tmp_path, [origin.url]) as store:
        store.prefetch(wants[:1])
        store.drop_queued(wants[:1])  # its turn came in the same moment
        store.prefetch(wants)
        async with trio.open_nursery() as nursery:
            for want in wants:
                nursery.start_soon(store.fill, want)
        assert all(store.status(want.sha256).complete for want in wants)


async def test_a_fill_that_has_to_wait_as_its_last_handle_goes(tmp_path: Path, origin: Origin) -> None:
    """More fills than may go on unopened: the first of them is put back, and that is the one that is closed now."""
    wants = [origin.add(Made(2 * MIB, seed), f"{seed}.bin") for seed in range(2 * MAX_CLOSED)]
    origin.throttle.rate = 1e6
    async with running(tmp_path, [origin.url]) as store:
        handles = {want.path: await store.open(want) for want in wants}
        await until(lambda: store.usage().filling == len(wants))
        waiting = [blob.want.path for blob in store._filler._filling if not blob.users]
        for path in [*waiting[1 : MAX_CLOSED + 1], waiting[0]]:
            await handles.pop(path).close()
        assert store.usage().filling == len(wants) - 1
        assert store.usage().queued == 1
        origin.throttle.rate = None
        for handle in handles.values():
            await handle.close()
        for want in wants:
            await filled(store, want)


async def test_a_queued_fill_that_ends_while_it_waits_for_room_is_forgotten(
    tmp_path: Path, origin: Origin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the store stops: the thread that removes is the last to say something, and the blob is closed by then."""
    kept, want = (dataclasses.replace(origin.add(Made(9 * MIB, n), f"{n}.bin"), commit=f"{n:040x}") for n in (1, 2))
    at_it, go_on, remove = trio.Event(), trio.Event(), TierDirectory.remove

    def slow(self: TierDirectory, sha256: str) -> int:
        trio.from_thread.run_sync(at_it.set)
        trio.from_thread.run(go_on.wait)
        return remove(self, sha256)

    monkeypatch.setattr(TierDirectory, "remove", slow)
    settings = msgspec.structs.replace(QUICK, cache_limit_gib=12 / 1024)
    async with running(tmp_path, [origin.url], settings) as store:
        await read(store, kept, 0, kept.size)
        await filled(store, kept)
        await settled(store)
        for _ in range(9):
            store.room.history.use(want.sha256)  # it is worth more
        store._filler.enqueue([want])
        async with trio.open_nursery() as nursery:
            store._filler.advance(nursery, trio.current_time())
            with trio.fail_after(20):
                await at_it.wait()
            assert store.room.waits(want.sha256)
            nursery.cancel_scope.cancel()
        assert not store._blobs
        go_on.set()
        await settled(store)
        assert not store.room.l1.policy.entries


async def test_fill_says_that_there_is_no_room(tmp_path: Path, origin: Origin) -> None:
    settings = msgspec.structs.replace(QUICK, cache_limit_gib=8 / 1024)
    want = origin.add(Made(9 * MIB), "large.bin")
    async with running(tmp_path, [origin.url], settings) as store:
        with pytest.raises(NoSpace, match=r"no room for large.bin \(9437184 bytes\): it does not fit"):
            await store.fill(want)
        assert store.room.l1.policy.reserved == 0
        await until(lambda: not store._blobs)


async def test_fill_says_that_no_source_has_it_right(
    tmp_path: Path, origin: Origin, expected_log_errors: Expect
) -> None:
    expected_log_errors("a chunk is corrupt")
    want = origin.add(Made(2 * CHUNK), "model.bin")
    origin.fault("corrupt", lambda request: "/objects/" in request.path, times=None, after=5)
    async with running(tmp_path, [origin.url]) as store:
        with trio.fail_after(30), pytest.raises(IntegrityError, match=r"no source has all of it right"):
            await store.fill(want)


async def test_a_fill_that_nobody_waits_for_any_more_ends_unless_others_want_it(tmp_path: Path, origin: Origin) -> None:
    want = origin.add(Made(20 * CHUNK), "model.txt")
    origin.throttle.rate = 20e6
    async with running(tmp_path, [origin.url]) as store:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.fill, want)
            await until(lambda: store.status(want.sha256).local_bytes)
            nursery.cancel_scope.cancel()
        await until(lambda: store.usage().filling == 0)
        origin.throttle.rate = None
        await until(lambda: not store._blobs)
        assert not store.status(want.sha256).complete
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.fill, want)
            await until(lambda: store._blobs)
            handle = await store.open(want)
            nursery.cancel_scope.cancel()
        await filled(store, want) if store.usage().filling else await store.fill(want)
        await handle.close()


async def test_halted_it_fills_nothing_keeps_what_it_has_and_answers_reads(tmp_path: Path, origin: Origin) -> None:
    first, second, third = (origin.add(Made(4 * CHUNK, seed), f"{seed}.safetensors") for seed in (1, 2, 3))
    origin.throttle.rate = 10e6
    async with running(tmp_path, [origin.url]) as store:
        handle = await store.open(first)
        await until(lambda: store.status(first.sha256).local_bytes >= CHUNK)
        store.prefetch([second])
        store.halt()
        assert store.pending().fills == 0
        await until(lambda: store.pending().nothing)
        journalled = store.room.l1.directory.held(first.sha256)[0]
        assert journalled == store.status(first.sha256).local_bytes >= CHUNK, "what is here is safe"
        origin.throttle.rate = None
        sent = origin.sent()
        assert await handle.read(3 * CHUNK, 100) == origin.data(first, 3 * CHUNK, 100)
        with pytest.raises(Conflict, match="being drained"):
            await store.fill(third)
        again = await store.open(third)
        await again.close()
        await trio.sleep(1.5)  # housekeeping came by
        assert origin.sent() - sent <= 2 * CHUNK
        await until(lambda: store.pending().nothing)
        store.resume()
        await filled(store, first)
        await filled(store, second)
        await handle.close()


async def test_what_was_warmed_is_in_loading_order_and_room_is_asked_for_the_whole_model(
    tmp_path: Path, origin: Origin
) -> None:
    """A model that does not fit pushes nothing out, though its files are filled one by one."""
    settings = msgspec.structs.replace(QUICK, cache_limit_gib=20 / 1024)
    kept = dataclasses.replace(origin.add(Made(9 * MIB, 99), "kept.bin"), commit="d" * 40)
    wants = [origin.add(Made(8 * MIB, seed), f"{seed}.bin") for seed in (1, 2, 3)]
    async with running(tmp_path, [origin.url], settings) as store:
        await read(store, kept, 0, kept.size)
        await filled(store, kept)
        tally, refused = Tally(wants), []

        async def fetch(want: BlobRef, note: Note) -> bool:
            try:
                await store.fill(want, note)
            except NoSpace:
                refused.append(want.path)
                return False
            return True

        await warm(tally, fetch, store.prefetch)
        assert store.status(kept.sha256).complete
        assert len(refused) == 2
        assert (tally.files_done, tally.bytes_done) == (1, 8 * MIB)


@dataclasses.dataclass(frozen=True)
class Sized:
    path: str
    size: int


async def test_small_files_come_first_and_weights_in_loading_order() -> None:
    sizes = {"b.safetensors": LARGE, "a.safetensors": LARGE, "config.json": 2, "big.txt": LARGE, "z.bin": 5}
    files = [Sized(path, sizes[path]) for path in in_loading_order(sizes)]
    begun, announced = [], []

    async def fetch(file: Sized, note: Note) -> bool:
        begun.append(file.path)
        note(1)
        await trio.lowlevel.checkpoint()
        return True

    tally = Tally(files)
    await warm(tally, fetch, lambda large: announced.extend(file.path for file in large))
    assert begun == ["config.json", "z.bin", "big.txt", "a.safetensors", "b.safetensors"]
    assert announced == begun[2:]
    now = tally.now()
    assert (now.files_done, now.bytes_done, now.path) == (5, sum(sizes.values()), "")


def commit_of(*wants: BlobRef) -> Snapshot:
    files = {want.path: FileEntry(want.sha256, want.size, "0" * 40, want.recipe_digest) for want in wants}
    return Snapshot(wants[0].repo, wants[0].commit, 0, files)


async def test_a_warm_bears_sources_that_fail_for_a_while_and_names_what_it_could_not_have(
    tmp_path: Path, origin: Origin, expected_log_errors: Expect
) -> None:
    expected_log_errors("a chunk is corrupt")
    good, bad = origin.add(Made(5 * MIB, 1), "good.bin"), origin.add(Made(5 * MIB, 2), "bad.bin")
    small = origin.add(b"{}", "config.json")
    origin.fault("status", lambda request: "/recipe" in request.path, times=4)
    origin.fault("corrupt", lambda request: bad.sha256 in request.path, times=None, after=5)
    async with running(tmp_path, [origin.url]) as store:
        work = WarmWork(store, commit_of(good, bad, small), "main", [])
        with trio.fail_after(60):
            await work.run()
        shown = work.shown()
        assert work.failed
        assert list(shown["errors"]) == ["bad.bin"]
        assert "no source has all of it right" in shown["errors"]["bad.bin"]
        assert (shown["files"], shown["files_done"], shown["bytes_done"]) == (3, 2, good.size + 2)
        assert store.status(good.sha256).complete
        again = WarmWork(store, commit_of(good, small), "main", ["*.json", "good.bin"])
        await again.run()
        assert not again.failed
        assert again.shown()["found_bytes"] == good.size + 2
        with pytest.raises(EntryNotFound, match=r"has no file '\*.txt'"):
            WarmWork(store, commit_of(good), "main", ["*.txt"])


async def test_patterns_choose_files_and_one_that_names_nothing_is_an_error() -> None:
    def missing(path: str) -> None:
        raise EntryNotFound(path)

    files = {"a.bin", "b.bin", "[x].txt"}
    assert select(files, ["*.bin", "[x].txt"], missing) == files
    with pytest.raises(EntryNotFound, match="c"):
        select(files, ["a.bin", "c*"], missing)
