"""What `helios mount --shadow` costs a reader: the same reads with 0, 1 and 100 percent of them compared.

A whole local file, read from start to end in 1 MiB pieces with nothing of it in the mount's own page cache:

- ``read``: a portable mount, where every READ passes through its process and is sampled;
- ``passthrough``: a native mount, where the kernel reads the file and openings are sampled (as root on Linux 6.9 only).

One mount for each share, with the registry on loopback; rounds go through them in turn. At 100 percent far more is read
than can be downloaded beside it: what is too much is dropped, and what the downloads take of the processor the reader
lacks on a small machine.

    python -m benchmarks.shadow [--gb 0.5] [--rounds 5] [--directory DIR]

Targets: 1 percent >= 0.95x of none; no mismatch, no failed comparison.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from benchmarks.common import options, save
from benchmarks.ingest import drop_cache, make_model
from benchmarks.plots import draw
from benchmarks.scene import helios, mounted, read_through, registry, stoppable, wait_until_whole
from helios.home import Home
from tests.support.mounts import MODES, Mount

SHARES: Final = (0, 1, 100)
WAYS: Final = {"portable": "read", "native": "passthrough"}
MODEL: Final = "bench/model"
TARGET: Final = 0.95


def report(mount: Mount) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(mount.page("/api/v1/shadow"))
    return found


def one_mode(mode: str, work: Path, url: str, name: str, size: int, rounds: int) -> dict[str, Any]:
    """GB/s of every round by share, and what was compared."""
    with contextlib.ExitStack() as stack:
        mounts = {}
        for share in SHARES:
            environ = {"HELIOS_MOUNT__MODE": mode, "HELIOS_MOUNT__SHADOW_PERCENT": str(share)}
            home = Home(work / f"{mode}-{share}")
            stack.callback(shutil.rmtree, home.root, ignore_errors=True)
            mounts[share] = stack.enter_context(mounted(home, work / f"mnt-{share}", urls=url, environ=environ))
        paths = {share: (mount.path / MODEL / "@main" / name).resolve() for share, mount in mounts.items()}
        for path in paths.values():
            read_through(path)
            wait_until_whole(path)
            read_through(path)
        rates: dict[str, list[float]] = {str(share): [] for share in SHARES}
        for _ in range(rounds):
            for share, path in paths.items():
                drop_cache([path])
                start = time.perf_counter()
                read_through(path)
                rates[str(share)].append(size / 1e9 / (time.perf_counter() - start))
        return {"rates": rates, "found": {str(share): report(mounts[share]) for share in SHARES if share}}


def run(gigabytes: float, rounds: int, directory: Path) -> dict[str, Any]:
    """All measurements; everything made is removed."""
    work = Path(tempfile.mkdtemp(prefix="helios-shadow-", dir=directory))
    home = Home(work / "home")
    try:
        (model,) = make_model(work / "model", int(gigabytes * 1e9), 1)
        size = model.stat().st_size
        with registry(home) as url:
            helios(home, "push", work / "model", MODEL)
            ways = {WAYS[mode]: one_mode(mode, work, url, model.name, size, rounds) for mode in MODES}
        rates = {way: {s: statistics.median(r) for s, r in row["rates"].items()} for way, row in ways.items()}
        ratios = {f"{way}_{share}": rates[way][str(share)] / rates[way]["0"] for way in rates for share in SHARES[1:]}
        now = int(time.time())
        return {"benchmark": "shadow", "bytes": size, "ways": ways, "gb_s": rates, "median": ratios, "time": now}
    finally:
        shutil.rmtree(work, ignore_errors=True)


def main() -> None:
    parser = options("Measure what comparing reads costs.", gb=0.5, rounds=5, space="5x")
    args = parser.parse_args()
    with stoppable():
        result = run(args.gb, args.rounds, args.directory.resolve())
    print(f"{'GB/s, compared':16}" + "".join(f"{share:>8}%" for share in SHARES) + f"{'ratios':>16}")
    for way, rates in result["gb_s"].items():
        ratios = "".join(f"{result['median'][f'{way}_{share}']:8.2f}" for share in SHARES[1:])
        print(f"{way:16}" + "".join(f"{rates[str(share)]:9.2f}" for share in SHARES) + ratios)
        for share, found in result["ways"][way]["found"].items():
            counts = ", ".join(
                f"{found[key]} {key}" for key in ("compared", "mismatches", "download_errors", "dropped")
            )
            times = ", ".join(
                f"{side} {found[f'{side}_seconds']['p50'] * 1e3:.1f} ms" for side in ("mount", "download")
            )
            print(f"  at {share}%: {counts}; p50 {times}")
    print(f"target at 1%: {TARGET}x")
    out = save(result, args.json)
    named = {way: {f"{share}%": rate for share, rate in rates.items()} for way, rates in result["gb_s"].items()}
    draw(out, "Reading while a part is compared", "GB/s", named)
    print(f"written to {out}", file=sys.stderr)


if __name__ == "__main__":
    main()
