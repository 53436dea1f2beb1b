"""A mount of which one disk hangs: what it does not hold alone goes on, and the rest when it does."""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from helios.home import Home
from helios.mounts import state_of
from tests.support.disks import small_disk
from tests.support.hanging import HangingDisk, hanging_disk
from tests.support.mounts import MODES, Mount, mounted, push, write

pytestmark = pytest.mark.fuse

MIB = 1 << 20
DATA = {name: random.Random(name).randbytes(6 * MIB + 5) for name in ("a", "b", "c", "d")}
SOON_S = 20.0
"""The patience with a disk, and what a busy machine adds. A worker that does not answer is replaced after 10 s."""


class Call:
    """A call in a thread of its own."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._call, self._outcome = call, list[BaseException | None]()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._call()
            self._outcome.append(None)
        except BaseException as error:
            self._outcome.append(error)

    def ends_soon(self) -> None:
        self._thread.join(SOON_S)
        assert self._outcome == [None], self._outcome or "it hangs"


def soon(call: Callable[[], object]) -> None:
    """The call returns soon, and raises nothing."""
    Call(call).ends_soon()


@dataclass
class Scene:
    """A mount with files in both tiers, one of which, ``hangs``, is on ``disk``."""

    home: Home
    mount: Mount
    disk: HangingDisk
    hangs: str
    other: Path
    wait_for: Callable[..., None]

    def path(self, name: str) -> Path:
        return self.mount.path / "org" / name / "@main" / "weights.bin"

    def tier(self, name: str) -> str:
        return os.getxattr(self.path(name), "user.helios.tier").decode()

    def read(self, name: str) -> None:
        assert self.path(name).read_bytes() == DATA[name]

    def fill(self) -> None:
        """Have three of the files on the disks."""
        for name in ("a", "b", "c"):
            self.read(name)
            self.wait_for(lambda name=name: self.tier(name) in ("l1", "l2"), 30, what=f"{name} to be local")
        both = {"l1", "l2"}
        self.wait_for(lambda: {self.tier(name) for name in "abc"} == both, 30, what="both tiers to have some")

    def up(self) -> bool:
        return self.mount.metric("helios_mount_cache_up", tier=self.hangs) == 1

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """The disk does not answer, and does again in the end; the mount's processes are the same all the time."""
        serving = state_of(self.home, self.mount.path)
        self.disk.stop()
        try:
            yield
        finally:
            self.disk.go_on()
        self.wait_for(self.up, 30, what="it to be taken back")
        for name in DATA:
            self.read(name)
        assert state_of(self.home, self.mount.path) == serving


@pytest.fixture
def scene(helios_home: Home, tmp_path: Path, hangs: str, mode: str, wait_for: Callable[..., None]) -> Iterator[Scene]:
    for name, data in DATA.items():
        push(helios_home, write(tmp_path / name, {"weights.bin": data, "config.json": b"{}"}), f"org/{name}")
    with hanging_disk(tmp_path) as disk, small_disk(tmp_path / "other", 64) as other:
        roots = {"l1": other / "tier", "l2": other / "tier"} | {hangs: disk.path / "tier"}
        settings = {
            "HELIOS_MOUNT__MODE": mode,
            "HELIOS_MOUNT__CACHE": str(roots["l1"]),
            "HELIOS_MOUNT__CACHE_LIMIT_GIB": str(9 / 1024),
            "HELIOS_MOUNT__L2": str(roots["l2"]),
            "HELIOS_MOUNT__L2_MIN_FREE": "0",
        }
        with mounted(helios_home, tmp_path / "mnt", **settings) as mount:
            yield Scene(helios_home, mount, disk, hangs, other / "tier", wait_for)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("hangs", ["l1", "l2"])
def test_what_others_can_serve_goes_on(scene: Scene) -> None:
    scene.fill()
    mount = scene.mount
    full = os.statvfs(mount.path).f_blocks
    with scene.stopped():
        for name in DATA:
            soon(lambda name=name: os.listdir(mount.path / "org" / name / "@main"))
            soon(lambda name=name: scene.read(name))
            soon(lambda name=name: scene.tier(name))
        soon(lambda: os.statvfs(mount.path).f_blocks == full)
        assert not scene.up()


PLACES = range(0, 6 * MIB, MIB // 4)


@pytest.mark.parametrize(("hangs", "mode"), [("l1", MODES[0]), ("l2", MODES[-1])])
def test_reads_under_way_when_a_disk_stops(scene: Scene) -> None:
    """Many READs of files that were open before: those of the other tier go on, and the bytes of its own come from
    elsewhere."""
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(scene.path(name).open("rb")) for name in "abc"}  # so they are read by READs
        scene.fill()
        stuck = [name for name in files if scene.tier(name) == scene.hangs]
        others = [name for name in files if name not in stuck]
        forget([*(file.fileno() for file in files.values())], [*scene.other.glob("blobs/*/*")])

        def part(name: str, at: int) -> None:
            assert os.pread(files[name].fileno(), 100, at) == DATA[name][at : at + 100]

        with scene.stopped():
            reads = [Call(lambda name=name, at=at: part(name, at)) for name in stuck for at in PLACES]
            time.sleep(1.0)  # so that they are at the disk
            for name in others:
                for at in PLACES:
                    soon(lambda name=name, at=at: part(name, at))
            for each in reads:
                each.ends_soon()
            for name in files:
                soon(lambda name=name: scene.read(name))
            assert not scene.up()
        for name in files:
            for at in PLACES:
                part(name, at + 5000)


def forget(handles: list[int], paths: list[Path]) -> None:
    """Have no page of these in memory, and none read ahead."""
    for path in paths:
        with path.open("rb") as file:
            os.fdatasync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    for handle in handles:
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_RANDOM)
