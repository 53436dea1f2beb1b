"""``helios mount --shadow``: what users read beside a plain download, on real mounts of a real registry."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from helios.home import Home
from tests.support.hub_front import HubFront
from tests.support.mounts import MODES, Mount, mounted, push, run, write
from tests.support.registry import Running, running_registry

pytestmark = pytest.mark.fuse

MIB = 1 << 20
FILES = {
    "config.json": b'{"hidden_size": 64}\n' * 10,
    "data/part 1 (ü).txt": b"text\n" * 1000,
    "model.bin": random.Random(5).randbytes(6 * MIB + 5),
}


@pytest.fixture
def registry(helios: Any, helios_home: Home, tmp_path: Path) -> Iterator[Running]:
    with running_registry(helios) as running:
        push(helios_home, write(tmp_path / "model", FILES), "org/name")
        yield running


def cold(path: Path) -> bytes:
    """A file's bytes as the mount gives them now, whatever the kernel kept of it."""
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return file.read()


def read_all(mount: Mount) -> None:
    """Every file twice: as it comes, and when it is whole."""
    files = mount.path / "org/name/@main"
    for _ in range(2):
        for name, data in FILES.items():
            assert cold(files / name) == data
        end = time.monotonic() + 20
        while any(os.getxattr(files / name, "user.helios.tier") != b"l1" for name in FILES):
            assert time.monotonic() < end
            time.sleep(0.02)


def report(mount: Mount) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(mount.page("/api/v1/shadow"))
    return found


def errors(mount: Mount, message: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in mount.log().splitlines()]
    return [line for line in lines if line["level"] == "error" and message in json.dumps(line)]


@pytest.mark.parametrize("mode", MODES)
def test_equal_reads_are_counted_by_the_way_they_went(
    registry: Running, helios_home: Home, tmp_path: Path, wait_for: Callable[..., None], mode: str
) -> None:
    environ = {"HELIOS_REGISTRY__URLS": registry.url, "HELIOS_MOUNT__MODE": mode}
    with mounted(helios_home, tmp_path / "mnt", "--shadow", "100", **environ) as mount:
        read_all(mount)
        wait_for(lambda: report(mount)["compared"] >= 6 and not report(mount)["waiting"], 30, "all to be compared")
        found = report(mount)
        assert (found["mismatches"], found["mount_errors"], found["download_errors"]) == (0, 0, 0)
        assert found["percent"] == 100
        assert found["bytes"] >= sum(map(len, FILES.values()))
        for side in ("mount", "download"):
            seen = found[f"{side}_seconds"]
            assert seen["samples"] == found["compared"]
            assert 0 < seen["p50"] <= seen["p99"] < 30
            assert mount.metric("helios_mount_shadow_seconds_count", side=side) == found["compared"]
        ways = {way: mount.metric("helios_mount_shadow_compared_total", way=way) for way in ("read", "passthrough")}
        assert ways["read"] >= 3
        assert (ways["passthrough"] >= 3) == (mode == "native")
        assert mount.metric("helios_mount_shadow_bytes_total") == found["bytes"]
        shown = json.loads(run(helios_home, "status", "--json").stdout)["mounts"][0]["shadow"]
        assert shown["compared"] == found["compared"]
        told = " ".join(run(helios_home, "status").stdout.split())
        assert f"{shown['compared']} reads compared (100%) 0 differ, 0 failed, 0 dropped" in told


@pytest.mark.parametrize("mode", MODES)
def test_a_download_that_differs_is_reported_and_no_read_notices(
    registry: Running,
    helios_home: Home,
    tmp_path: Path,
    wait_for: Callable[..., None],
    expected_log_errors: Callable[[str], None],
    mode: str,
) -> None:
    expected_log_errors("the mount and a plain download differ")
    with HubFront(registry.url, "lies") as front:
        environ = {"HELIOS_REGISTRY__URLS": front.url, "HELIOS_MOUNT__MODE": mode}
        with mounted(helios_home, tmp_path / "mnt", "--shadow", "100", **environ) as mount:
            read_all(mount)
            wait_for(lambda: report(mount)["compared"] >= 6 and not report(mount)["waiting"], 30, "the comparisons")
            found = report(mount)
            assert found["mismatches"] == found["compared"] == mount.metric("helios_mount_shadow_mismatches_total")
            last = found["last_mismatches"][-1]
            assert last["repo"] == "models/org/name"
            assert last["path"] in FILES
            assert last["first"] == last["offset"] + last["count"] // 2
            assert last["mount_sha256"] != last["download_sha256"]
            ways = {mismatch["way"] for mismatch in found["last_mismatches"]}
            assert ("passthrough" in ways) == (mode == "native")
            line = errors(mount, "a plain download differ")[-1]
            told = json.dumps(line, ensure_ascii=False)
            assert all(str(last[field]) in told for field in ("repo", "commit", "path", "mount_sha256"))
            assert f"{found['mismatches']} differ" in run(helios_home, "status").stdout


@pytest.mark.parametrize("mode", MODES)
def test_a_dead_or_stalled_download_is_counted_and_no_read_notices(
    registry: Running, helios_home: Home, tmp_path: Path, wait_for: Callable[..., None], mode: str
) -> None:
    with HubFront(registry.url, "dead") as front:
        environ = {"HELIOS_REGISTRY__URLS": front.url, "HELIOS_MOUNT__MODE": mode}
        with mounted(helios_home, tmp_path / "mnt", "--shadow", "100", **environ) as mount:
            read_all(mount)
            wait_for(lambda: report(mount)["download_errors"] >= 6, 30, "the failures to be counted")
            assert mount.log().count("a read can't be compared") == 1, "told once, not for every read"
            front.mode = "stalls"
            files = mount.path / "org/name/@main"
            begin = time.monotonic()
            while not report(mount)["dropped"]:
                for name, data in FILES.items():
                    assert cold(files / name) == data
                assert time.monotonic() - begin < 60
            found = report(mount)
            assert found["waiting"] <= 64
            assert (found["compared"], found["mismatches"]) == (0, 0)
            assert mount.metric("helios_mount_shadow_dropped_total") >= found["dropped"]
            begin = time.monotonic()
            run(helios_home, "umount", mount.path)
            assert time.monotonic() - begin < 15, "nobody waits for what stalls"


def test_without_the_option_nothing_is_compared(registry: Running, helios_home: Home, tmp_path: Path) -> None:
    with HubFront(registry.url) as front:
        environ = {"HELIOS_REGISTRY__URLS": front.url}
        with mounted(helios_home, tmp_path / "mnt", **environ) as mount:
            read_all(mount)
            assert report(mount)["percent"] == 0
            assert json.loads(run(helios_home, "status", "--json").stdout)["mounts"][0]["shadow"] is None
        assert front.asked == 0
    done = run(helios_home, "mount", tmp_path / "mnt", "--shadow", "101", code=2)
    assert "101" in done.stderr
    done = run(helios_home, "mount", tmp_path / "mnt", code=2, HELIOS_MOUNT__SHADOW_PERCENT="-1")
    assert "mount.shadow_percent is -1" in done.stderr
