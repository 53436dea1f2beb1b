"""How long the kubelet waits for a volume: publishing a resolved model through the CSI driver, beside a plain bind.

A real driver on a real mount, with calls over gRPC as the kubelet makes them. Three things are timed: publishing one
volume after another (p50, p99), publishing so many at once, and a publish while so many volumes are there already. The
yardstick in the same run is mount(8)'s work without the program: the same directory bound and made read-only with
mount(2). Unpublishing and a repeated publish (``requiresRepublish``) are timed, too.

    python -m benchmarks.csi_publish [--rounds 100] [--volumes 200] [--at-once 50] [--directory DIR]

Target: publishing a resolved model p50 under 20 ms. Needs root.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import options, save, together
from helios.home import Home
from helios.mounts import detach
from tests.support.csi import Driver, running_driver
from tests.support.mounts import mounted, push, write

TARGET_S = 0.020
MS_BIND, MS_RDONLY, MS_REMOUNT = 4096, 1, 32
FILES = {"config.json": b"{}", **{f"model-{part:05}.bin": os.urandom(4096) for part in range(30)}}


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def bind(source: Path, target: Path) -> None:
    """What `mount --bind` and `mount -o remount,ro,bind` do, and the directory that the driver makes."""
    libc = ctypes.CDLL(None, use_errno=True)
    target.mkdir()
    for flags in (MS_BIND, MS_BIND | MS_REMOUNT | MS_RDONLY):
        if libc.mount(os.fsencode(source), os.fsencode(target), None, ctypes.c_ulong(flags), None):
            raise SystemExit(f"mount: {os.strerror(ctypes.get_errno())}; this benchmark needs root")


def spread(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {"p50_s": statistics.median(ordered), "p99_s": ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)]}


def shown(name: str, found: dict[str, float], plain: dict[str, float] | None = None) -> None:
    ratio = "" if plain is None else f"{found['p50_s'] / plain['p50_s']:12.1f}"
    print(f"{name:40}{found['p50_s'] * 1e3:9.2f}{found['p99_s'] * 1e3:9.2f}{ratio}", flush=True)


def one_after_another(driver: Driver, rounds: int, prefix: str) -> dict[str, dict[str, float]]:
    publishes, repeats, unpublishes = [], [], []
    for number in range(rounds):
        volume, target = f"{prefix}-{number}", driver.target(f"{prefix}-{number}")
        publishes.append(timed(lambda v=volume, t=target: driver.publish(v, t, model="bench/model")))  # type: ignore[misc]
        repeats.append(timed(lambda v=volume, t=target: driver.publish(v, t, model="bench/model")))  # type: ignore[misc]
        unpublishes.append(timed(lambda v=volume, t=target: driver.unpublish(v, t)))  # type: ignore[misc]
    return {"publish": spread(publishes), "again": spread(repeats), "unpublish": spread(unpublishes)}


def at_once(driver: Driver, count: int, prefix: str) -> dict[str, Any]:
    """Seconds of each of so many publishes that are asked for at the same moment, and of all."""
    targets = [(f"{prefix}-{number}", driver.target(f"{prefix}-{number}")) for number in range(count)]
    took: list[float] = []

    def publish(volume: str, target: Path) -> None:
        took.append(timed(lambda: driver.publish(volume, target, model="bench/model")))

    whole = together([lambda v=v, t=t: publish(v, t) for v, t in targets])  # type: ignore[misc]
    for volume, target in targets:
        driver.unpublish(volume, target)
    return {**spread(took), "all_s": whole}


def run(rounds: int, volumes: int, together_: int, directory: Path) -> dict[str, Any]:
    work = Path(tempfile.mkdtemp(prefix="helios-csi-", dir=directory))
    try:
        home = Home(work / "home")
        push(home, write(work / "model", FILES), "bench/model")
        with mounted(home, work / "mnt") as mount, running_driver(home, work) as driver:
            driver.until_ready()
            print(f"{'milliseconds':40}{'p50':>9}{'p99':>9}{'to plain':>12}")
            source = next(path for path in (mount.path / "bench" / "model").iterdir())
            plain_times = []
            for number in range(rounds):
                target = work / f"plain-{number}"
                plain_times.append(timed(lambda t=target: bind(source, t)))  # type: ignore[misc]
                detach(target)
            plain = spread(plain_times)
            shown("plain bind mount", plain)
            one_after_another(driver, 3, "warm")
            alone = one_after_another(driver, rounds, "alone")
            shown("publish", alone["publish"], plain)
            shown("publish again (requiresRepublish)", alone["again"], plain)
            shown("unpublish", alone["unpublish"], plain)
            crowd = at_once(driver, together_, "crowd")
            shown(f"publish, {together_} at once (all: {crowd['all_s']:.2f} s)", crowd, plain)
            there = [(f"there-{number}", driver.target(f"there-{number}")) for number in range(volumes)]
            for volume, target in there:
                driver.publish(volume, target, model="bench/model")
            full = one_after_another(driver, rounds, "full")
            shown(f"publish beside {volumes} volumes", full["publish"], plain)
            for volume, target in there:
                driver.unpublish(volume, target)
        return {
            "benchmark": "csi_publish",
            "rounds": rounds,
            "volumes": volumes,
            "at_once_count": together_,
            "plain": plain,
            "alone": alone,
            "at_once": crowd,
            "full": full,
            "time": int(time.time()),
        }
    finally:
        shutil.rmtree(work, ignore_errors=True)


def main() -> None:
    parser = options("Time publishing volumes through the CSI driver.", gb=0, rounds=100, space="a few MB, not")
    parser.add_argument("--volumes", type=int, default=200, help="volumes that are there already (200)")
    parser.add_argument("--at-once", type=int, default=50, help="publishes at the same moment (50)")
    args = parser.parse_args()
    result = run(args.rounds, args.volumes, args.at_once, args.directory)
    p50 = result["alone"]["publish"]["p50_s"]
    print(f"publish p50 {p50 * 1e3:.1f} ms; target {TARGET_S * 1e3:.0f} ms: {'met' if p50 < TARGET_S else 'MISSED'}")
    print(save(result, args.json))


if __name__ == "__main__":
    main()
