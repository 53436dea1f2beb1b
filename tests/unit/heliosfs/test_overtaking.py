"""One slow or dead source never delays a file that another one can serve: real servers on loopback that misbehave."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import trio

from helios.errors import Unavailable
from helios.http.client import HttpClient
from helios.http.response import Watch
from helios.metrics import MountMetrics
from heliosfs.blobs import BlobHandle, BlobRef
from tests.support.origin import Made, Origin, Request
from tests.support.stores import filled, read, roomy, running

MIB = 1 << 20
CHUNK = 4 * MIB
PATIENT = roomy(request_deadline_s=60.0)
"""The deadline comes much later than a test may take."""

SOON_S = 20.0
"""What a busy machine may take for what should be done in a second or two."""


@contextmanager
def origins(count: int, size: int, name: str = "model.safetensors") -> Iterator[tuple[list[Origin], BlobRef]]:
    """Origins that all serve one blob."""
    with ExitStack() as stack:
        made = [stack.enter_context(Origin()) for _ in range(count)]
        wants = [origin.add(Made(size), name) for origin in made]
        yield made, wants[0]


def overtaken(metrics: MountMetrics, origin: Origin, reason: str) -> float:
    labels = {"source": origin.url.removeprefix("http://"), "reason": reason}
    return metrics.registry.get_sample_value("helios_mount_fetch_failures_total", labels) or 0.0


async def walk(handle: BlobHandle, origin: Origin, want: BlobRef) -> None:
    """Read all of it in the order of a loader, and look at every byte."""
    for offset in range(0, want.size, MIB):
        assert await handle.read(offset, MIB) == origin.data(want, offset, MIB)


@pytest.mark.trio
async def test_one_stalls_one_trickles_one_resets(tmp_path: Path) -> None:
    """Of four sources three are bad, each in its way, and they are the preferred ones."""
    metrics = MountMetrics()
    with origins(4, 24 * MIB) as ((stalls, trickles, resets, good), want):
        stalls.fault("stall", times=None, after=100_000)
        trickles.throttle.rate = 50_000
        resets.fault("reset", times=None, after=200_000)
        urls = [stalls.url, trickles.url, resets.url, good.url]
        async with running(tmp_path, urls, PATIENT, metrics) as store:
            with trio.fail_after(SOON_S):
                handle = await store.open(want)
                await walk(handle, good, want)
                await filled(store, want)
                await handle.close()
    assert overtaken(metrics, stalls, "silent") > 0


@pytest.mark.trio
async def test_a_trickle_is_left(tmp_path: Path) -> None:
    """It never stops, but another source is far faster."""
    metrics = MountMetrics()
    with origins(2, 12 * MIB) as ((trickles, good), want):
        trickles.throttle.rate = 300_000
        async with running(tmp_path, [trickles.url, good.url], PATIENT, metrics) as store:
            with trio.fail_after(SOON_S):
                assert await read(store, want, 0, 100) == good.data(want, 0, 100)
                await filled(store, want)
    assert overtaken(metrics, trickles, "slow") > 0


@pytest.mark.trio
@pytest.mark.parametrize("where", ["/recipe", "/placements"])
async def test_a_small_call_that_stalls_is_asked_elsewhere(tmp_path: Path, where: str) -> None:
    with origins(2, CHUNK, "data.txt") as ((stalls, good), want):
        stalls.fault("stall", where, times=None)
        async with running(tmp_path, [stalls.url, good.url], PATIENT) as store:
            with trio.fail_after(SOON_S):
                assert await read(store, want, 10, 100) == good.data(want, 10, 100)


@pytest.mark.trio
async def test_a_source_that_never_takes_a_connection(tmp_path: Path) -> None:
    """A full backlog: connecting neither fails nor succeeds."""
    with origins(1, 8 * MIB) as ((good,), want), socket.create_server(("127.0.0.1", 0), backlog=0) as deaf:
        port = deaf.getsockname()[1]
        fillers = []
        for _ in range(4):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
            fillers.append(filler)
        async with running(tmp_path, [f"http://127.0.0.1:{port}", good.url], PATIENT) as store:
            with trio.fail_after(SOON_S):
                assert await read(store, want, 0, 100) == good.data(want, 0, 100)
                await filled(store, want)
        for filler in fillers:
            filler.close()


@pytest.mark.trio
async def test_one_stuck_connection_of_the_only_source(tmp_path: Path) -> None:
    """Others of the same source get on: what the stuck one was to bring is asked for once more."""
    metrics = MountMetrics()
    with origins(1, 400 * MIB) as ((origin,), want):
        origin.throttle.rate = 25e6
        origin.fault("stall", first_object_request(), after=100_000)
        async with running(tmp_path, [origin.url], PATIENT, metrics) as store:
            with trio.fail_after(SOON_S):
                assert await read(store, want, 0, 100) == origin.data(want, 0, 100)
    assert overtaken(metrics, origin, "stuck") == 1


def first_object_request() -> Callable[[Request], bool]:
    return lambda request: request.span is not None and request.span[0] == 0


@pytest.mark.trio
async def test_a_source_that_recovers_is_used_again(tmp_path: Path) -> None:
    """It comes first again once it is well: it was the preferred one for a reason."""
    with origins(2, CHUNK, "0.txt") as ((preferred, other), first):
        stall = preferred.fault("stall", times=None)
        async with running(tmp_path, [preferred.url, other.url], PATIENT) as store:
            with trio.fail_after(SOON_S):
                assert await read(store, first, 0, 10) == other.data(first, 0, 10)
            stall.times = 0
            with trio.fail_after(SOON_S):
                for number in range(1, 100):
                    want = preferred.add(Made(1000, number), f"{number}.txt")
                    other.add(Made(1000, number), f"{number}.txt")
                    before = preferred.sent()
                    assert await read(store, want, 0, 10) == preferred.data(want, 0, 10)
                    if preferred.sent() > before:
                        break
                    await trio.sleep(0.2)
            assert preferred.sent() > before


@pytest.mark.trio
async def test_what_nobody_waits_for_is_not_fetched_twice(tmp_path: Path) -> None:
    """The only source is slow, not dead: there is nobody to overtake it, and every byte is asked for once."""
    with origins(1, 6 * MIB) as ((origin,), want):
        origin.throttle.rate = 2e6
        async with running(tmp_path, [origin.url], PATIENT) as store:
            assert await read(store, want, want.size - 10, 10) == origin.data(want, want.size - 10, 10)
            await filled(store, want)
        assert origin.sent() == want.size


@pytest.mark.trio
async def test_a_given_up_transfer_holds_nothing(tmp_path: Path) -> None:
    """A stalled source's threads end once it was overtaken and the bytes came from elsewhere."""
    with origins(2, 40 * MIB) as ((stalls, good), want):
        stalls.fault("stall", times=None, after=1000)
        async with running(tmp_path, [stalls.url, good.url], PATIENT) as store:
            with trio.fail_after(SOON_S):
                handle = await store.open(want)
                await walk(handle, good, want)
                pool = store._engine._buffers
                while pool.free < pool.count:
                    await trio.sleep(0.05)
                await handle.close()


def test_the_watch_ends_a_call_that_waits() -> None:

    with origins(1, CHUNK) as ((origin,), want):
        origin.fault("stall", after=5000)
        watch, started = Watch(), time.monotonic()
        timer = threading.Timer(0.3, watch.cut)
        timer.start()
        client = HttpClient(origin.url)
        path = f"/api/v1/objects/public/blobs/{want.sha256}"
        with pytest.raises(Unavailable):
            with client.request("GET", path, headers={"range": "bytes=0-99999"}, timeout_s=50, watch=watch) as response:
                response.read()
        assert watch.received == 5000
        assert time.monotonic() - started < SOON_S
        with pytest.raises(Unavailable):
            client.request("GET", path, headers={"range": "bytes=0-9"}, watch=watch)
        timer.join()
        client.close()
