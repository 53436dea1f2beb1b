"""Published volumes in real containers: containerd and runc as on a node, a user without any rights, kills under it.

The kubelet's directory is a shared mount, as a node's root is. The containers' root file system is a static busybox.
"""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helios.home import Home
from helios.mounts import find_mount
from tests.support.containers import (
    Bind,
    Container,
    Containerd,
    busybox,
    python_binds,
    python_layer,
    python_path,
    shared_mount,
)
from tests.support.csi import Driver, running_driver
from tests.support.mounts import MODES, Mount, call, mounted, next_worker, push, worker, write

pytestmark = [pytest.mark.fuse, pytest.mark.containers]

FILES = {"config.json": b'{"a": 1}', "weights.bin": os.urandom(8 << 20), "sub/deep.txt": b"deep"}
DIGESTS = {name: hashlib.sha256(data).hexdigest() for name, data in FILES.items()}
SUMS = "".join(f"{digest}  {name}\n" for name, digest in sorted(DIGESTS.items()))
LISTED = "find . -type f | sed 's|^./||' | sort | xargs sha256sum"


@pytest.fixture(scope="module")
def containerd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containerd]:
    with Containerd(tmp_path_factory.mktemp("ctr") / "d") as containerd:
        containerd.load("helios.test/busybox:1", [busybox()], user="1000:1000")
        containerd.load("helios.test/python:1", [busybox(), python_layer()], user="1000:1000", PATH=python_path())
        yield containerd


@pytest.fixture(scope="module")
def mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    base = tmp_path_factory.mktemp("node")
    home = Home(base / "home")
    push(home, write(base / "model", FILES), "org/name")
    with mounted(home, base / "mnt") as mount:
        yield mount


@pytest.fixture(scope="module")
def driver(mount: Mount, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    base = tmp_path_factory.mktemp("driver")
    with shared_mount(base / "kubelet"), running_driver(mount.home, base) as driver:
        yield driver


@pytest.fixture
def volume(driver: Driver, mount: Mount) -> Iterator[Path]:
    """A volume that is published; in the end it is not, and nothing is left of it."""
    target = driver.target("pod")
    driver.publish("v", target, model="org/name")
    yield target
    driver.unpublish("v", target)
    nothing_is_left(driver, mount)


def nothing_is_left(driver: Driver, mount: Mount) -> None:
    assert driver.mounts() == [str(driver.kubelet)]
    assert call(mount, "GET", "volumes") == {"volumes": []}


def test_a_user_without_rights_reads_a_volume_and_can_not_write(containerd: Containerd, volume: Path) -> None:
    script = f"""
        id -u; grep -E 'Cap(Prm|Eff|Bnd|Amb)|NoNewPrivs' /proc/self/status
        cd /model && {LISTED}
        echo x > new || echo x >> config.json || rm config.json || mkdir d || mv sub other || chmod 777 sub
    """
    status, said = containerd.once(
        "helios.test/busybox:1", "sh", "-c", script, binds=[Bind(volume, "/model", "HostToContainer")]
    )
    user, *rights = said.splitlines()[:6]
    assert user == "1000"
    assert [line.split()[1] for line in rights] == ["0" * 16] * 4 + ["1"]
    sums, refused = said.splitlines()[6:9], said.splitlines()[9:]
    assert "\n".join(sums) + "\n" == SUMS
    assert status == 1
    assert len(refused) == 6
    assert all("Read-only file system" in line for line in refused), refused


def test_a_hub_cache_is_one_for_the_hubs_own_client_in_a_container(
    containerd: Containerd, driver: Driver, mount: Mount
) -> None:
    target = driver.target("hub")
    driver.publish("h", target, model="org/name", format="hub")
    code = (
        "import os; from huggingface_hub import snapshot_download; path = snapshot_download('org/name');"
        "print(os.getuid(), path, sorted(os.listdir(path)), open(path + '/sub/deep.txt').read())"
    )
    found, said = containerd.once(
        "helios.test/python:1",
        *("python", "-c", code),
        binds=[Bind(target, "/hub"), *python_binds()],
        environ={"HF_HUB_CACHE": "/hub", "HF_HUB_OFFLINE": "1", "HF_HOME": "/tmp", "HF_XET_CACHE": "/tmp"},
    )
    assert found == 0, said
    (commit,) = os.listdir(target / "models--org--name/snapshots")
    path = f"/hub/models--org--name/snapshots/{commit}"
    assert said == f"1000 {path} ['config.json', 'sub', 'weights.bin'] deep\n"
    driver.unpublish("h", target)
    nothing_is_left(driver, mount)


READ_ON = f"while :; do cd /model && echo $({LISTED} | cut -c1-64); done"


def rounds(container: Container, wait_for: Any, more: int = 2) -> None:
    """Wait until it has read everything from the beginning to the end once more."""
    there = len(container.lines())
    wait_for(lambda: len(container.lines()) >= there + more or not container.alive(), 60, what="a round of reading")
    assert container.alive(), container.log.read_text()


@pytest.mark.skipif("native" not in MODES, reason="a portable mount has no worker that could be replaced")
def test_a_container_reads_on_while_worker_and_plugin_are_killed(
    containerd: Containerd, driver: Driver, mount: Mount, volume: Path, wait_for: Any
) -> None:
    container = containerd.run(
        "helios.test/busybox:1", "sh", "-c", READ_ON, binds=[Bind(volume, "/model", "HostToContainer")]
    )
    rounds(container, wait_for)
    where = find_mount(volume)
    for _ in range(3):
        last = worker(mount)
        last.send(signal.SIGKILL)
        driver.kill()
        rounds(container, wait_for)
        next_worker(mount, last)
        driver.start()
        driver.publish("v", volume, model="org/name")
        rounds(container, wait_for)
        worker(mount).send(signal.SIGKILL)
        rounds(container, wait_for)
    assert find_mount(volume) == where
    assert container.end(signal.SIGKILL) == 137
    wanted = " ".join(DIGESTS[name] for name in sorted(DIGESTS))
    assert set(container.lines()) == {wanted}


def test_a_container_that_follows_the_kubelets_directory_sees_volumes_come_and_go(
    containerd: Containerd, driver: Driver, mount: Mount, wait_for: Any
) -> None:
    target = driver.target("late")
    pods = driver.kubelet / "pods"
    container = containerd.run("helios.test/busybox:1", "sleep", "600", binds=[Bind(pods, "/pods", "HostToContainer")])
    inside = f"/pods/{target.relative_to(pods)}"
    looked = f"cd {inside} 2>/dev/null && {LISTED} || echo nothing"
    assert container.exec("sh", "-c", looked) == "nothing\n"
    for _ in range(2):
        driver.publish("late", target, model="org/name")
        assert container.exec("sh", "-c", looked) == SUMS
        driver.unpublish("late", target)
        assert container.exec("sh", "-c", looked) == "nothing\n"
        assert inside not in container.exec("cat", "/proc/mounts")
        nothing_is_left(driver, mount)
    assert container.end(signal.SIGKILL) == 137


def test_a_volume_that_is_unpublished_under_a_container_leaves_nothing_when_that_ends(
    containerd: Containerd, driver: Driver, mount: Mount
) -> None:
    """Its own bind, with no propagation, as a volumeMount has it that says nothing: only the container has it still."""
    target = driver.target("gone")
    driver.publish("gone", target, model="org/name")
    container = containerd.run(
        "helios.test/busybox:1", "sh", "-c", "exec 3</model/weights.bin; sleep 600", binds=[Bind(target, "/model")]
    )
    assert container.exec("sh", "-c", "cd /model && sha256sum weights.bin").split()[0] == DIGESTS["weights.bin"]
    driver.unpublish("gone", target)
    assert not target.exists()
    nothing_is_left(driver, mount)
    assert container.exec("sha256sum", "/proc/1/fd/3").split()[0] == DIGESTS["weights.bin"]
    assert container.end(signal.SIGKILL) == 137
    nothing_is_left(driver, mount)
