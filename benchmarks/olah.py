"""Downloads of an upstream's model through a Helios registry, beside the same ones through olah.

Both mirror the same upstream: a Helios registry that holds the model, with nginx in front, which sends the file's bytes
itself and keeps a log of them. Each round begins with an empty mirror of each kind and the same clients:

- ``cold``: one client downloads the file that the mirror has never heard of;
- ``16 cold``: sixteen clients download another such file at once; how many times over it left the upstream is counted;
- ``warm`` and ``16 warm``: the first one again;
- ``head``: HEADs of it, one after another, in milliseconds.

CPU seconds per GB and memory (RssAnon + RssShmem at the end) are of the mirror. What a mirror promises is not the same:
Helios hashes every byte before it counts as here and flushes it to the disk, olah keeps blocks with a CRC.

    python -m benchmarks.olah [--gb 0.5] [--rounds 3] [--directory DIR]

Needs nginx (Debian: nginx-light) and olah in an environment of its own: `python3 -m venv .venvs/olah`, then
`.venvs/olah/bin/pip install olah`.
"""

from __future__ import annotations

import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.cold_pull import mirroring
from benchmarks.common import ROOT, BackedMemory, memory_of, options, random_file, save
from benchmarks.local_bytes import ask_from
from benchmarks.nginx import nginx
from benchmarks.plots import draw
from benchmarks.scene import cpu_s, ended, helios, registry, stoppable
from helios.home import Home
from helios.http.client import HttpClient
from helios.names import RepoId
from helios.registry_client import RegistryClient

OLAH = ROOT / ".venvs" / "olah" / "bin" / "olah-cli"
FILES = ("one.bin", "two.bin")
HEADS = 50
NGINX = """
    location ~ ^/bench/model/resolve/[^/]+/(?<file>[a-z]+\\.bin)$ {{
      error_page 418 = @registry;
      if ($request_method = HEAD) {{ return 418; }}
      access_log {log} sizes;
      add_header X-Repo-Commit {commit};
      alias {model}/$file;
    }}
    location @registry {{ proxy_pass {registry}; }}
    location / {{ proxy_pass {registry}; proxy_set_header Host $host:$server_port; }}
"""
LOG = "log_format sizes '$uri $body_bytes_sent';"


@contextmanager
def olah(work: Path, upstream: str, port: int) -> Iterator[tuple[str, int]]:
    """olah with an empty cache; its URL and pid."""
    netloc, url = upstream.removeprefix("http://"), f"http://127.0.0.1:{port}"
    command = [str(OLAH), "--host", "127.0.0.1", "--port", str(port), "--hf-scheme", "http"]
    command += ["--hf-netloc", netloc, "--hf-lfs-netloc", netloc, "--repos-path", str(work / "repos")]
    command += ["--mirror-netloc", f"127.0.0.1:{port}", "--mirror-lfs-netloc", f"127.0.0.1:{port}"]
    command += ["--log-path", str(work / "logs")]
    work.mkdir()
    with (
        (work / "out").open("wb") as out,
        ended(subprocess.Popen(command, stdout=out, stderr=out, cwd=work)) as process,
    ):
        until = time.monotonic() + 60
        while not listens(port):
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"olah did not start:\n{(work / 'out').read_text()[-2000:]}")
            time.sleep(0.1)
        yield url, process.pid


def listens(port: int) -> bool:
    return f":{port:04X} " in Path("/proc/net/tcp").read_text()


@contextmanager
def ours(work: Path, upstream: str, _port: int) -> Iterator[tuple[str, int]]:
    with mirroring(Home(work), upstream, ()) as found:
        yield found


def sent(log: Path, file: str) -> int:
    """Bytes of a file that left the upstream so far."""
    return sum(int(count) for path, count in re.findall(r"(\S+) (\d+)\n", log.read_text()) if path.endswith(file))


def measure(work: Path, mirror: Any, upstream: str, port: int, log: Path, size: int) -> dict[str, float]:
    """One round through one mirror."""
    log.write_text("")
    with mirror(work, upstream, port) as (url, pid):
        first, second = (f"{url}/bench/model/resolve/main/{name}" for name in FILES)
        row: dict[str, float] = {}
        before = cpu_s(pid)
        for name, way, target in (("cold", "1 stream", first), ("16 cold", "16 streams", second)):
            row[name] = ask_from(way, target, size)
        row["cold_cpu_s"] = cpu_s(pid) - before
        row["upstream"] = sent(log, FILES[1]) / size
        before = cpu_s(pid)
        for name, way in (("warm", "1 stream"), ("16 warm", "16 streams")):
            row[name] = ask_from(way, first, size)
        row["warm_cpu_s"] = cpu_s(pid) - before
        row["head"] = ask_from("heads", first, HEADS)
        row["memory"] = memory_of(pid)
    shutil.rmtree(work, ignore_errors=True)
    return row


MIRRORS: dict[str, Callable[..., Any]] = {"olah": olah, "helios": ours}


def run(gigabytes: float, rounds: int, directory: Path) -> dict[str, Any]:
    work = Path(tempfile.mkdtemp(prefix="helios-olah-", dir=directory))
    memory = BackedMemory(directory)
    try:
        home, size, model, log = Home(work / "home"), int(gigabytes * 1e9), work / "model", work / "sizes.log"
        model.mkdir()
        for name in FILES:
            random_file(model / name, size)
        rows: list[dict[str, Any]] = []
        with registry(home, environ={"HELIOS_REGISTRY__MIRROR": "off"}) as behind:
            helios(home, "push", model, "bench/model")
            commit = commit_of(behind)
            locations = NGINX.format(registry=behind, log=log, commit=commit, model=model)
            with nginx(work, locations, http=LOG) as upstream:
                for number in range(rounds):
                    for name, mirror in MIRRORS.items():
                        os.sync()
                        memory.fill()
                        port = 18100 + number
                        row = measure(work / f"{name}-{number}", mirror, upstream, port, log, size)
                        rows.append({"mirror": name, **row})
                        show(rows[-1], size)
        median = {
            mirror: {
                name: statistics.median(row[name] for row in rows if row["mirror"] == mirror)
                for name in rows[0]
                if name != "mirror"
            }
            for mirror in MIRRORS
        }
        return {
            "benchmark": "olah",
            "bytes": size,
            "rounds": rows,
            "table": median,
            "median": {
                name: median["olah"][name] / median["helios"][name]
                for name in ("cold", "16 cold", "warm", "16 warm", "head", "memory")
            },
            "time": int(time.time()),
        }
    finally:
        memory.close()
        shutil.rmtree(work, ignore_errors=True)


def commit_of(url: str) -> str:
    with closing(HttpClient(url)) as http:
        return RegistryClient(http).resolve(RepoId.parse("bench/model"), "main").commit


HEADER = (
    f"{'':8}{'cold s':>8}{'16 cold':>9}{'upstream':>10}{'warm s':>8}{'16 warm':>9}{'HEAD ms':>9}"
    f"{'cold cpu s/GB':>15}{'warm':>7}{'MB':>7}"
)


def show(row: dict[str, Any], size: int) -> None:
    gb = size / 1e9
    times = f"{row['cold']:8.2f}{row['16 cold']:9.2f}{row['upstream']:9.2f}x{row['warm']:8.2f}{row['16 warm']:9.2f}"
    rest = f"{row['head'] * 1000:9.1f}{row['cold_cpu_s'] / gb / 17:15.2f}{row['warm_cpu_s'] / gb / 17:7.2f}"
    print(f"{row['mirror']:8}{times}{rest}{row['memory'] / 1e6:7.0f}", flush=True)


def main() -> None:
    args = options("Measure downloads through a mirror beside olah.", gb=0.5, rounds=3, space="10x").parse_args()
    if not OLAH.exists():
        raise SystemExit(f"olah is missing: python3 -m venv {OLAH.parents[1]}; {OLAH.parent}/pip install olah")
    print(HEADER)
    with stoppable():
        result = run(args.gb, args.rounds, args.directory.resolve())
    out = save(result, args.json)
    bars = {
        way: {name: result["table"][name][way] for name in MIRRORS} for way in ("cold", "16 cold", "warm", "16 warm")
    }
    draw(out, "A model through a mirror", "s", bars)
    for name, ratio in result["median"].items():
        print(f"{name}: olah {'has' if name == 'memory' else 'takes'} {ratio:.1f}x")
    print(f"written to {out}", file=sys.stderr)


if __name__ == "__main__":
    main()
