"""Small files of a real mount whose disk is full: they stay readable, and quick to read, without disk or registry."""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helios.home import Home
from tests.support.disks import fill_up
from tests.support.mounts import MODES, Mount, mounted, push, run, write
from tests.support.registry import running_registry

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(os.getuid() != 0, reason="mounting a small tmpfs needs root"),
]

MIB = 1 << 20
SMALL = {
    "config.json": json.dumps({"hidden_size": 4096}).encode() * 20,
    "tokenizer.json": random.Random(1).randbytes(3 * MIB),
}
FILES = {**SMALL, "model.bin": random.Random(2).randbytes(40 * MIB)}


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A cache directory on a disk of its own."""
    path = tmp_path / "disk"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", str(path)], check=True)
    yield path
    subprocess.run(["umount", str(path)], check=True)


def cold(path: Path) -> bytes:
    """A file's bytes as the mount gives them now, whatever the kernel kept of it."""
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return file.read()


@pytest.mark.parametrize("mode", MODES)
def test_small_files_need_neither_disk_nor_registry(
    helios: Any, helios_home: Home, tmp_path: Path, full_disk: Path, mode: str
) -> None:
    with running_registry(helios) as registry:
        commit = push(helios_home, write(tmp_path / "model", FILES), "org/name")
        environ = {"HELIOS_REGISTRY__URLS": registry.url, "HELIOS_MOUNT__POOL_MIB": "24", "HELIOS_MOUNT__MODE": mode}
        with mounted(helios_home, tmp_path / "mnt", "--cache", str(full_disk), **environ) as mount:
            fill_up(full_disk)
            files = mount.path / "org/name" / commit
            for name in (*SMALL, "model.bin"):
                assert cold(files / name) == FILES[name]
            registry.kill()
            before = pool(mount)["hits"]["small"]
            channel = mount.metric("helios_mount_channel_reads_total")
            for _ in range(3):
                for name, data in SMALL.items():
                    assert cold(files / name) == data
            shown = pool(mount)
            assert shown["hits"]["small"] >= before + 6
            assert shown["used"] <= shown["limit"] == 24 * MIB
            assert mount.metric("helios_mount_pool_used_bytes") == shown["used"]
            assert mount.metric("helios_mount_pool_limit_bytes") == 24 * MIB
            if mode == "native":
                assert mount.metric("helios_mount_channel_reads_total") > channel, "answered without the event loop"
            status = json.loads(run(helios_home, "status", "--json").stdout)
            assert status["mounts"][0]["pool"]["limit"] == 24 * MIB
            assert "pool" in run(helios_home, "status").stdout


def pool(mount: Mount) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(mount.page("/api/v1/status"))["pool"]
    return found
