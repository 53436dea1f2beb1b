"""A disk that is full under the mount or the kubelet: the kubelet is told so, nothing is left, and room is enough."""

import os
from pathlib import Path

import pytest

from tests.support.csi import refused, running_driver
from tests.support.disks import fill_up, small_disk
from tests.support.mounts import call, mounted, push, write

pytestmark = [pytest.mark.fuse, pytest.mark.skipif(os.geteuid() != 0, reason="only root may bind-mount")]
FILES = {"config.json": b"{}"}


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk", 16, "ext4") as path:
        yield path


def below(directory: Path) -> set[str]:
    """What is in a directory, whatever it is."""
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}


def test_a_full_disk_under_the_mounts_volumes(helios_home, tmp_path, disk):
    push(helios_home, write(tmp_path / "m", FILES), "org/name")
    env = {"HELIOS_MOUNT__CACHE": str(disk / "cache")}
    with mounted(helios_home, tmp_path / "mnt", **env) as mount, running_driver(helios_home, tmp_path) as driver:
        driver.publish("before", driver.target("before"), model="org/name")
        records = disk / "cache" / "volumes"
        there, target = below(records), driver.target("pod")
        others = fill_up(disk)
        for _ in range(3):
            with refused("RESOURCE_EXHAUSTED", "No space left"):
                driver.publish("v", target, model="org/name")
        assert not target.exists()
        assert below(records) == there
        assert [record["id"] for record in call(mount, "GET", "volumes")["volumes"]] == ["csi.before"]
        assert (driver.target("before") / "config.json").read_bytes() == b"{}"
        driver.publish("before", driver.target("before"), model="org/name")  # nothing has to be written for that
        others.unlink()
        driver.publish("v", target, model="org/name")
        assert (target / "config.json").read_bytes() == b"{}"
        for name, volume in (("pod", "v"), ("before", "before")):
            driver.unpublish(volume, driver.target(name))
        assert driver.mounts() == []
        assert call(mount, "GET", "volumes") == {"volumes": []}


def test_a_full_disk_under_the_kubelets_directory(helios_home, tmp_path, disk):
    push(helios_home, write(tmp_path / "m", FILES), "org/name")
    kubelet = disk / "kubelet"
    kubelet.mkdir()
    with (
        mounted(helios_home, tmp_path / "mnt") as mount,
        running_driver(helios_home, tmp_path, "--kubelet-dir", str(kubelet)) as driver,
    ):
        driver.kubelet = kubelet
        target, full = driver.target("pod"), driver.target("full")
        others = fill_up(disk)
        with refused("RESOURCE_EXHAUSTED", "can't be made: No space left.*kubelet's directory"):
            driver.publish("v", full, model="org/name")
        assert not full.exists()
        assert driver.mounts() == []
        assert call(mount, "GET", "volumes") == {"volumes": []}
        others.unlink()
        driver.publish("v", target, model="org/name")
        assert (target / "config.json").read_bytes() == b"{}"
        driver.unpublish("v", target)
        assert not target.exists()
