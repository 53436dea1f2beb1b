"""The blob store against a real origin on loopback: right bytes, one fetch a chunk, READs first, nothing lost."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import trio

from helios.errors import Conflict, IntegrityError
from helios.metrics import MountMetrics
from heliosfs.blobs import BlobRef, open_store
from heliosfs.store.chunking import LARGE, cut_plain
from tests.support.origin import Made, Origin
from tests.support.stores import QUICK, filled, read, roomy, running, until

MIB = 1 << 20
CHUNK = 4 * MIB


def bytes_of(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


@pytest.mark.trio
@pytest.mark.parametrize("spread", [0, 1, 3])
async def test_reads_give_the_right_bytes(tmp_path: Path, origin: Origin, spread: int) -> None:
    """Wherever chunks are cut and lie, before, while and after the blob is filled."""
    rng = random.Random(spread)
    cuts = [rng.choice([1, 700, 100_000, MIB, CHUNK]) for _ in range(25)]
    data = bytes_of(sum(cuts))
    want = origin.add(data, "weights.bin", cuts=cuts, spread=spread)
    async with running(tmp_path, [origin.url]) as store:
        handle = await store.open(want)
        edges = [0, len(data), *(sum(cuts[:i]) for i in range(len(cuts)))]

        async def check(seed: int) -> None:
            own = random.Random(seed)
            for _ in range(12):
                offset = max(0, own.choice(edges) + own.randrange(-5, 5))
                size = own.choice([1, 4096, 128 << 10, MIB, 9 * MIB])
                assert await handle.read(offset, size) == data[offset : offset + size]

        async with trio.open_nursery() as readers:
            for seed in range(4):
                readers.start_soon(check, seed)
        await filled(store, want)
        await check(99)
        assert (await handle.read(0, len(data) + 5)) == data
        fd = handle.local_fd()
        assert fd is not None
        assert os.pread(fd, 100, 1000) == data[1000:1100]
        await handle.close()
    assert origin.sent() == len(data), "every byte came once"


@pytest.mark.trio
async def test_empty_and_tiny_blobs(tmp_path: Path, origin: Origin) -> None:
    empty, tiny = origin.add(b"", "empty.txt"), origin.add(b"{}", "config.json")
    async with running(tmp_path, [origin.url]) as store:
        assert await read(store, empty, 0, 100) == b""
        assert store.status(empty.sha256).complete
        assert store.usage().tiers["l1"].blobs == 0, "there is nothing to keep"
        assert await read(store, tiny, 0, 4096) == b"{}"
        assert await read(store, tiny, 2, 4096) == b""
        assert await read(store, tiny, 1, 1) == b"}"
        await filled(store, tiny)
        assert store.status(tiny.sha256).xattrs() == {"tier": "l1", "progress": "1.0000", "verified": "true"}
    assert origin.count("/recipe") == 1, "nothing is asked about an empty blob"


@pytest.mark.trio
async def test_open_fetches_nothing_but_a_weight_file_fills(tmp_path: Path, origin: Origin) -> None:
    text = origin.add(bytes_of(MIB, 1), "tokenizer.json")
    weights = origin.add(bytes_of(9 * MIB, 2), "model-00001-of-00002.safetensors")
    async with running(tmp_path, [origin.url]) as store:
        handle = await store.open(text)
        await trio.sleep(0.2)
        await handle.close()
        assert origin.requests == []
        assert store.status(text.sha256).tier == "remote"
        handle = await store.open(weights)
        await filled(store, weights)
        await handle.close()
    assert origin.sent() == 9 * MIB


@pytest.mark.trio
async def test_the_commit_of_an_open_file_is_in_use_until_it_is_whole_or_closed(tmp_path: Path, origin: Origin) -> None:
    small, weights = origin.add(bytes_of(MIB, 1), "tokenizer.json"), origin.add(bytes_of(MIB, 2), "model.safetensors")
    async with running(tmp_path / "cache", [origin.url]) as store:
        assert store.in_use() == set()
        handle = await store.open(small)
        assert store.in_use() == {(str(small.repo), small.commit)}
        await handle.close()
        assert store.in_use() == set()
        handle = await store.open(weights)
        await filled(store, weights)
        assert store.in_use() == set()
        await handle.close()


@pytest.mark.trio
async def test_what_was_fetched_is_there_after_a_restart(tmp_path: Path, origin: Origin) -> None:
    data = bytes_of(10 * MIB)
    want = origin.add(data)
    async with running(tmp_path, [origin.url]) as store:
        assert await read(store, want, 0, 10) == data[:10]
        await filled(store, want)
        assert store.usage().tiers["l1"].blobs == 1
    asked = len(origin.requests)
    async with running(tmp_path, ["http://127.0.0.1:1"]) as store:
        assert store.status(want.sha256).complete
        assert await read(store, want, 0, len(data)) == data
    assert len(origin.requests) == asked


@pytest.mark.trio
async def test_a_partial_blob_goes_on_where_it_was(tmp_path: Path, origin: Origin) -> None:
    """Ended in the middle of a fill, the store keeps what it has, recipe included."""
    want = origin.add(Made(40 * MIB))
    origin.throttle.rate = 30e6
    async with running(tmp_path, [origin.url]) as store:
        handle = await store.open(want)
        await until(lambda: store.status(want.sha256).local_bytes >= 12 * MIB)
        await handle.close()
    origin.throttle.rate = None
    before = await trio.to_thread.run_sync(origin.settled)
    async with running(tmp_path, [origin.url]) as store:
        status = store.status(want.sha256)
        assert status.tier == "partial"
        assert not status.verified
        assert status.size == want.size
        assert await read(store, want, 39 * MIB, MIB) == origin.data(want, 39 * MIB, MIB)
        await filled(store, want)
        assert origin.sent() - before == want.size - status.local_bytes
    assert origin.count("/recipe") == 1


@pytest.mark.trio
@pytest.mark.parametrize("path", ["data.txt", "model.gguf"])
async def test_the_edges_of_a_large_file_come_before_4_mib_do(tmp_path: Path, origin: Origin, path: str) -> None:
    """Over a slow link, whether the first READ is the first to ask or the fill has begun with it already."""
    want = origin.add(Made(LARGE + 300_000), path, cuts=cut_plain(LARGE + 300_000))
    origin.throttle.rate = 1.5e6
    async with running(tmp_path, [origin.url]) as store:
        handle = await store.open(want)
        assert await handle.read(0, 100) == origin.data(want, 0, 100)
        assert origin.sent() < CHUNK
        before = origin.sent()
        assert await handle.read(want.size - 100, 100) == origin.data(want, want.size - 100, 100)
        assert origin.sent() - before < CHUNK
        origin.throttle.rate = None
        await filled(store, want)
        assert await handle.read(0, want.size) == origin.data(want, 0, want.size)
        await handle.close()


@pytest.mark.trio
async def test_readers_of_one_chunk_share_one_fetch(tmp_path: Path, origin: Origin) -> None:
    want = origin.add(Made(3 * CHUNK), "data.txt")
    origin.throttle.rate = 20e6
    async with running(tmp_path, [origin.url]) as store:
        handles = [await store.open(want) for _ in range(32)]

        async def one(number: int) -> None:
            offset = CHUNK + 1000 * number
            assert await handles[number].read(offset, 1000) == origin.data(want, offset, 1000)

        async with trio.open_nursery() as readers:
            for number in range(32):
                readers.start_soon(one, number)
        assert origin.count("/recipe") == origin.count("/placements") == 1
        assert sum(offset <= CHUNK < offset + length for offset, length in origin.spans()) == 1
        for handle in handles:
            await handle.close()
        await filled(store, want)
    assert origin.sent() == want.size


@pytest.mark.trio
async def test_first_and_last_byte_do_not_wait_for_the_fill(tmp_path: Path) -> None:
    """On a slow link a READ waits for its own chunk and for the little that was under way, wherever it reads."""
    with Origin(rate=25e6) as origin:
        want = origin.add(Made(200 * MIB))
        async with running(tmp_path, [origin.url], roomy()) as store:
            handle = await store.open(want)
            allowed = CHUNK + 8 * MIB + 0.25 * 25e6  # its chunk, the smallest background there is, the budget
            for offset in (0, want.size - 1, want.size // 2, 1, want.size // 3):
                before = origin.sent()
                assert await handle.read(offset, 1) == origin.data(want, offset, 1)
                assert origin.sent() - before < allowed
                await trio.sleep(0.3)  # the background goes on and fills the link again
                assert not store.status(want.sha256).complete
            assert store.usage().in_flight > 0, "it was being filled all the time"
            await handle.close()


@pytest.mark.trio
async def test_the_background_keeps_ahead_of_the_reader(tmp_path: Path) -> None:
    with Origin(rate=40e6) as origin:
        want = origin.add(Made(120 * MIB))
        async with running(tmp_path, [origin.url]) as store:
            handle = await store.open(want)
            await handle.read(60 * MIB, 1)
            await until(lambda: origin.sent() >= 30 * MIB)
            await handle.close()
        after = [offset for offset, _ in origin.spans() if offset > 60 * MIB]
        assert len(after) >= len(origin.spans()) - 3, "but for the start of the fill, what follows the reader"


@pytest.mark.trio
async def test_queued_blobs_follow_in_order(tmp_path: Path, origin: Origin) -> None:
    wants = [origin.add(Made(9 * MIB, seed), f"model-{seed}.safetensors") for seed in range(4)]
    origin.throttle.rate = 60e6
    async with running(tmp_path, [origin.url]) as store:
        handle = await store.open(wants[0])
        store.prefetch([wants[2], wants[1], wants[3], wants[2]])
        for want in wants:
            await filled(store, want)
        await handle.close()
        assert store.usage().queued == 0
        await until(lambda: store.usage().filling == 0)
    asked = [r.query["blob"] for r in origin.requests if r.path == "/api/v1/recipe"]
    assert asked == [wants[i].sha256 for i in (0, 2, 1, 3)]


@pytest.mark.trio
async def test_a_reader_that_goes_away_takes_nothing_from_others(tmp_path: Path, origin: Origin) -> None:
    want = origin.add(Made(2 * CHUNK), "data.txt")
    origin.throttle.rate = 10e6
    async with running(tmp_path, [origin.url]) as store:
        one, other = await store.open(want), await store.open(want)
        got: list[bytes] = []

        async def stay() -> None:
            got.append(bytes(await other.read(100, 1000)))

        async with trio.open_nursery() as readers:
            readers.start_soon(stay)
            with trio.move_on_after(0.1) as gone:
                await one.read(0, 1000)
            assert gone.cancelled_caught
            await one.close()
        assert got == [origin.data(want, 100, 1000)]
        assert sum(offset == 0 for offset, _ in origin.spans()) == 1
        await other.close()


@pytest.mark.trio
async def test_a_fill_goes_on_after_the_last_close_and_lets_go_in_the_end(tmp_path: Path, origin: Origin) -> None:
    wants = [origin.add(Made(6 * MIB, seed), f"{seed}.bin") for seed in range(24)]
    descriptors = len(os.listdir("/proc/self/fd"))
    async with running(tmp_path, [origin.url]) as store:
        for want in wants:
            assert await read(store, want, 5 * MIB, 10) == origin.data(want, 5 * MIB, 10)
        for want in wants:
            await filled(store, want)
        await until(lambda: not store.usage().filling)
        assert store.usage().tiers["l1"].blobs == 24
    await until(lambda: len(os.listdir("/proc/self/fd")) <= descriptors)  # the origin's side of connections, too
    assert origin.sent() == 24 * 6 * MIB


@pytest.mark.trio
async def test_many_readers_opening_and_closing(tmp_path: Path, origin: Origin) -> None:
    """Handles come and go while blobs are filled and finished; every read is right and nothing is fetched twice."""
    wants = [
        origin.add(bytes_of(3 * MIB + seed, seed), f"{seed}.bin", cuts=[MIB, MIB, MIB, seed][: 4 if seed else 3])
        for seed in range(6)
    ]
    origin.throttle.rate = 80e6
    async with running(tmp_path, [origin.url]) as store:

        async def visitor(seed: int) -> None:
            rng = random.Random(seed)
            for _ in range(25):
                want = rng.choice(wants)
                handle = await store.open(want)
                for _ in range(rng.randrange(3)):
                    offset, size = rng.randrange(want.size), rng.randrange(300_000)
                    assert await handle.read(offset, size) == origin.data(want, offset, size)
                await handle.close()

        async with trio.open_nursery() as visitors:
            for seed in range(16):
                visitors.start_soon(visitor, seed)
        for want in wants:
            await filled(store, want)
    assert origin.sent() == sum(want.size for want in wants)


@pytest.mark.trio
async def test_what_is_counted(tmp_path: Path, origin: Origin) -> None:
    want = origin.add(Made(2 * CHUNK), "data.txt")
    metrics = MountMetrics()

    def value(name: str, **labels: str) -> float:
        return metrics.registry.get_sample_value(f"helios_mount_{name}", labels) or 0.0

    async with running(tmp_path, [origin.url], metrics=metrics) as store:
        handle = await store.open(want)
        await handle.read(0, 1000)
        assert value("read_bytes_total", tier="remote") == 1000
        await filled(store, want)
        await handle.read(0, 500)
        assert value("read_bytes_total", tier="l1") == 500
        assert value("fetched_bytes_total", source=origin.url.removeprefix("http://")) == want.size
        await handle.close()
        await until(lambda: value("fills") == 0)


@pytest.mark.trio
async def test_one_store_owns_a_cache(tmp_path: Path) -> None:
    async with running(tmp_path, []):
        with pytest.raises(Conflict, match="in use by process"):
            open_store(tmp_path, [], QUICK, MountMetrics())


@pytest.mark.trio
async def test_two_sizes_for_one_blob_are_refused(tmp_path: Path, origin: Origin) -> None:
    want = origin.add(b"abc", "a.txt")
    lie = BlobRef(want.repo, want.commit, "b.txt", want.sha256, 5, want.recipe_digest)
    async with running(tmp_path, [origin.url]) as store:
        liar = await store.open(lie)
        handle = await store.open(want)
        assert await handle.read(0, 9) == b"abc"
        with pytest.raises(IntegrityError, match=r"the recipe of b\.txt is one of another blob"):
            await liar.read(0, 9)
        await until(lambda: store.status(want.sha256).complete)
        await liar.close()
        with pytest.raises(IntegrityError, match=r"b\.txt: its manifest gives .* 5 bytes, and it has 3"):
            await store.open(lie)
        assert await handle.read(0, 9) == b"abc"
        await handle.close()
        await until(lambda: not store.usage().filling)
        with pytest.raises(IntegrityError, match=r"its manifest gives"):
            await read(store, lie, 0, 9)
        assert await read(store, want, 0, 9) == b"abc"
