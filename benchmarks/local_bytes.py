"""A file that the registry holds, as Hub clients download it, beside nginx sending the same file from the same disk.

The file is published to a real registry with a directory store; nginx serves the very object it is kept in (sendfile,
a worker for each core). Each round downloads it from both, by the same clients, in turn:

- ``1 stream``: one GET of the whole file over one connection;
- ``16 streams``: as many connections at once, each the whole file;
- ``small``: 64 KiB ranges at random places over 16 kept-alive connections, which is what the requests themselves cost.

The clients throw the bytes away after reading them into memory. CPU seconds per GB are of the server alone; the file is
in the page cache. With the registry's answer comes everything that the Hub's protocol asks for: names are resolved and
access is checked for each request.

    python -m benchmarks.local_bytes [--gb 1] [--rounds 3] [--directory DIR]

Target: >= 0.8x of nginx with one and with 16 streams.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.common import ROOT, BackedMemory, options, random_file, save, together
from benchmarks.nginx import nginx
from benchmarks.plots import draw
from benchmarks.scene import cpu_s, helios, registry, registry_pid, stoppable
from helios.home import Home
from helios.http.client import HttpClient

NAME = "model.bin"
TARGETS = {"1 stream": 0.8, "16 streams": 0.8}
STREAMS = 16
SMALL, ASKED = 64 << 10, 200
"""Bytes of a small range, and how many of them each connection asks for."""
NGINX = """
    location = /readyz {{ return 200 "ok"; }}
    location = /{name} {{ alias {path}; }}
"""


# --- the clients, in a process of their own --------------------------------------------------------------------------


def get(connection: socket.socket, host: str, target: str, buffer: memoryview, extra: str = "") -> int:
    """One request on a kept-alive connection; the body is read and forgotten. Returns its bytes."""
    connection.sendall(f"GET {target} HTTP/1.1\r\nHost: {host}\r\n{extra}\r\n".encode())
    count = connection.recv_into(buffer)
    while (end := bytes(buffer[:count]).find(b"\r\n\r\n")) < 0:
        more = connection.recv_into(buffer[count:])
        if not more:
            raise SystemExit("the connection ended inside a head")
        count += more
    head = bytes(buffer[:end]).decode("latin-1").lower()
    if head.split(" ", 2)[1] not in ("200", "206"):
        raise SystemExit(f"answered: {head}")
    length = int(head.partition("content-length:")[2].split("\r\n", 1)[0])
    left = length - (count - end - 4)
    while left:
        got = connection.recv_into(buffer[: min(left, len(buffer))])
        if not got:
            raise SystemExit(f"the connection ended {left} bytes early")
        left -= got
    return length


def whole(url: str, size: int) -> None:
    where = urlsplit(url)
    with socket.create_connection((where.hostname, where.port), 60) as connection:
        if get(connection, where.netloc, where.path, memoryview(bytearray(1 << 20))) != size:
            raise SystemExit("the file has another size")


def small(url: str, size: int, seed: int) -> None:
    where, places = urlsplit(url), random.Random(seed)
    buffer = memoryview(bytearray(SMALL + 8192))
    with socket.create_connection((where.hostname, where.port), 60) as connection:
        for _ in range(ASKED):
            start = places.randrange(0, max(1, size - SMALL))
            wanted = min(SMALL, size - start)
            extra = f"Range: bytes={start}-{start + wanted - 1}\r\n"
            if get(connection, where.netloc, where.path, buffer, extra) != wanted:
                raise SystemExit("a range has another size")


def heads(url: str, count: int) -> float:
    """The median of the seconds that a HEAD takes, on one connection."""
    times = []
    with closing(HttpClient(url)) as client:
        for _ in range(count):
            start = time.perf_counter()
            with client.request("HEAD", "") as response:
                response.read()
            times.append(time.perf_counter() - start)
            if response.status != 200:
                raise SystemExit(f"{url}: status {response.status}")
    return statistics.median(times)


def client(way: str, url: str, size: int) -> None:
    """Print the seconds that one way of asking took; ``size`` is the file's, or how many HEADs there are."""
    if way == "heads":
        print(json.dumps(heads(url, size)))
        return
    ways: dict[str, list[Callable[[], None]]] = {
        "1 stream": [partial(whole, url, size)],
        "16 streams": [partial(whole, url, size)] * STREAMS,
        "small": [partial(small, url, size, number) for number in range(STREAMS)],
    }
    print(json.dumps(together(ways[way])))


def ask_from(way: str, url: str, size: int) -> float:
    """``client`` in a process of its own; returns what it printed."""
    command = [sys.executable, "-m", "benchmarks.local_bytes", "--client", way, url, str(size)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True, timeout=600)
    return float(json.loads(done.stdout))


# --- one run ---------------------------------------------------------------------------------------------------------


def moved(way: str, size: int) -> int:
    """Bytes that one way of downloading moves."""
    return {"1 stream": size, "16 streams": STREAMS * size, "small": STREAMS * ASKED * min(SMALL, size)}[way]


def measure(way: str, url: str, size: int, pids: list[int]) -> dict[str, float]:
    before = sum(map(cpu_s, pids))
    return {"seconds": ask_from(way, url, size), "cpu_s": sum(map(cpu_s, pids)) - before}


def processes(parent: int) -> list[int]:
    """A process and its children, where the workers of nginx are."""
    found = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [parent, *map(int, found)]


def run(gigabytes: float, rounds: int, directory: Path) -> dict[str, Any]:
    work = Path(tempfile.mkdtemp(prefix="helios-bytes-", dir=directory))
    memory = BackedMemory(directory)
    try:
        home, size = Home(work / "home"), int(gigabytes * 1e9)
        model = work / "model"
        model.mkdir()
        random_file(model / NAME, size)
        rows: list[dict[str, Any]] = []
        print(f"{'':12}{'nginx GB/s':>12}{'registry':>10}{'ratio':>7}{'nginx cpu s/GB':>16}{'registry':>10}")
        cores = os.cpu_count() or 1
        with ExitStack() as stack:
            ours = stack.enter_context(registry(home))
            helios(home, "push", model, "bench/model")
            shutil.rmtree(model)
            (stored,) = (path for path in (home.store / "public" / "blobs").rglob("*") if path.is_file())
            theirs = stack.enter_context(nginx(work, NGINX.format(name=NAME, path=stored), workers=cores))
            near = f"{ours}/bench/model/resolve/main/{NAME}", [registry_pid(home)]
            far = f"{theirs}/{NAME}", processes(int((work / "nginx.pid").read_text()))
            memory.fill()
            for _ in range(rounds):
                for way in ("1 stream", "16 streams", "small"):
                    row: dict[str, Any] = {"way": way, "bytes": moved(way, size)}
                    for name, (url, pids) in (("nginx", far), ("registry", near)):
                        row[name] = measure(way, url, size, pids)
                    row["ratio"] = row["nginx"]["seconds"] / row["registry"]["seconds"]
                    rows.append(row)
                    show(row)
        median = {
            way: statistics.median(row["ratio"] for row in rows if row["way"] == way)
            for way in dict.fromkeys(row["way"] for row in rows)
        }
        return {
            "benchmark": "local_bytes",
            "bytes": size,
            "cores": cores,
            "rounds": rows,
            "median": median,
            "time": int(time.time()),
        }
    finally:
        memory.close()
        shutil.rmtree(work, ignore_errors=True)


def show(row: dict[str, Any]) -> None:
    gb, nginx_, ours = row["bytes"] / 1e9, row["nginx"], row["registry"]
    rates = f"{gb / nginx_['seconds']:12.2f}{gb / ours['seconds']:10.2f}{row['ratio']:7.2f}"
    print(f"{row['way']:12}{rates}{nginx_['cpu_s'] / gb:16.3f}{ours['cpu_s'] / gb:10.3f}", flush=True)


def bars_of(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    rates: dict[str, dict[str, list[float]]] = {}
    for row in result["rounds"]:
        for name in ("nginx", "registry"):
            rates.setdefault(row["way"], {}).setdefault(name, []).append(row["bytes"] / 1e9 / row[name]["seconds"])
    return {way: {name: statistics.median(found) for name, found in each.items()} for way, each in rates.items()}


def main() -> None:
    parser = options("Measure downloads of a stored file beside nginx.", gb=1, rounds=3, space="2x")
    parser.add_argument("--client", nargs=3, metavar=("WAY", "URL", "BYTES"), help="for this benchmark itself")
    args = parser.parse_args()
    if args.client:
        way, url, size = args.client
        client(way, url, int(size))
        return
    with stoppable():
        result = run(args.gb, args.rounds, args.directory.resolve())
    out = save(result, args.json)
    draw(out, "A stored file, downloaded", "GB/s", bars_of(result))
    for way, ratio in result["median"].items():
        print(f"{way}: {ratio:.2f}x of nginx" + (f" (target {TARGETS[way]}x)" if way in TARGETS else ""))
    print(f"written to {out}")


if __name__ == "__main__":
    main()
