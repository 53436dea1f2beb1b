"""From publishing to the first tensor of a model that is cached: from L1, and from L2 on another disk.

A model of one safetensors file is filled through a mount, into L1 in one mount and into L2 in another, whose L1 is too
small for it. Then, each time with neither the mount's pages of it nor the tier's in the page cache:

- ``ref``: seconds from asking the registry for one more ref to the first tensor's bytes, read through the mount;
- ``volume``: seconds from asking the mount for a volume (what a pod's volume waits for) to the same;
- ``direct``: seconds of reading the same tensor from the tier's own file: the yardstick.

L2 lies on another filesystem: the one of --l2, or else an ext4 in a file in --directory (root only). When that is on
the same device as L1 it has the same speed; the way to the bytes is what is measured.

    python -m benchmarks.first_tensor [--gb 0.5] [--rounds 5] [--directory DIR] [--l2 DIR]

Targets: from L1 < 100 ms, from L2 < 500 ms.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.common import options, save
from benchmarks.ingest import drop_cache, make_model
from benchmarks.metadata_ops import BIG, first_tensor, published
from benchmarks.plots import draw
from benchmarks.scene import attribute, helios, mounted, read_through, registry, stoppable, wait_until_whole
from helios.home import Home
from tests.support.mounts import Mount

TARGETS = {"l1": 0.1, "l2": 0.5}
WAYS = ("direct", "ref", "volume")


@contextmanager
def other_disk(work: Path, chosen: Path | None, size: int) -> Iterator[Path]:
    """A directory on another filesystem with room for ``size`` bytes."""
    if chosen is not None:
        directory = Path(tempfile.mkdtemp(prefix="helios-l2-", dir=chosen))
        try:
            yield directory
        finally:
            shutil.rmtree(directory)
        return
    if os.getuid() != 0:
        raise SystemExit("mounting another disk needs root; give a directory on one with --l2")
    image, path = work / "disk.img", work / "disk"
    path.mkdir()
    with image.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, int(size * 1.1) + (64 << 20))
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", str(image)], check=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(path)], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def measure(home: Home, mount: Mount, url: str, tier: str, root: Path, model: Path, number: int) -> dict[str, float]:
    """Seconds of each way, with nothing of the file in memory."""
    want = first_tensor(model)
    sha256 = attribute(mount.path / BIG / "@main" / model.name, "sha256")
    local = root / "blobs" / sha256[:2] / sha256

    def cold(*paths: Path) -> None:
        drop_cache([local, *paths])
        if tier == "l2":  # below a loop device there is a file, and its pages
            subprocess.run(["sync", "-f", str(local)], check=True)
            drop_cache([image for image in [root.parent.parent / "disk.img"] if image.exists()])

    def timed(path: Path, start: float) -> float:
        data = first_tensor(path)
        seconds = time.perf_counter() - start
        if data != want:
            raise SystemExit(f"{path} has another first tensor than was published")
        if attribute(path, "tier") != tier:
            raise SystemExit(f"{path} is in {attribute(path, 'tier')}, not in {tier}")
        cold(path)
        return seconds

    cold(mount.path / BIG / "@main" / model.name)
    start = time.perf_counter()
    first_tensor(local)
    direct_s = time.perf_counter() - start
    cold()
    return {"direct": direct_s} | published(mount, model, url, f"{tier}-{number}", timed)


def run(gigabytes: float, rounds: int, directory: Path, l2: Path | None) -> dict[str, Any]:
    """Both tiers; everything made is removed."""
    work = Path(tempfile.mkdtemp(prefix="helios-first-", dir=directory))
    size = int(gigabytes * 1e9)
    rows: dict[str, list[dict[str, float]]] = {}
    try:
        (model,) = make_model(work / "model", size, 1)
        publisher = Home(work / "registry")
        with other_disk(work, l2, size) as disk, registry(publisher) as url:
            helios(publisher, "push", model.parent, BIG, environ={"HELIOS_REGISTRY__URLS": url})
            for tier, root in (("l1", work / "cache-l1"), ("l2", disk / "tier")):
                cache = root if tier == "l1" else work / "cache-small"
                settings = {"HELIOS_MOUNT__CACHE": str(cache), "HELIOS_MOUNT__SCRUB_MB_S": "0"}
                if tier == "l2":
                    limit = {"HELIOS_MOUNT__CACHE_LIMIT_GIB": "0.01", "HELIOS_MOUNT__L2_MIN_FREE": "0"}
                    settings |= {"HELIOS_MOUNT__L2": str(root), **limit}
                home = Home(work / f"home-{tier}")
                with mounted(home, work / "mnt", urls=url, environ=settings) as mount:
                    path = mount.path / BIG / "@main" / model.name
                    read_through(path)
                    wait_until_whole(path, tier=tier)
                    print(f"in {tier}: {path.stat().st_size / 1e9:.2f} GB", file=sys.stderr)
                    rows[tier] = [measure(home, mount, url, tier, root, model, n) for n in range(rounds)]
        median = {tier: {way: statistics.median(row[way] for row in rows[tier]) for way in WAYS} for tier in rows}
        return {"benchmark": "first_tensor", "time": int(time.time()), "bytes": size, "rows": rows, "median": median}
    finally:
        shutil.rmtree(work, ignore_errors=True)


def main() -> None:
    parser = options("Measure publish to first tensor from both tiers.", gb=0.5, rounds=5, space="4x")
    parser.add_argument("--l2", type=Path, help="a directory on another disk (an ext4 in a file)")
    args = parser.parse_args()
    with stoppable():
        result = run(args.gb, args.rounds, args.directory.resolve(), args.l2 and args.l2.resolve())
    print(f"{'ms':6}" + "".join(f"{way:>10}" for way in WAYS) + f"{'target':>10}")
    for tier, row in result["median"].items():
        print(f"{tier:6}" + "".join(f"{row[way] * 1000:10.1f}" for way in WAYS) + f"{TARGETS[tier] * 1000:10.0f}")
    out = save(result, args.json)
    groups = {tier: {way: row[way] * 1000 for way in WAYS} for tier, row in result["median"].items()}
    draw(out, "publish to the first tensor", "ms", groups)
    print(f"written to {out}")


if __name__ == "__main__":
    main()
