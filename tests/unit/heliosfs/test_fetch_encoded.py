"""A registry as a source of encoded chunks: what readers get is the chunk, or an error that says which one is wrong."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing

import pytest
import trio
import zstandard

from helios.errors import DeadlineExceeded, IntegrityError
from helios.http.response import Watch
from heliosfs.fetch.decoding import DECODERS
from heliosfs.fetch.registry import RegistrySource
from heliosfs.fetch.source import BlobRef, CorruptChunk
from tests.support.origin import Origin
from tests.support.stores import read, running
from tests.support.weights import model, numbers

MIB = 1 << 20
DATA = model({"a": ("BF16", numbers("BF16", 4 * MIB, 1)), "b": ("BF16", numbers("BF16", 700_001, 2))})
CUTS = [4096, 70_000, 3 * MIB, 4 * MIB]


def cuts() -> list[int]:
    return [*CUTS, len(DATA) - sum(CUTS)]


@pytest.fixture
def source(origin: Origin) -> Iterator[RegistrySource]:
    with closing(RegistrySource(origin.url, timeout_s=2.0, connections=16)) as source:
        yield source


def fetch(source: RegistrySource, origin: Origin, want: BlobRef, *, urgent: bool = False) -> bytes:
    out = bytearray()
    buffer = memoryview(bytearray(4 * MIB))
    recipe = origin.recipe(want)

    def deliver(index: int, data: memoryview) -> None:
        assert recipe.span(index) == (len(out), len(out) + len(data))
        out.extend(data)

    source.fetch(want, recipe, range(len(recipe)), buffer, deliver, 5.0, urgent=urgent, watch=Watch())
    return bytes(out)


@pytest.mark.parametrize("name", ["planes2-zstd", "planes4-zstd"])
def test_chunks_are_decoded_as_they_come(origin: Origin, source: RegistrySource, name: str) -> None:
    want = origin.add(DATA, cuts=cuts())
    origin.encode(want, name)
    assert fetch(source, origin, want) == DATA
    assert origin.sent() < 0.72 * len(DATA), "fewer bytes travel"
    assert len(origin.spans()) == 1


def test_what_is_urgent_comes_in_pieces_over_a_long_link(origin: Origin, source: RegistrySource) -> None:
    origin.delay_s = 0.01
    want = origin.add(DATA, cuts=cuts())
    origin.encode(want, "planes2-zstd")
    source.warm()
    assert fetch(source, origin, want, urgent=True) == DATA
    assert len(origin.spans()) > len(CUTS)


@pytest.mark.trio
async def test_a_store_reads_and_fills_from_them(origin: Origin, tmp_path: object) -> None:
    want = origin.add(DATA, cuts=cuts())
    origin.encode(want, "planes2-zstd")
    async with running(tmp_path, [origin.url]) as store:  # type: ignore[arg-type]
        assert await read(store, want, 5_000_000, 100_000) == DATA[5_000_000:5_100_000]
        with trio.fail_after(20):
            while not store.status(want.sha256).complete:
                await trio.sleep(0.02)
        assert await read(store, want, 0, len(DATA)) == DATA


def bomb(size: int) -> bytes:
    return zstandard.ZstdCompressor(level=1).compress(bytes(size))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (bomb(64 * MIB), "says that it has 67108864 bytes"),
        (bomb(3 * MIB), "corrupt|hash"),
        (b"no frame", "can't be decoded"),
    ],
    ids=["bomb", "another chunk", "no frame"],
)
def test_a_hostile_registry_costs_an_error_that_names_the_chunk(
    origin: Origin, source: RegistrySource, wrong: bytes, message: str
) -> None:
    want = origin.add(DATA, cuts=cuts())
    origin.encode(want, "planes2-zstd", lambda index, data: wrong if index == 2 else data)
    recipe, got = origin.recipe(want), []

    def deliver(index: int, data: memoryview) -> None:
        got.append(index)
        if data != DATA[slice(*recipe.span(index))]:
            raise CorruptChunk(index, "it has another hash")

    with pytest.raises(CorruptChunk, match=message) as caught:
        source.fetch(
            want,
            recipe,
            range(5),
            memoryview(bytearray(4 * MIB)),
            deliver,
            5.0,
            urgent=False,
            watch=Watch(),
        )
    assert caught.value.chunk == 2
    assert got[:2] == [0, 1]


def test_lengths_that_are_none_are_refused_before_anything_is_read(origin: Origin, source: RegistrySource) -> None:
    want = origin.add(DATA, cuts=cuts())
    origin.encode(want, "planes2-zstd", lambda index, data: data + bytes(4 * MIB) if index == 2 else data)
    with pytest.raises(IntegrityError, match="can't be stored in"):
        fetch(source, origin, want)
    assert origin.count("/objects/") == 0


def test_only_a_few_are_decoded_at_a_time_and_none_waits_for_ever(origin: Origin, source: RegistrySource) -> None:
    want = origin.add(DATA, cuts=cuts())
    origin.encode(want, "planes2-zstd")
    recipe, hold, most = origin.recipe(want), threading.Event(), [0, 0]
    lock = threading.Lock()

    def deliver(_index: int, _data: memoryview) -> None:
        with lock:
            most[0] += 1
            most[1] = max(most)
        hold.wait(10)
        with lock:
            most[0] -= 1

    def run(errors: list[BaseException]) -> None:
        try:
            buffer = memoryview(bytearray(4 * MIB))
            source.fetch(want, recipe, range(1), buffer, deliver, 0.5, urgent=False, watch=Watch())
        except BaseException as error:
            errors.append(error)

    errors: list[BaseException] = []
    threads = [threading.Thread(target=run, args=(errors,)) for _ in range(DECODERS + 2)]
    for thread in threads:
        thread.start()
    until = time.monotonic() + 10
    while len(errors) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    hold.set()
    for thread in threads:
        thread.join(10)
    assert most == [0, DECODERS]
    assert [type(error) for error in errors] == [DeadlineExceeded] * 2
