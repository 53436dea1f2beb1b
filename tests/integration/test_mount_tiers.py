"""Mounts over two disks: passthrough from either, what is open while it moves, a disk that is pulled out."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from helios.home import Home
from helios.http.client import HttpClient
from tests.support.disks import LoopDisk, loop_disk
from tests.support.mounts import MODES, Mount, mounted, push, run, write

pytestmark = pytest.mark.fuse
native = pytest.mark.skipif("native" not in MODES, reason="native mounts need root and Linux 6.9")

MIB = 1 << 20
DATA = {name: random.Random(name).randbytes(20 * MIB + 5) for name in ("a", "b", "c")}


@dataclass
class Scene:
    """A mount whose tiers have a disk each; L1 has room for one of the models ``a``, ``b`` and ``c``."""

    mount: Mount
    l1: LoopDisk
    l2: LoopDisk

    def path(self, name: str) -> Path:
        return self.mount.path / "org" / name / "@main" / "weights.bin"

    def tier(self, name: str) -> str:
        return os.getxattr(self.path(name), "user.helios.tier").decode()

    def copies(self, disk: LoopDisk) -> int:
        """Whole files on a disk."""
        return sum(path.is_file() for path in (disk.path / "tier" / "blobs").rglob("*"))

    def call(self, method: str, path: str, body: Any = None) -> Any:
        with contextlib.closing(HttpClient(f"unix:{self.mount.state['socket']}", timeout_s=30)) as client:
            return client.json(method, f"/api/v1/{path}", body=body)

    def reads(self) -> float:
        return self.mount.reads()


@contextlib.contextmanager
def scene(home: Home, tmp_path: Path, mode: str) -> Iterator[Scene]:
    for name, data in DATA.items():
        push(home, write(tmp_path / name, {"weights.bin": data}), f"org/{name}")
    for number in (1, 2):
        (tmp_path / f"disk{number}").mkdir()
    with loop_disk(tmp_path / "disk1", 128) as l1, loop_disk(tmp_path / "disk2", 128) as l2:
        settings = {
            "HELIOS_MOUNT__MODE": mode,
            "HELIOS_MOUNT__CACHE": str(l1.path / "tier"),
            "HELIOS_MOUNT__CACHE_LIMIT_GIB": str(30 / 1024),
            "HELIOS_MOUNT__L2": str(l2.path / "tier"),
            "HELIOS_MOUNT__L2_MIN_FREE": "0.01",
        }
        with mounted(home, tmp_path / "mnt", **settings) as mount:
            yield Scene(mount, l1, l2)


def fill(scene: Scene, name: str, wait_for: Callable[..., None]) -> None:
    """Read a model until it is on a disk as a whole."""
    assert scene.path(name).read_bytes() == DATA[name]
    with scene.path(name).open("rb") as file:
        file.read(1)
        wait_for(lambda: scene.tier(name) in ("l1", "l2"), 30, what=f"{name} to be local")
    wait_for(lambda: scene.call("GET", "cache")["tiers"][0]["reserved"] == 0, 30, what="it to settle")


def test_two_tiers_in_a_portable_mount(helios_home: Home, tmp_path: Path, wait_for: Callable[..., None]) -> None:
    with scene(helios_home, tmp_path, "portable") as s:
        for name in ("b", "a"):
            fill(s, name, wait_for)
        wait_for(lambda: (s.tier("a"), s.tier("b")) == ("l2", "l1"), 30, what="a to be in L2")
        fetched = s.mount.metric("helios_mount_fetched_bytes_total")
        assert s.path("a").read_bytes() == DATA["a"]
        assert s.mount.metric("helios_mount_fetched_bytes_total") == fetched, "nothing is fetched again"
        with s.path("a").open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.read(4096)
            assert s.mount.metric("helios_mount_read_bytes_total", tier="l2") >= 4096
        tiers = {tier["tier"]: tier for tier in s.call("GET", "cache")["tiers"]}
        assert [tier["state"] for tier in tiers.values()] == ["works", "works"]
        assert tiers["l2"]["directory"] == str(s.l2.path / "tier")
        for name in ("l1", "l2"):
            assert tiers[name]["used"] >= len(DATA["a"])
            assert s.mount.metric("helios_mount_cache_used_bytes", tier=name) == tiers[name]["used"]
        status = json.loads(run(helios_home, "status", "--json").stdout)
        assert [tier["tier"] for tier in status["mounts"][0]["tiers"]] == ["l1", "l2"]
        assert "l2" in run(helios_home, "status").stdout
        gone = s.call("POST", "evict", {"model": "org/a"})
        assert gone["removed"] == 1 or "in use" in gone["kept"].values()


@native
def test_an_open_file_is_read_by_the_kernel_from_the_tier_it_was_opened_in(
    helios_home: Home, tmp_path: Path, wait_for: Callable[..., None]
) -> None:
    with scene(helios_home, tmp_path, "native") as s:
        for name in ("b", "a"):
            fill(s, name, wait_for)
        wait_for(lambda: s.tier("a") == "l2", 30, what="a to be in L2")
        opened = s.mount.metric("helios_mount_passthrough_opens_total")
        with s.path("a").open("rb") as file:
            assert s.mount.metric("helios_mount_passthrough_opens_total") == opened + 1
            reads = s.reads()
            assert file.read(10 * MIB) == DATA["a"][: 10 * MIB]
            s.call("POST", "pin", {"model": "org/a"})  # it was used, and is to be kept: up it goes
            wait_for(lambda: s.mount.metric("helios_mount_cache_moves_total", move="promotion") == 1, 30, what="a move")
            assert s.copies(s.l2) == 2, "the kernel reads the one, b has come down"
            assert file.read() == DATA["a"][10 * MIB :]
            assert s.reads() == reads, "the kernel read it all"
            assert s.tier("a") == "l2"
        wait_for(lambda: s.copies(s.l2) == 1, 30, what="the old file to go")
        assert (s.tier("a"), s.tier("b")) == ("l1", "l2")
        assert s.path("a").read_bytes() == DATA["a"]
        assert s.reads() == reads
        assert s.path("b").read_bytes() == DATA["b"]


@native
def test_a_disk_that_is_pulled_out_under_a_native_mount(
    helios_home: Home, tmp_path: Path, wait_for: Callable[..., None]
) -> None:
    with scene(helios_home, tmp_path, "native") as s:
        for name in ("b", "a"):
            fill(s, name, wait_for)
        wait_for(lambda: s.tier("a") == "l2", 30, what="a to be in L2")
        with s.path("a").open("rb", buffering=0) as file:
            assert file.read(MIB) == DATA["a"][:MIB]
            s.l2.pull_out()
            with pytest.raises(OSError, match=os.strerror(errno.EIO)):
                os.pread(file.fileno(), 4096, 5 * MIB)  # the kernel itself reads it: nobody can help
        wait_for(lambda: s.call("GET", "cache")["tiers"][1]["state"] == "away", 30, what="the disk to be missed")
        for name in ("a", "b", "c"):
            assert s.path(name).read_bytes() == DATA[name]
        assert s.mount.metric("helios_mount_cache_up", tier="l2") == 0
        assert "away" in run(helios_home, "status").stdout
        assert s.mount.log().count("a tier of the cache can't be used") == 1
        s.l2.unmount()
        s.l2.mount()
        wait_for(lambda: s.call("GET", "cache")["tiers"][1]["state"] == "works", 30, what="the disk to be taken back")
        assert s.path("a").read_bytes() == DATA["a"]
