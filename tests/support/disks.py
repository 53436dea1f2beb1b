"""Real filesystems for tests, in a file and a loop device or in memory: they can be made to fail. Root only."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SHUTDOWN = 0x8004587D
"""EXT4_IOC_SHUTDOWN: from now on everything fails with EIO, as when a disk is pulled out."""


def run(*command: str | Path) -> str:
    return subprocess.run([*map(str, command)], check=True, capture_output=True, text=True).stdout.strip()


class LoopDisk:
    """An ext4 filesystem on a device of its own, mounted at ``path``."""

    def __init__(self, path: Path, device: str) -> None:
        self.path, self._device = path, device
        path.mkdir()
        self.mount()

    def mount(self, *options: str) -> None:
        run("mount", *options, self._device, self.path)

    def unmount(self, *options: str) -> None:
        run("umount", *options, self.path)

    def make_read_only(self, really: bool = True) -> None:
        run("mount", "-o", f"remount,{'ro' if really else 'rw'}", self.path)

    def pull_out(self) -> None:
        """The disk is gone: what is open, cached pages included, can't be read any more."""
        fd = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, SHUTDOWN, struct.pack("I", 2))
        finally:
            os.close(fd)

    def free_device(self) -> None:
        while os.path.ismount(self.path):
            run("umount", "-l", self.path)
        run("losetup", "-d", self._device)


@contextmanager
def loop_disk(directory: Path, mib: int) -> Iterator[LoopDisk]:
    """A new one, gone afterwards; skips where that can't be."""
    if os.getuid() != 0:
        pytest.skip("mounting a filesystem needs root")
    image = directory / "disk.img"
    with image.open("wb") as file:
        file.truncate(mib << 20)
    run("mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", image)
    try:
        device = run("losetup", "--find", "--show", image)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"there are no loop devices: {error}")
    disk = None
    try:
        disk = LoopDisk(directory / "disk", device)
        yield disk
    finally:
        with contextlib.suppress(subprocess.CalledProcessError):
            if disk is not None:
                disk.free_device()
            else:
                run("losetup", "-d", device)
        image.unlink()
