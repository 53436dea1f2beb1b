"""A cold model through a registry that fetches it from its upstream meanwhile, beside bare clients of that upstream.

nginx plays the upstream Hub: it answers what a repository holds, and serves its one file with sendfile. Each round has
a registry with an empty home, and one client that reads the file from it in one GET, as Hub clients do:

- over a link of 2 Gbit/s with 20 ms of round trip (benchmarks/shaped.py; registry and client on this side), beside a
  bare ranged client into memory (obstore where it is installed, else http.client; 16 MiB ranges);
- on loopback, unshaped, beside a bare ranged client that does what nobody who keeps verified bytes can do without: it
  writes them to the same disk and hashes them with sha256 as they come. The registry does more: it also hashes every
  chunk with BLAKE3, writes the object, and flushes it to the disk before the last bytes leave.

``head`` is what a cold HEAD takes beside the upstream's own answer about the repository; on each a repository that
the registry has never heard of. CPU seconds per GB are of the registry, or of the bare client.

    python -m benchmarks.cold_pull [--gb 1] [--rounds 3] [--gbit 2] [--latency-ms 20] [--directory DIR]

Needs nginx (Debian: nginx-light), and for the shaped link root, iproute2 and util-linux. Targets: >= 0.8x of the bare
client; a cold HEAD within 100 ms of the upstream's answer.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.cold_link import bare
from benchmarks.common import ROOT, BackedMemory, options, save
from benchmarks.nginx import nginx
from benchmarks.scene import cpu_s, registry, registry_pid, stoppable
from benchmarks.shaped import Link, shaped
from helios.home import Home
from helios.http.client import HttpClient

NAME = "model.safetensors"
PORT = 8081
CONNECTIONS = 8
HEADS = 15
COMMIT = hashlib.sha1(b"bench").hexdigest()
TARGETS = {"ratio": 0.8, "head_s": 0.1}

NGINX = """
    location = /readyz {{ return 200 "ok"; }}
    location ~ ^/api/models/[^/]+/[^/]+/revision/ {{ default_type application/json; alias {work}/info.json; }}
    location ~ ^/[^/]+/[^/]+/resolve/[^/]+/{name}$ {{ alias {work}/{name}; add_header X-Repo-Commit {commit}; }}
"""


def make_upstream(work: Path, size: int) -> int:
    """The file and what the Hub says of it; returns the file's bytes."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    digest = hashlib.sha256()
    with (work / NAME).open("wb") as file:
        for part in (len(header).to_bytes(8, "little"), header):
            file.write(part)
            digest.update(part)
        for start in range(0, size, 4 << 20):
            part = os.urandom(min(4 << 20, size - start))
            file.write(part)
            digest.update(part)
        total = file.tell()
    sha256 = digest.hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {total}\n".encode()
    oid = hashlib.sha1(b"blob %d\0" % len(pointer) + pointer).hexdigest()
    lfs = {"sha256": sha256, "size": total, "pointerSize": len(pointer)}
    siblings = [{"rfilename": NAME, "blobId": oid, "size": total, "lfs": lfs}]
    info = {"id": "bench/model", "sha": COMMIT, "private": False, "gated": False, "siblings": siblings}
    (work / "info.json").write_text(json.dumps(info))
    return total


def upstream(work: Path, link: Link) -> AbstractContextManager[str]:
    """nginx on the link's far side; yields its URL."""
    locations = NGINX.format(work=work, name=NAME, commit=COMMIT)
    return nginx(work, locations, address=link.address, port=PORT, within=link.server)


@contextmanager
def mirroring(home: Home, url: str, within: Sequence[str]) -> Iterator[tuple[str, int]]:
    """A registry in front of the upstream; its URL and pid."""
    settings = {"HELIOS_REGISTRY__UPSTREAM": url, "HELIOS_REGISTRY__MIRROR": "on"}
    with registry(home, within, environ=settings) as near:
        yield near, registry_pid(home)


def heads(url: str, near: str) -> None:
    """Print seconds: the upstream's answers about repositories, and cold HEADs of as many others."""
    out: dict[str, list[float]] = {"upstream": [], "cold": []}
    with closing(HttpClient(url)) as far, closing(HttpClient(near)) as client:
        for number in range(HEADS):
            asked = (
                ("upstream", far, "GET", f"/api/models/bench/u{number}/revision/main?blobs=true"),
                ("cold", client, "HEAD", f"/bench/h{number}/resolve/main/{NAME}"),
            )
            for name, each, method, path in asked:
                start = time.perf_counter()
                with each.request(method, path) as response:
                    response.read()
                out[name].append(time.perf_counter() - start)
                if response.status != 200:
                    raise SystemExit(f"{path}: status {response.status}")
    print(json.dumps(out))


def one_round(work: Path, name: str, link: Link, url: str, size: int, memory: BackedMemory) -> dict[str, Any]:
    target = f"/bench/model/resolve/{COMMIT}/{NAME}"
    os.sync()
    memory.fill()
    if name == "unshaped":
        yardstick = bare(link.client, "kept", url, target, size, CONNECTIONS, work / "kept")
        yardstick["client"] = "http.client + sha256 + write"
        (work / "kept").unlink()
    else:
        yardstick = bare(link.client, "memory", url, target, size, CONNECTIONS)
    os.sync()
    memory.fill()
    home = Home(work / "home")
    with mirroring(home, url, link.client) as (near, pid):
        command = [*link.client, sys.executable, "-m", "benchmarks.cold_pull", "--heads", url, near]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True, timeout=120)
        times = json.loads(done.stdout)
        before = cpu_s(pid)
        cold = bare(link.client, "stream", near, target, size)
        cpu = cpu_s(pid) - before
        warm = bare(link.client, "stream", near, target, size)
    shutil.rmtree(home.root)
    row = {
        "link": name,
        "client": yardstick["client"],
        "bare_s": yardstick["seconds"],
        "bare_cpu_s": yardstick["cpu_s"],
        "cold_s": cold["seconds"],
        "registry_cpu_s": cpu,
        "warm_s": warm["seconds"],
        "upstream_head_s": statistics.median(times["upstream"]),
        "cold_head_s": statistics.median(times["cold"]),
        "worst_head_s": max(times["cold"]),
        "ratio": yardstick["seconds"] / cold["seconds"],
    }
    show(row, size)
    return row


HEADER = (
    f"{'link':11}{'bare GB/s':>10}{'cold':>7}{'ratio':>7}{'then':>7}{'bare cpu s/GB':>15}{'registry':>10}"
    f"{'upstream ms':>13}{'cold HEAD':>11}{'worst':>7}"
)


def show(row: dict[str, Any], size: int) -> None:
    gb = size / 1e9
    rates = f"{gb / row['bare_s']:10.2f}{gb / row['cold_s']:7.2f}{row['ratio']:7.2f}{gb / row['warm_s']:7.2f}"
    cpu = f"{row['bare_cpu_s'] / gb:15.2f}{row['registry_cpu_s'] / gb:10.2f}"
    head = f"{row['upstream_head_s'] * 1000:13.1f}{row['cold_head_s'] * 1000:11.1f}{row['worst_head_s'] * 1000:7.0f}"
    print(f"{row['link']:11}{rates}{cpu}{head}", flush=True)


def run(gigabytes: float, rounds: int, gbits: list[float], latency_ms: float, directory: Path) -> dict[str, Any]:
    """All measurements; everything made is removed."""
    work = Path(tempfile.mkdtemp(prefix="helios-pull-", dir=directory))
    memory = BackedMemory(directory)
    try:
        print(f"making {gigabytes:g} GB under {work}", file=sys.stderr)
        size = make_upstream(work, int(gigabytes * 1e9))
        print(HEADER)
        rows = []
        for gbit in gbits:
            with shaped(gbit * 1000, latency_ms) as link, upstream(work, link) as url:
                for _ in range(rounds):
                    rows.append(one_round(work, f"{gbit:g} Gbit/s", link, url, size, memory))
        link = Link((), (), "127.0.0.1")
        with upstream(work, link) as url:
            for _ in range(rounds):
                rows.append(one_round(work, "unshaped", link, url, size, memory))
        median = {}
        for name in dict.fromkeys(row["link"] for row in rows):
            mine = [row for row in rows if row["link"] == name]
            numbers = [key for key, value in mine[0].items() if not isinstance(value, str)]
            median[name] = {key: statistics.median(row[key] for row in mine) for key in numbers}
        return {
            "benchmark": "cold_pull",
            "bytes": size,
            "latency_ms": latency_ms,
            "rounds": rows,
            "median": median,
            "time": int(time.time()),
        }
    finally:
        memory.close()
        shutil.rmtree(work, ignore_errors=True)


def main() -> None:
    parser = options("Measure cold pulls through a registry beside bare clients.", gb=1, rounds=3, space="4x")
    parser.add_argument("--gbit", type=float, nargs="*", default=[2], help="rates of the shaped links (2)")
    parser.add_argument("--latency-ms", type=float, default=20, help="round trip of the shaped links (20)")
    parser.add_argument("--heads", nargs=2, metavar="URL", help="time HEADs, for this benchmark itself")
    args = parser.parse_args()
    if args.heads:
        heads(*args.heads)
        return
    if args.gbit and os.geteuid() != 0:
        parser.error("network namespaces need root; --gbit without a rate measures loopback alone")
    if shutil.which("nginx") is None:
        parser.error("nginx is missing: apt install nginx-light")
    with stoppable():
        result = run(args.gb, args.rounds, args.gbit, args.latency_ms, args.directory.resolve())
    out = save(result, args.json)
    for name, row in result["median"].items():
        late = (row["cold_head_s"] - row["upstream_head_s"]) * 1000
        print(f"{name}: {row['ratio']:.2f}x of the bare client, a cold HEAD {late:+.1f} ms to the upstream's answer")
    print(f"targets: {TARGETS['ratio']}x, HEAD +{TARGETS['head_s'] * 1000:.0f} ms; written to {out}")


if __name__ == "__main__":
    main()
