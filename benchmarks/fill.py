"""Cold fill of one blob into L1 beside a bare client, on loopback, unshaped.

The yardstick is what no verified fill can do without: a bare ranged client (the same blocking client, 16 MiB ranges, as
many threads as the store has connections for its background) that hashes each chunk with BLAKE3 and writes it to the
same disk. Both read from the same origin, a process of its own that uses sendfile; rounds alternate and start with
what was written before flushed and removed. ``read`` is a second number of the store: one reader from start to end,
1 MiB at a time, while the blob fills.

    python -m benchmarks.fill [--gb 1] [--rounds 5] [--directory DIR]

Target: >= 0.8x of the bare client; CPU seconds per GB are printed for both.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import trio
from blake3 import blake3

from benchmarks.common import BackedMemory, options, save
from helios.config import MountSettings
from helios.http.client import HttpClient
from helios.metrics import MountMetrics, rss_bytes
from helios.names import RepoId
from heliosfs.blobs import BlobRef, open_store
from heliosfs.fetch.registry import RegistrySource
from heliosfs.store.placement import Placement
from heliosfs.store.recipe import Recipe

RANGE = 16 << 20
CHUNK = 4 << 20
TARGET = 0.8


@contextmanager
def origin(*args: str) -> Iterator[tuple[str, BlobRef]]:
    """tests/support/origin.py in a process of its own: its URL and its blob."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.origin", *args],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[1],
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        said = json.loads(process.stdout.readline())
        fields = [said[name] for name in ("commit", "path", "sha256", "size", "recipe_digest")]
        yield said["url"], BlobRef(RepoId.parse(said["repo"]), *fields)
    finally:
        process.stdin.close()
        process.wait(30)


def bare(url: str, want: BlobRef, path: Path, threads: int) -> None:
    """Fetch, hash, write: nothing else. For a blob of one object that is cut plainly: every range is whole chunks."""
    source = RegistrySource(url, timeout_s=30, connections=threads)
    recipe = Recipe.decode(source.recipe(want, 30), want.recipe_digest)
    client = HttpClient(url)
    params = {"repo": str(want.repo), "blob": want.sha256}
    placement = Placement.decode(client.bytes("GET", "/api/v1/placements", params=params))
    target = placement.objects[0].url
    out = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    os.ftruncate(out, want.size)
    starts = iter(range(0, want.size, RANGE))
    lock = threading.Lock()

    def work() -> None:
        buffer = memoryview(mmap.mmap(-1, CHUNK))
        while True:
            with lock:
                start = next(starts, None)
            if start is None:
                return
            stop = min(start + RANGE, want.size)
            with client.request("GET", target, headers={"range": f"bytes={start}-{stop - 1}"}) as response:
                for index in recipe.covering(start, stop - start):
                    low, high = recipe.span(index)
                    view = buffer[: high - low]
                    response.read_into(view)
                    if blake3(view).digest() != recipe.id(index):
                        raise SystemExit(f"chunk {index} is wrong")
                    os.pwrite(out, view, low)

    failed: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:  # a thread's own SystemExit would be lost
            failed.append(error)

    workers = [threading.Thread(target=guarded) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    client.close()
    os.close(out)
    if failed:
        raise failed[0]


def fill(url: str, want: BlobRef, cache: Path, *, read: bool) -> float:
    """Let a store fetch the blob, or read it through a handle; returns the seconds until the last byte was there."""
    store = open_store(cache, [url], MountSettings(), MountMetrics())
    seconds = 0.0

    async def go() -> None:
        nonlocal seconds
        async with trio.open_nursery() as nursery:
            await nursery.start(store.run)
            start = time.perf_counter()
            handle = await store.open(want)
            if read:
                buffer = memoryview(bytearray(1 << 20))
                offset = 0
                while count := await handle.read_into(offset, buffer):
                    offset += count
            while store.status(want.sha256).local_bytes < want.size:  # noqa: ASYNC110
                await trio.sleep(0.002)
            seconds = time.perf_counter() - start
            await handle.close()
            nursery.cancel_scope.cancel()

    trio.run(go)
    store.close()
    return seconds


def timed(call: Callable[[], float | None]) -> tuple[float, float]:
    """Wall (the call's own figure, if it has one) and CPU seconds."""
    start, cpu = time.perf_counter(), time.process_time()
    own = call()
    wall = time.perf_counter() - start
    return wall if own is None else own, time.process_time() - cpu


def one_round(url: str, want: BlobRef, work: Path, threads: int, memory: BackedMemory) -> dict[str, float]:
    row: dict[str, float] = {}
    ways: list[tuple[str, Callable[[], float | None]]] = [
        ("bare", lambda: bare(url, want, work / "bare", threads)),
        ("fill", lambda: fill(url, want, work / "fill", read=False)),
        ("read", lambda: fill(url, want, work / "read", read=True)),
    ]
    for name, call in ways:
        os.sync()
        memory.fill()
        row[f"{name}_s"], row[f"{name}_cpu_s"] = timed(call)
        os.sync()
        target = work / name
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    row["rss_bytes"] = rss_bytes()
    return row


def show(title: str, row: dict[str, float], size: int) -> None:
    cells = [
        f"{size / 1e9 / row[f'{name}_s']:8.2f}{row[f'{name}_cpu_s'] / (size / 1e9):8.2f}"
        for name in ("bare", "fill", "read")
    ]
    print(
        f"{title:9}{''.join(cells)}{row['bare_s'] / row['fill_s']:10.2f}{row['bare_s'] / row['read_s']:10.2f}",
        flush=True,
    )


def run(gigabytes: float, rounds: int, directory: Path) -> dict[str, Any]:
    work = Path(tempfile.mkdtemp(prefix="helios-fill-", dir=directory))
    memory, settings = BackedMemory(directory), MountSettings()
    threads = settings.connections
    try:
        content = work / "content"
        with content.open("wb") as file:
            for _ in range(int(gigabytes * 1e9) // CHUNK):
                file.write(os.urandom(CHUNK))
        with origin("--file", str(content)) as (url, want):
            print(
                f"{'':9}{'bare GB/s, cpu s/GB':>16}{'fill':>13}{'':>3}{'read':>13}{'':>3}{'fill x':>10}{'read x':>10}"
            )
            measured = []
            for number in range(rounds):
                measured.append(one_round(url, want, work, threads, memory))
                show(f"round {number + 1}", measured[-1], want.size)
        median = {key: statistics.median(row[key] for row in measured) for key in measured[0]}
        median["ratio"] = statistics.median(row["bare_s"] / row["fill_s"] for row in measured)
        show("median", median, want.size)
        return {"benchmark": "fill", "bytes": want.size, "rounds": measured, "median": median, "time": int(time.time())}
    finally:
        memory.close()
        shutil.rmtree(work, ignore_errors=True)


def main() -> None:
    parser = options("Measure a cold fill beside a bare client that hashes and writes.", gb=1, rounds=5, space="3x")
    args = parser.parse_args()
    result = run(args.gb, args.rounds, args.directory)
    out = save(result, args.json)
    print(f"fill {result['median']['ratio']:.2f}x of the bare client (target {TARGET}x); written to {out}")


if __name__ == "__main__":
    main()
