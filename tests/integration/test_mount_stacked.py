"""A tier on overlayfs beside a plain one: the kernel does not read the one's files itself, but still the other's."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from helios.home import Home
from tests.support.disks import overlay, small_disk
from tests.support.mounts import MODES, Mount, call, mounted, push, run, write

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif("native" not in MODES, reason="native mounts need root and Linux 6.9"),
]

MIB = 1 << 20
DATA = {name: random.Random(name).randbytes(20 * MIB + 5) for name in ("a", "b")}

UNTRIED = b"""
import os, sys
if "HELIOS_KEEPER" in os.environ and "heliosfs" in sys.orig_argv:
    from heliosfs.fuse import native
    native._try_out = lambda channel, tiers: None
"""
"""A worker that learns what is refused when a file is opened, as of a tier that comes later."""


def tier(path: Path) -> str:
    return os.getxattr(path, "user.helios.tier").decode()


def opens(mount: Mount, path: Path, data: bytes) -> tuple[float, float]:
    """Opens and reads a whole file; how many opens of it the kernel took, and refused."""
    names = [f"helios_mount_passthrough_{what}_total" for what in ("opens", "refused")]
    before = [mount.metric(name) for name in names]
    assert path.read_bytes() == data
    passed, refused = (mount.metric(name) - count for name, count in zip(names, before, strict=True))
    return passed, refused


@pytest.mark.parametrize("tried", [True, False], ids=["told at the start", "told at the first file"])
def test_one_filesystem_is_refused_and_the_other_goes_on(
    helios_home: Home, tmp_path: Path, wait_for: Callable[..., None], tried: bool
) -> None:
    for name, data in DATA.items():
        push(helios_home, write(tmp_path / name, {"weights.bin": data}), f"org/{name}")
    write(tmp_path / "hook", {} if tried else {"sitecustomize.py": UNTRIED})
    with small_disk(tmp_path / "disk1", 128) as l1, overlay(tmp_path / "disk2", 128) as l2:
        environ = {
            "HELIOS_MOUNT__CACHE": str(l1 / "tier"),
            "HELIOS_MOUNT__CACHE_LIMIT_GIB": str(30 / 1024),
            "HELIOS_MOUNT__L2": str(l2 / "tier"),
            "HELIOS_MOUNT__L2_MIN_FREE": "0.01",
            "PYTHONPATH": f"{tmp_path}/hook:{os.environ.get('PYTHONPATH', '')}",
        }
        with mounted(helios_home, tmp_path / "mnt", **environ) as mount:
            refused = f"overlay at {l2} (it lies on top of another filesystem)"
            assert (refused in str(mount.state["reason"])) == tried
            paths = {name: mount.path / "org" / name / "@main" / "weights.bin" for name in DATA}
            for name, path in paths.items():
                assert path.read_bytes() == DATA[name]
            wait_for(lambda: {tier(path) for path in paths.values()} == {"l1", "l2"}, 60, what="one file in each tier")
            wait_for(lambda: call(mount, "GET", "cache")["tiers"][0]["reserved"] == 0, 60, what="it to settle")
            plain, stacked = sorted(DATA, key=lambda name: tier(paths[name]))
            for _ in range(2):
                assert opens(mount, paths[stacked], DATA[stacked]) == (0, 1)
                assert opens(mount, paths[plain], DATA[plain]) == (1, 0)

            def told() -> bool:
                status = json.loads(run(helios_home, "status", "--json").stdout)
                assert status["mounts"][0]["mode"] == "native"
                return refused in status["mounts"][0]["reason"]

            wait_for(told, 20, what="the status to say so")
            assert refused in " ".join(run(helios_home, "status").stdout.split())
            assert mount.metric("helios_mount_mode_info", mode="native") == 1
            assert refused in mount.page("/metrics")
            assert refused in call(mount, "GET", "status")["reason"]
            assert refused in mount.log()
