"""Every part of a node is replaced while a container reads: the chart's own pods, as real containers.

Keeper, worker and driver are the DaemonSets' containers of the rendered chart, each with its own namespaces, mounts and
privileges; they meet in hostPaths alone. What a pod has mounted must stay the very mount, through all of it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from helios.home import Home
from helios.http.client import HttpClient
from helios.mounts import FSTYPE, find_mount, mount_table, state_of
from tests.support.chart import Chart
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
from tests.support.csi import Client, capability
from tests.support.mounts import MODES, fails, push, write
from tests.support.node_pods import Node, Pod, load_images

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.containers,
    pytest.mark.skipif("native" not in MODES, reason="a portable mount has no keeper"),
]

OLD, NEW = "0.1.0", "0.2.0"
FILES = {"config.json": b'{"a": 1}', "weights.bin": os.urandom(16 << 20)}
DIGEST = hashlib.sha256(FILES["weights.bin"]).hexdigest()

TAKEN = "another keeper holds"
"""What a worker's log says of it."""

READER = """
import hashlib, json, mmap, os
path, digest = "/model/weights.bin", lambda data: hashlib.sha256(data).hexdigest()
long = open(path, "rb")
mapped = mmap.mmap(long.fileno(), 0, prot=mmap.PROT_READ)
while True:
    mapped.madvise(mmap.MADV_DONTNEED)
    os.posix_fadvise(long.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as again:
        digests = [digest(mapped), digest(file.read()), digest(again)]
    (number,) = [line.split()[0] for line in open("/proc/self/mountinfo") if line.split()[4] == "/model"]
    print(json.dumps([digests, sorted(os.listdir("/model")), os.stat(path).st_dev, number]), flush=True)
"""
"""Reads and maps the file anew, and through a descriptor and a map that it has had from its beginning."""


def mount_id(path: Path) -> str:
    """The number of the mount at a place, which no other one has as long as it is there (proc(5))."""
    table = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return next(line[0] for line in reversed(table) if line[4] == str(path))


@dataclass
class Site:
    """A node whose parts run, with a volume that is published."""

    node: Node
    base: Path
    home: Home
    target: Path
    pods: dict[str, Pod] = field(default_factory=dict)

    def start(self, part: str, version: str) -> Pod:
        """A new pod of a part, beside the one that is there."""
        pod = self.pods[part] = self.node.start(part, version)
        return pod

    def publish(self, volume: str, target: Path) -> None:
        """As the kubelet does."""
        target.parent.mkdir(parents=True, exist_ok=True)
        with self.driver() as driver:
            driver.NodePublishVolume(
                volume_id=volume,
                target_path=str(target),
                volume_capability=capability(),
                volume_context={"model": "org/name"},
            )

    def unpublish(self, volume: str, target: Path) -> None:
        with self.driver() as driver:
            driver.NodeUnpublishVolume(volume_id=volume, target_path=str(target))

    def uninstall(self) -> None:
        """In the order of docs/kubernetes.md; nothing stays mounted."""
        assert self.volumes() == []
        for part in ("worker", "keeper", "csi-node"):
            assert set(self.pods[part].delete().values()) == {0}
        assert self.mounts() == []

    def mounts(self) -> list[Path]:
        """Where models are mounted on the node."""
        ours = [each.mountpoint for each in mount_table() if each.fstype == FSTYPE]
        return [each for each in ours if each.is_relative_to(self.base)]

    @contextlib.contextmanager
    def driver(self) -> Iterator[Client]:
        client = Client(self.node.socket)
        try:
            yield client
        finally:
            client.channel.close()

    def volumes(self) -> Any:
        """The mount's volumes, by its control API, with the commits they pin."""
        state = state_of(self.home, self.node.mountpoint)
        assert state is not None
        client = HttpClient(f"unix:{state.socket}", timeout_s=30)
        try:
            return client.json("GET", "/api/v1/volumes")["volumes"]
        finally:
            client.close()

    def seen(self) -> Any:
        """What no replacement may change."""
        places = (self.node.mountpoint, self.target)
        return [(mount_id(each), find_mount(each)) for each in places], self.volumes()


@contextlib.contextmanager
def running(containerd: Containerd, chart: Chart, base: Path) -> Iterator[Site]:
    """Keeper, worker and driver, of the old version, and a volume."""
    with shared_mount(base / "n"):
        node = Node(containerd, chart, base / "n")
        site = Site(node, base, Home(node.root / "home"), node.kubelet / "pods/a/volumes/kubernetes.io~csi/model/mount")
        push(site.home, write(base / "model", FILES), "org/name")
        for part in ("keeper", "worker", "csi-node"):
            site.start(part, OLD)
        for pod in site.pods.values():
            pod.until("readinessProbe")
        site.publish("v", site.target)
        yield site


@pytest.fixture(scope="module")
def containerd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containerd]:
    with Containerd(tmp_path_factory.mktemp("ctr") / "d") as containerd:
        for version in (OLD, NEW):
            load_images(containerd, version)
        containerd.load("helios.test/reader:1", [busybox(), python_layer()], user="1000:1000", PATH=python_path())
        yield containerd


@pytest.fixture(scope="module")
def chart() -> Iterator[Chart]:
    pytest.importorskip("helm_python", reason="helm-python-sdk has no wheel for this machine")
    chart = Chart()
    yield chart
    chart.close()


@pytest.fixture(scope="module")
def site(containerd: Containerd, chart: Chart, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with running(containerd, chart, tmp_path_factory.mktemp("n")) as site:
        yield site
        site.unpublish("v", site.target)
        site.uninstall()


@pytest.fixture(scope="module")
def reader(containerd: Containerd, site: Site) -> Iterator[Container]:
    """A pod's container, which reads through all the tests."""
    binds = [Bind(site.target, "/model", "HostToContainer"), *python_binds()]
    reader = containerd.run("helios.test/reader:1", "python", "-c", READER, binds=binds)
    yield reader
    assert reader.end(signal.SIGKILL) == 137


def a_round(reader: Container) -> None:
    """Wait until it has read everything from the beginning to the end once more."""
    there, end = len(reader.lines()), time.monotonic() + 60
    while len(reader.lines()) < there + 2:
        assert reader.alive(), reader.log.read_text()
        assert time.monotonic() < end, f"a reader hangs\n{reader.log.read_text()}"
        time.sleep(0.02)


@pytest.fixture
def undisturbed(site: Site, reader: Container) -> Iterator[Any]:
    """The test's replacements leave everything that the reader and its node have as it is."""

    def rounds() -> None:
        a_round(reader)

    rounds()
    before = site.seen()
    yield rounds
    rounds()
    assert site.seen() == before
    (found,) = set(reader.lines())
    digests, names, *_ = json.loads(found)
    assert set(digests) == {DIGEST}
    assert names == sorted(FILES)


def version_of(pod: Pod, container: str) -> str:
    code = "import importlib.metadata as m; print(m.version('helios-llm'))"
    return pod.containers[container].exec("python", "-c", code).strip()


def hears(container: Container, number: signal.Signals) -> bool:
    """Whether its first process has a handler for a signal; without one the kernel keeps it from a process 1."""
    process = Path(f"/proc/{container.pid}")
    status = process.joinpath("status").read_text()
    (caught,) = [int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigCgt:")]
    return b"heliosfs" in process.joinpath("cmdline").read_bytes() and bool(caught >> (number - 1) & 1)


def test_a_worker_is_updated_beside_the_old_one_and_rolled_back(site: Site, undisturbed: Any, wait_for: Any) -> None:
    for version in (NEW, OLD):
        last = site.pods["worker"]
        pod = site.start("worker", version)
        pod.until("readinessProbe")
        assert last.containers["worker"].wait() == 0, "the keeper told it to go"
        last.restart("worker")  # the kubelet does, until its pod is deleted
        wait_for(lambda last=last: hears(last.containers["worker"], signal.SIGTERM), 30, what="its program to run")
        undisturbed()
        assert last.delete() == {"worker": 143}, "it waits for the keeper, and goes when it is told to"
        assert version_of(pod, "worker") == version


def test_a_driver_is_replaced_and_rolled_back(site: Site, undisturbed: Any) -> None:
    for version in (NEW, OLD):
        assert site.pods["csi-node"].delete() == {"driver": 0}
        undisturbed()
        site.start("csi-node", version).until("readinessProbe")
        with site.driver() as driver:
            assert driver.GetPluginInfo().vendor_version == version
        site.publish("v", site.target)  # as the kubelet does that has been started anew


def test_a_keeper_is_replaced_by_the_next_one_and_rolled_back(site: Site, undisturbed: Any, wait_for: Any) -> None:
    """Deleted first, as with OnDelete; and back by one that is there before the last one is gone."""
    for version, beside in ((NEW, False), (OLD, True)):
        last, worker = site.pods["keeper"], site.pods["worker"]
        log = worker.containers["worker"].log
        taken = log.read_text().count(TAKEN) + 1
        if not beside:
            assert last.delete() == {"keeper": 0}
            undisturbed()
        site.start("keeper", version)
        wait_for(lambda log=log, taken=taken: log.read_text().count(TAKEN) == taken, 30, what="the takeover")
        if beside:
            assert last.containers["keeper"].wait() == 0
        undisturbed()
        worker.containers["worker"].end(signal.SIGKILL)  # only a keeper that has the mount can give it to the next
        worker.restart("worker")
        worker.until("readinessProbe")


def test_a_keeper_that_is_removed_before_its_worker_leaves_a_dead_mount(
    containerd: Containerd, chart: Chart, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The order that an uninstallation must not have (docs/kubernetes.md), and what is to be done then."""
    with running(containerd, chart, tmp_path_factory.mktemp("n")) as site:
        binds = [Bind(site.target, "/model", "HostToContainer"), *python_binds()]
        reader = containerd.run("helios.test/reader:1", "python", "-c", READER, binds=binds)
        assert site.pods["keeper"].delete() == {"keeper": 0}
        a_round(reader)
        assert site.pods["worker"].delete() == {"worker": 0}
        assert reader.wait() != 0
        with fails(errno.ENOTCONN, errno.ECONNABORTED):
            os.listdir(site.node.mountpoint)
        site.unpublish("v", site.target)
        assert site.pods["csi-node"].delete() == {"driver": 0}
        subprocess.run(["umount", "-l", site.node.mountpoint], check=True)
        assert site.mounts() == []
