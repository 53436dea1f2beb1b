"""Bare clients of a blob, each in a process of its own: the yardsticks of cold_link.py and cold_pull.py.

    python -m benchmarks.bare memory URL OBJECT SIZE CONNECTIONS     ranged GETs into memory: obstore, else http.client
    python -m benchmarks.bare kept URL OBJECT SIZE CONNECTIONS PATH  the same into a file, and its sha256 as it grows
    python -m benchmarks.bare stream URL OBJECT SIZE                 one GET into memory, as a Hub client reads
    python -m benchmarks.bare byte URL OBJECT OFFSET                 one byte on a new connection
    python -m benchmarks.bare disk URL BLOBREF PATH CONNECTIONS      fetch, BLAKE3, write (benchmarks/fill.py)
    python -m benchmarks.bare file PATH                              read a file, 4 MiB at a time, and BLAKE3 each

Each prints JSON: ``seconds``, ``cpu_s`` (user and system), ``client``.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from blake3 import blake3

from benchmarks.fill import RANGE, bare
from benchmarks.ingest import read_slabs
from helios.http.client import HttpClient
from helios.names import RepoId
from heliosfs.fetch.source import BlobRef


def client_name() -> str:
    """Which client ``memory`` uses here."""
    return "obstore" if find_spec("obstore") else "http.client"


def memory(url: str, target: str, size: int, connections: int) -> None:
    """Ranges of 16 MiB, so many at a time, each dropped when it is there."""
    starts = iter(range(0, size, RANGE))
    lock = threading.Lock()
    get = _obstore(url, target) if client_name() == "obstore" else _http(url, target)
    failed: list[BaseException] = []

    def work() -> None:
        try:
            while True:
                with lock:
                    start = next(starts, None)
                if start is None or failed:
                    return
                get(start, min(RANGE, size - start))
        except BaseException as error:
            failed.append(error)

    workers = [threading.Thread(target=work) for _ in range(connections)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failed:
        raise failed[0]


def kept(url: str, target: str, size: int, connections: int, path: Path) -> None:
    """Fetch, write, and sha256 in order, with what is there: what nobody who keeps verified bytes can do without."""
    starts = iter(range(0, size, RANGE))
    here: set[int] = set()
    changed = threading.Condition()
    get = _http(url, target)
    failed: list[BaseException] = []
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    os.ftruncate(fd, size)

    def work() -> None:
        try:
            while True:
                with changed:
                    start = next(starts, None)
                if start is None or failed:
                    return
                count = min(RANGE, size - start)
                os.pwrite(fd, get(start, count), start)
                with changed:
                    here.add(start)
                    changed.notify_all()
        except BaseException as error:
            failed.append(error)
            with changed:
                changed.notify_all()

    workers = [threading.Thread(target=work) for _ in range(connections)]
    for worker in workers:
        worker.start()
    digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 20))
    for start in range(0, size, RANGE):
        with changed:
            while start not in here and not failed:
                changed.wait()
        if failed:
            raise failed[0]
        for offset in range(start, min(start + RANGE, size), len(buffer)):
            digest.update(buffer[: os.preadv(fd, [buffer[: min(len(buffer), size - offset)]], offset)])
    for worker in workers:
        worker.join()
    os.close(fd)


def stream(url: str, target: str, size: int) -> None:
    """One GET from start to end."""
    buffer = memoryview(bytearray(1 << 20))
    with HttpClient(url, timeout_s=600).request("GET", target) as response:
        left = size
        while left:
            count = min(left, len(buffer))
            response.read_into(buffer[:count])
            left -= count


def _obstore(url: str, target: str) -> Callable[[int, int], object]:
    from obstore.store import HTTPStore

    store = HTTPStore.from_url(url, client_options={"allow_http": True})
    path = target.lstrip("/")

    def get(start: int, count: int) -> None:
        if len(store.get_range(path, start=start, length=count)) != count:
            raise SystemExit(f"the range at {start} was short")

    return get


def _http(url: str, target: str) -> Callable[[int, int], memoryview]:
    client = HttpClient(url)
    local = threading.local()

    def get(start: int, count: int) -> memoryview:
        if not hasattr(local, "buffer"):
            local.buffer = memoryview(bytearray(RANGE))
        headers = {"range": f"bytes={start}-{start + count - 1}"}
        with client.request("GET", target, headers=headers) as response:
            view: memoryview = local.buffer[:count]
            response.read_into(view)
        return view

    return get


def byte(url: str, target: str, offset: int) -> None:
    with HttpClient(url).request("GET", target, headers={"range": f"bytes={offset}-{offset}"}) as response:
        response.read()


def file(path: Path) -> None:
    for slab in read_slabs([path]):
        blake3(slab).digest()


def encode(want: BlobRef) -> str:
    """A blob's reference as one argument."""
    return json.dumps([want.repo.id, want.commit, want.path, want.sha256, want.size, want.recipe_digest])


def main() -> None:
    way, *rest = sys.argv[1:]
    if way == "disk":
        repo, *fields = json.loads(rest[1])
        want = BlobRef(RepoId.parse(repo), *fields)
    cpu, start = time.process_time(), time.perf_counter()
    if way == "memory":
        memory(rest[0], rest[1], int(rest[2]), int(rest[3]))
    elif way == "kept":
        kept(rest[0], rest[1], int(rest[2]), int(rest[3]), Path(rest[4]))
    elif way == "stream":
        stream(rest[0], rest[1], int(rest[2]))
    elif way == "byte":
        byte(rest[0], rest[1], int(rest[2]))
    elif way == "disk":
        bare(rest[0], want, Path(rest[2]), int(rest[3]))
    elif way == "file":
        file(Path(rest[0]))
    else:
        raise SystemExit(f"no such way: {way}")
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "cpu_s": time.process_time() - cpu, "client": client_name()}))


if __name__ == "__main__":
    main()
