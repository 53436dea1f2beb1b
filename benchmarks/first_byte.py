"""First and last byte of a large file through the mount, over a slow link, before and while it is being filled.

A file of 2 GB is published; a real mount reads it from a real registry through a proxy that lets 50 MB/s pass over all
connections. Each round starts with an empty cache and times single bytes: the first, the last, and others all over the
file, one a second while the fill goes on. The yardstick beside it is the same byte asked of the registry with a bare
ranged request over an idle link.

    python -m benchmarks.first_byte [--gb 2] [--mbps 50] [--rounds 3] [--directory DIR]

Targets: the first and the last byte within 50 ms of the bare one, every one of them under a second.
"""

from __future__ import annotations

import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.common import options, save
from benchmarks.whole_path import HELIOS, helios
from helios.http.client import HttpClient
from helios.names import RepoId
from helios.registry_client import RegistryClient
from heliosfs.store.manifest import Manifest
from heliosfs.store.placement import Placement
from tests.support.origin import Made
from tests.support.slow_link import SlowLink

TARGET_S = 1.0
LATE_S = 0.05
REPO = RepoId.parse("bench/model")
NAME = "model.bin"


def publish(home: Path, work: Path, size: int) -> Made:
    """Make the file, without holding it in memory, and publish it."""
    content = Made(size)
    directory = work / "model"
    directory.mkdir()
    with (directory / NAME).open("wb") as file:
        for offset in range(0, size, 64 << 20):
            file.write(content.read(offset, min(64 << 20, size - offset)))
    helios(home, "push", str(directory), REPO.id)
    shutil.rmtree(directory)
    return content


def object_url(url: str) -> str:
    with closing(HttpClient(url)) as http:
        client = RegistryClient(http)
        at = client.resolve(REPO, "main")
        entry = Manifest.decode(client.manifest(REPO, at.commit), at.manifest).files[NAME]
        return Placement.decode(client.placement(REPO, entry.sha256)).objects[0].url


def bare_byte(url: str, path: str, offset: int) -> float:
    """Seconds for one byte with a bare request on a new connection."""
    start = time.perf_counter()
    with closing(HttpClient(url)) as http:
        with http.request("GET", path, headers={"range": f"bytes={offset}-{offset}"}) as response:
            response.read()
    return time.perf_counter() - start


def byte(fd: int, content: Made, offset: int) -> float:
    start = time.perf_counter()
    data = os.pread(fd, 1, offset)
    seconds = time.perf_counter() - start
    if data != content.read(offset, 1):
        raise SystemExit(f"byte {offset} is wrong")
    return seconds


def one_round(work: Path, link: SlowLink, content: Made, number: int) -> dict[str, Any]:
    home = work / f"mount-{number}"
    mnt = work / "mnt"
    environ = {**os.environ, "HELIOS_HOME": str(home), "HELIOS_REGISTRY__URLS": link.url}
    subprocess.run([HELIOS, "mount", str(mnt)], env=environ, check=True, stdout=subprocess.DEVNULL)
    try:
        size = content.size
        fd = os.open(mnt / REPO.id / "@main" / NAME, os.O_RDONLY)
        try:
            row: dict[str, Any] = {"first_s": byte(fd, content, 0), "last_s": byte(fd, content, size - 1)}
            rng = random.Random(number)
            passed, start = link.passed, time.perf_counter()
            during = []
            for _ in range(8):
                time.sleep(1.0)
                during.append(byte(fd, content, rng.randrange(size)))
            row["during_s"] = during
            row["link_mb_s"] = (link.passed - passed) / 1e6 / (time.perf_counter() - start)
        finally:
            os.close(fd)
    finally:
        subprocess.run([HELIOS, "umount", str(mnt)], env=environ, check=False)
    shutil.rmtree(home)
    return row


def run(gigabytes: float, rate: float, rounds: int, directory: Path) -> dict[str, Any]:
    work = Path(tempfile.mkdtemp(prefix="helios-byte-", dir=directory))
    home = work / "registry"
    environ = {**os.environ, "HELIOS_HOME": str(home)}
    registry = subprocess.Popen([HELIOS, "registry", "--port", "0"], env=environ, stdout=subprocess.PIPE)
    try:
        assert registry.stdout is not None
        url = registry.stdout.readline().decode().strip()
        content = publish(home, work, int(gigabytes * 1e9))
        parts = urlsplit(url)
        with SlowLink(parts.hostname or "", parts.port or 0, rate) as link:
            bare_s = statistics.median(bare_byte(link.url, object_url(url), content.size - 1) for _ in range(5))
            print(f"{'seconds':9}{'first':>8}{'last':>8}{'during: median':>16}{'worst':>8}{'link MB/s':>11}")
            print(f"{'bare':9}{'':8}{bare_s:8.3f}")
            measured = []
            for number in range(rounds):
                row = one_round(work, link, content, number)
                measured.append(row)
                edges, during = f"{row['first_s']:8.3f}{row['last_s']:8.3f}", row["during_s"]
                middle = f"{statistics.median(during):16.3f}{max(during):8.3f}"
                print(f"{number + 1:<9}{edges}{middle}{row['link_mb_s']:11.1f}", flush=True)
        worst = max(max(row["first_s"], row["last_s"], *row["during_s"]) for row in measured)
        edges = [max(row["first_s"], row["last_s"]) for row in measured]
        return {
            "benchmark": "first_byte",
            "bytes": content.size,
            "rate": rate,
            "bare_s": bare_s,
            "rounds": measured,
            "worst_s": worst,
            "late_s": statistics.median(edges) - bare_s,
            "time": int(time.time()),
        }
    finally:
        registry.terminate()
        registry.wait(60)
        shutil.rmtree(work, ignore_errors=True)


def main() -> None:
    parser = options("Time single bytes through the mount over a slow link.", gb=2, rounds=3, space="3x")
    parser.add_argument("--mbps", type=float, default=50.0, help="rate of the link in MB/s (50)")
    args = parser.parse_args()
    result = run(args.gb, args.mbps * 1e6, args.rounds, args.directory)
    out = save(result, args.json)
    late = f"the later edge {result['late_s'] * 1000:+.0f} ms to a bare byte (target {LATE_S * 1000:.0f} ms)"
    print(f"{late}, worst {result['worst_s']:.3f} s (target {TARGET_S} s); written to {out}", file=sys.stdout)


if __name__ == "__main__":
    main()
