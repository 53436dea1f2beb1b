"""Cold reads from another machine's registry through the mount, beside bare clients, over shaped links.

A model is published to a registry whose objects nginx serves (sendfile, from the store's own files; it passes the rest
on to the registry). Registry and nginx are in one network namespace, mount and bare clients in another; the link
between them is held at 2 and at 4 Gbit/s with 20 ms of round trip (benchmarks/shaped.py), and left alone for the last
rows. Each round starts with an empty cache:

- ``first``, ``last``: seconds to open the file and read byte 0, and then the last byte while the fill goes on; beside
  one byte asked of nginx on a new connection;
- ``read``: one reader from start to end, 1 MiB at a time; beside a bare ranged client into memory (obstore where it is
  installed, else http.client; 16 MiB ranges, as many connections as the mount begins with). Unshaped, beside a bare
  client that hashes and writes to the same disk (benchmarks/fill.py);
- ``store``: the same reader on the machine of the store, whose object the cache links and verifies in place, not in the
  page cache before; beside reading the file directly and hashing it.

CPU seconds per GB are of the client alone: the mount's processes and the reader, or the bare client.

    python -m benchmarks.cold_link [--gb 1] [--rounds 3] [--gbit 2 4] [--latency-ms 20] [--directory DIR]

Needs root, nginx (Debian: nginx-light), iproute2, util-linux. Targets: first and last byte within the bare byte + 50
ms; >= 0.9x of the bare client over a shaped link; >= 0.8x of bare client + BLAKE3 + write unshaped.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from benchmarks.bare import encode
from benchmarks.common import ROOT, BackedMemory, options, save
from benchmarks.fill import CHUNK
from benchmarks.ingest import drop_cache
from benchmarks.nginx import nginx
from benchmarks.plots import draw
from benchmarks.readers import read_together
from benchmarks.scene import cpu_since, helios, mount_cpu, mounted, registry, stoppable
from benchmarks.shaped import shaped
from helios.config import MountSettings
from helios.home import Home
from helios.http.client import HttpClient
from helios.names import RepoId
from helios.registry_client import RegistryClient
from heliosfs.fetch.source import BlobRef
from heliosfs.store.manifest import Manifest
from heliosfs.store.placement import Placement

REPO = RepoId.parse("bench/model")
NAME = "model.bin"
"""A weight file: opening it starts the fill. It is cut plainly, as the bare client of fill.py expects."""
PORT = 8080
CONNECTIONS = MountSettings().connections
TARGETS = {"shaped": 0.9, "unshaped": 0.8, "byte_s": 0.05}

NGINX = """
    location /api/v1/objects/ {{ alias {store}/; }}
    location / {{ proxy_pass {registry}; proxy_http_version 1.1; proxy_set_header Connection ""; }}
"""
"""In front of a registry, serving its store's objects itself."""


def make_file(directory: Path, size: int) -> int:
    """Random bytes: not safetensors, so that they are cut plainly. Returns how many there are."""
    directory.mkdir()
    with (directory / NAME).open("wb") as file:
        for _ in range(size // CHUNK):
            file.write(os.urandom(CHUNK))
        return file.tell()


def published(url: str) -> tuple[BlobRef, str]:
    """The published blob, and the path of its object."""
    with closing(HttpClient(url)) as http:
        client = RegistryClient(http)
        at = client.resolve(REPO, "main")
        ((path, entry),) = Manifest.decode(client.manifest(REPO, at.commit), at.manifest).files.items()
        (stored,) = Placement.decode(client.placement(REPO, entry.sha256)).objects
        return BlobRef(REPO, at.commit, path, entry.sha256, entry.size, entry.recipe), stored.url


def bare(within: Sequence[str], *args: object) -> dict[str, Any]:
    """A bare client in a process of its own (benchmarks/bare.py)."""
    command = [*within, sys.executable, "-m", "benchmarks.bare", *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True, timeout=600)
    out: dict[str, Any] = json.loads(done.stdout)
    return out


def first_bytes(home: Home, mnt: Path, url: str, within: Sequence[str], want: BlobRef) -> dict[str, float]:
    """Seconds to open and read byte 0, and to the last byte then."""
    with mounted(home, mnt, urls=url, within=within):
        path = mnt / REPO.id / "@main" / want.path
        path.stat()
        start = time.perf_counter()
        fd = os.open(path, os.O_RDONLY)
        try:
            os.pread(fd, 1, 0)
            first = time.perf_counter() - start
            start = time.perf_counter()
            os.pread(fd, 1, want.size - 1)
            last = time.perf_counter() - start
        finally:
            os.close(fd)
    shutil.rmtree(home.root)
    return {"first_s": first, "last_s": last}


def read_cold(home: Home, mnt: Path, url: str, within: Sequence[str], want: BlobRef) -> dict[str, float]:
    """Seconds and CPU seconds of one reader of the whole file, through a mount that has nothing of it."""
    with mounted(home, mnt, urls=url, within=within) as mount:
        path = mnt / REPO.id / "@main" / want.path
        path.stat()
        before = mount_cpu(mount)
        reading = read_together("seq", path, want.size, 1)
        cpu = cpu_since(mount, before) + reading.cpu_s
    return {"read_s": reading.seconds, "read_cpu_s": cpu}


def over(
    mbit: float | None, latency_ms: float, work: Path, home: Home, rounds: int, memory: BackedMemory
) -> list[dict[str, Any]]:
    """All rounds over one link; None: unshaped."""
    name = "unshaped" if mbit is None else f"{mbit / 1000:g} Gbit/s"
    rows = []
    with shaped(mbit, latency_ms if mbit else 0) as link, registry(home, link.server) as behind:
        locations = NGINX.format(store=home.store, registry=behind)
        with nginx(work, locations, address=link.address, port=PORT, within=link.server) as url:
            described = subprocess.run(
                [*link.server, sys.executable, "-m", "benchmarks.cold_link", "--describe", behind],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                check=True,
                timeout=60,
            )
            (repo, *fields), target = json.loads(described.stdout)
            want = BlobRef(RepoId.parse(repo), *fields)
            for number in range(rounds):
                os.sync()
                memory.fill()
                if mbit is None:
                    yardstick = bare(link.client, "disk", url, encode(want), work / "bare", CONNECTIONS)
                    (work / "bare").unlink()
                    os.sync()
                    memory.fill()
                else:
                    yardstick = bare(link.client, "memory", url, target, want.size, CONNECTIONS)
                one = Home(work / f"cold-{number}")
                row: dict[str, Any] = {"link": name, "bare_s": yardstick["seconds"], "bare_cpu_s": yardstick["cpu_s"]}
                row |= {"client": "http.client + BLAKE3 + write" if mbit is None else yardstick["client"]}
                row |= read_cold(one, work / "mnt", url, link.client, want)
                shutil.rmtree(one.root)
                row["bare_byte_s"] = bare(link.client, "byte", url, target, want.size - 1)["seconds"]
                row |= first_bytes(one, work / "mnt", url, link.client, want)
                row["ratio"] = row["bare_s"] / row["read_s"]
                rows.append(row)
                show(row, want.size)
    return rows


def beside_store(work: Path, home: Home, rounds: int, memory: BackedMemory) -> list[dict[str, Any]]:
    """The embedded registry's directory store: the cache links its object."""
    rows = []
    (stored,) = [path for path in (home.store / "public" / "blobs").rglob("*") if path.is_file()]
    for _ in range(rounds):
        memory.fill()
        drop_cache([stored])
        yardstick = bare((), "file", stored)
        drop_cache([stored])
        with mounted(home, work / "mnt") as mount:
            path = next((mount.path / REPO.id / "@main").iterdir())
            before = mount_cpu(mount)
            reading = read_together("seq", path, stored.stat().st_size, 1)
            cpu = cpu_since(mount, before) + reading.cpu_s
        shutil.rmtree(home.cache)
        row = {
            "link": "store",
            "client": "file + BLAKE3",
            "bare_s": yardstick["seconds"],
            "bare_cpu_s": yardstick["cpu_s"],
            "read_s": reading.seconds,
            "read_cpu_s": cpu,
            "ratio": yardstick["seconds"] / reading.seconds,
        }
        rows.append(row)
        show(row, stored.stat().st_size)
    return rows


HEADER = (
    f"{'link':11}{'bare GB/s':>10}{'mount':>8}{'ratio':>7}{'bare cpu s/GB':>15}{'mount':>7}"
    f"{'bare byte ms':>14}{'first':>7}{'last':>7}"
)


def show(row: dict[str, Any], size: int) -> None:
    gb = size / 1e9
    rates = f"{gb / row['bare_s']:10.2f}{gb / row['read_s']:8.2f}{row['ratio']:7.2f}"
    cpu = f"{row['bare_cpu_s'] / gb:15.2f}{row['read_cpu_s'] / gb:7.2f}"
    edges = ""
    if "first_s" in row:
        edges = f"{row['bare_byte_s'] * 1000:14.0f}{row['first_s'] * 1000:7.0f}{row['last_s'] * 1000:7.0f}"
    print(f"{row['link']:11}{rates}{cpu}{edges}", flush=True)


def medians(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Per link, of every number; ``late_s``: how much later than the bare byte the worse of the two came."""
    for row in rows:
        if "first_s" in row:
            row["late_s"] = max(row["first_s"], row["last_s"]) - row["bare_byte_s"]
    out = {}
    for link in dict.fromkeys(row["link"] for row in rows):
        mine = [row for row in rows if row["link"] == link]
        numbers = [key for key, value in mine[0].items() if not isinstance(value, str)]
        out[link] = {key: statistics.median(row[key] for row in mine) for key in numbers}
    return out


def run(gigabytes: float, rounds: int, gbits: list[float], latency_ms: float, directory: Path) -> dict[str, Any]:
    """All measurements; everything made is removed."""
    work = Path(tempfile.mkdtemp(prefix="helios-link-", dir=directory))
    memory, home = BackedMemory(directory), Home(work / "home")
    try:
        print(f"making {gigabytes:g} GB under {work}", file=sys.stderr)
        size = make_file(work / "model", int(gigabytes * 1e9))
        with registry(home):
            helios(home, "push", work / "model", REPO.id)
            shutil.rmtree(work / "model")
        print(HEADER)
        rows: list[dict[str, Any]] = []
        for mbit in [*(gbit * 1000 for gbit in gbits), None]:
            rows += over(mbit, latency_ms, work, home, rounds, memory)
        rows += beside_store(work, home, rounds, memory)
        return {
            "benchmark": "cold_link",
            "bytes": size,
            "latency_ms": latency_ms,
            "rounds": rows,
            "median": medians(rows),
            "time": int(time.time()),
        }
    finally:
        memory.close()
        shutil.rmtree(work, ignore_errors=True)


def describe(url: str) -> None:
    """Print the blob and its object's path, asked where the registry is near."""
    want, target = published(url)
    print(json.dumps([json.loads(encode(want)), target]))


def main() -> None:
    parser = options("Measure cold reads over shaped links beside bare clients.", gb=1, rounds=3, space="3x")
    parser.add_argument("--gbit", type=float, nargs="*", default=[2, 4], help="rates of the shaped links (2 4)")
    parser.add_argument("--latency-ms", type=float, default=20, help="round trip of the shaped links (20)")
    parser.add_argument("--describe", help="print what a registry has, for this benchmark itself")
    args = parser.parse_args()
    if args.describe:
        describe(args.describe)
        return
    if os.geteuid() != 0:
        parser.error("network namespaces need root")
    for program, package in (("nginx", "nginx-light"), ("tc", "iproute2"), ("nsenter", "util-linux")):
        if shutil.which(program) is None:
            parser.error(f"{program} is missing: apt install {package}")
    with stoppable():
        result = run(args.gb, args.rounds, args.gbit, args.latency_ms, args.directory.resolve())
    out = save(result, args.json)
    gb = result["bytes"] / 1e9
    groups = {name: {"bare": gb / row["bare_s"], "mount": gb / row["read_s"]} for name, row in result["median"].items()}
    draw(out, "Cold sequential read", "GB/s", groups)
    for name, row in result["median"].items():
        late = f", edges {row['late_s'] * 1000:+.0f} ms to a bare byte" if "late_s" in row else ""
        print(f"{name}: {row['ratio']:.2f}x{late}")
    print(f"targets: shaped {TARGETS['shaped']}x, unshaped {TARGETS['unshaped']}x, bytes +50 ms; written to {out}")


if __name__ == "__main__":
    main()
