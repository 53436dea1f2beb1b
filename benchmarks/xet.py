"""A file over Xet beside the same file over plain HTTP, from the same registry; what a layout costs.

- ``layout``: from the end of the push until the registry has laid the file out: MB/s, CPU seconds of the registry and
  of hf-xet for each GB; the bytes that this adds to the store;
- ``client``: the real huggingface_hub (2.4.0, with hf-xet) downloads the file into a new cache, by turns over Xet and
  with HF_HUB_DISABLE_XET: GB/s as it sees them, CPU seconds for each GB of its own and of the registry's;
- ``bare``: a client that throws the bytes away, one connection: what the registry alone costs and can do. Over Xet it
  asks for whole xorbs, one after the other, as hf-xet does.

Both ways send verified bytes: every chunk is hashed in the first round, and remembered for the later ones.

    python -m benchmarks.xet [--gb 2] [--rounds 3] [--directory DIR]

Targets: stored bytes grow by less than 1%; Xet reaches 0.8 times plain HTTP with the real client.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.common import ROOT, options, save
from benchmarks.ingest import make_model
from benchmarks.scene import cpu_s, helios, registry, run_in
from helios.home import Home

PYTHON = ROOT / ".venvs" / "hub-2.4.0" / "bin" / "python"
REPO = "bench/xet"
CLIENT = """
import json, resource, sys, time
from huggingface_hub import hf_hub_download
start = time.perf_counter()
path = hf_hub_download(sys.argv[1], sys.argv[2])
seconds = time.perf_counter() - start
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({"seconds": seconds, "cpu_s": used.ru_utime + used.ru_stime}))
"""
LAYOUT_S = 3600.0
"""Longest wait for a layout, in seconds."""
TARGETS = {"growth": 0.01, "client_ratio": 0.8}


def metric(url: str, name: str) -> float:
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        found = re.search(rf"^{name}(?:{{[^}}]*}})? (\S+)$", answer.read().decode(), re.MULTILINE)
    return float(found[1]) if found else 0.0


def children_cpu_s(pid: int) -> float:
    """User and system seconds of a process's children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[13]) + int(fields[14])) / os.sysconf("SC_CLK_TCK")


def measure_layout(url: str, pid: int, home: Home, file: Path) -> dict[str, float]:
    """Publish the file, and wait until it is laid out."""
    helios(home, "push", file.parent, REPO)
    start, own, hf_xet = time.perf_counter(), cpu_s(pid), children_cpu_s(pid)
    while metric(url, "helios_registry_xet_layouts_total") < 1:
        if time.perf_counter() - start > LAYOUT_S:
            raise SystemExit("the registry makes no layout")
        time.sleep(0.2)
    seconds, size = time.perf_counter() - start, file.stat().st_size
    layouts = sum(path.stat().st_size for path in (home.store / "public/xet").rglob("*") if path.is_file())
    return {
        "mb_s": size / seconds / 1e6,
        "registry_cpu_s_gb": (cpu_s(pid) - own) / size * 1e9,
        "hf_xet_cpu_s_gb": (children_cpu_s(pid) - hf_xet) / size * 1e9,
        "growth": layouts / size,
    }


def measure_client(url: str, pid: int, file: Path, directory: Path, *, xet: bool) -> dict[str, float]:
    """One download with huggingface_hub."""
    before, xorbs = cpu_s(pid), metric(url, "helios_registry_xorb_bytes_total")
    with tempfile.TemporaryDirectory(dir=directory) as cache:
        env = {**os.environ, "HF_ENDPOINT": url, "HF_HOME": cache, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        env |= {} if xet else {"HF_HUB_DISABLE_XET": "1"}
        done = subprocess.run([PYTHON, "-c", CLIENT, REPO, file.name], env=env, stdout=subprocess.PIPE, check=True)
    said, size = json.loads(done.stdout), file.stat().st_size
    came = metric(url, "helios_registry_xorb_bytes_total") - xorbs
    if (came > size / 2) != xet:
        raise SystemExit(f"{came:.0f} bytes came over Xet")
    return row(size, said["seconds"], cpu_s(pid) - before) | {"client_cpu_s_gb": said["cpu_s"] / size * 1e9}


def measure_bare(pid: int, size: int, requests: Iterable[tuple[str, dict[str, str]]]) -> dict[str, float]:
    """Fetch every URL, one after the other on one connection, and throw the bytes away."""
    buffer = bytearray(1 << 20)
    connection: http.client.HTTPConnection | None = None
    before, start = cpu_s(pid), time.perf_counter()
    for url, headers in requests:
        parts = urlsplit(url)
        connection = connection or http.client.HTTPConnection(parts.netloc, timeout=60)
        connection.request("GET", f"{parts.path}?{parts.query}", headers=headers)
        answer = connection.getresponse()
        if answer.status not in (200, 206):
            raise SystemExit(f"{url}: {answer.status}")
        while answer.readinto(buffer):
            pass
    seconds = time.perf_counter() - start
    if connection is not None:
        connection.close()
    return row(size, seconds, cpu_s(pid) - before)


def xorbs_of(url: str, file: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """What a Xet client fetches for the whole file."""
    head = urllib.request.Request(f"{url}/{REPO}/resolve/main/{file.name}", method="HEAD")
    with urllib.request.urlopen(head) as answer:
        name = answer.headers["x-xet-hash"]
    with urllib.request.urlopen(f"{url}/api/models/{REPO}/xet-read-token/main") as answer:
        token = json.load(answer)
    asked = urllib.request.Request(
        f"{token['casUrl']}/v1/reconstructions/{name}", headers={"authorization": f"Bearer {token['accessToken']}"}
    )
    with urllib.request.urlopen(asked) as answer:
        for entries in json.load(answer)["fetch_info"].values():
            for entry in entries:
                span = entry["url_range"]
                yield entry["url"], {"range": f"bytes={span['start']}-{span['end']}"}


def row(size: int, seconds: float, cpu: float) -> dict[str, float]:
    return {"gb_s": size / seconds / 1e9, "registry_cpu_s_gb": cpu / size * 1e9}


def measure(arguments: Any, directory: Path) -> dict[str, Any]:
    (file,) = make_model(directory / "model", int(arguments.gb * 1e9), 1)
    home, size = Home(directory / "home"), file.stat().st_size
    os.environ["HELIOS_REGISTRY__XET_MIN_GIB"] = "0"
    rows: dict[str, list[dict[str, float]]] = {"client_plain": [], "client_xet": [], "bare_plain": [], "bare_xet": []}
    with registry(home) as url:
        pid = int(json.loads((home.run / "registry.json").read_text())["pid"])
        layout = measure_layout(url, pid, home, file)
        for _ in range(arguments.rounds):
            plain = [(f"{url}/{REPO}/resolve/main/{file.name}", dict[str, str]())]
            rows["bare_plain"].append(measure_bare(pid, size, plain))
            rows["bare_xet"].append(measure_bare(pid, size, list(xorbs_of(url, file))))
            rows["client_plain"].append(measure_client(url, pid, file, directory, xet=False))
            rows["client_xet"].append(measure_client(url, pid, file, directory, xet=True))
    median = {
        name: {key: statistics.median(row[key] for row in found) for key in found[0]} for name, found in rows.items()
    }
    ratios = {
        f"{way}_ratio": median[f"{way}_xet"]["gb_s"] / median[f"{way}_plain"]["gb_s"] for way in ("client", "bare")
    }
    return {
        "benchmark": "xet",
        "time": time.strftime("%Y%m%d-%H%M%S"),
        "gb": size / 1e9,
        "cores": os.cpu_count(),
        "layout": layout,
        "rows": rows,
        "median": median | ratios | {"growth": layout["growth"]},
        "targets": TARGETS,
    }


def show(result: dict[str, Any]) -> None:
    layout, median = result["layout"], result["median"]
    print(
        f"layout: {layout['mb_s']:.0f} MB/s, CPU s/GB {layout['hf_xet_cpu_s_gb']:.2f} (hf-xet) + "
        f"{layout['registry_cpu_s_gb']:.2f} (registry); stored bytes grow by {layout['growth']:.4%}"
    )
    print(f"{'':14}{'GB/s':>8}{'registry CPU s/GB':>20}{'client CPU s/GB':>18}")
    for name in ("bare_plain", "bare_xet", "client_plain", "client_xet"):
        found = median[name]
        client = f"{found['client_cpu_s_gb']:.2f}" if "client_cpu_s_gb" in found else ""
        print(f"{name:14}{found['gb_s']:>8.2f}{found['registry_cpu_s_gb']:>20.2f}{client:>18}")
    print(f"Xet to plain HTTP: {median['client_ratio']:.2f} with the client, {median['bare_ratio']:.2f} bare")


def main() -> int:
    parser = options(__doc__.splitlines()[0], gb=2, rounds=3, space="three times")
    arguments = parser.parse_args()
    if not PYTHON.exists():
        print("huggingface_hub 2.4.0 is not there: run scripts/hub_venvs.py", file=sys.stderr)
        return 1
    with run_in(arguments.directory, "xet") as directory:
        result = measure(arguments, directory)
    show(result)
    print(save(result, arguments.json))
    return 0


if __name__ == "__main__":
    sys.exit(main())
