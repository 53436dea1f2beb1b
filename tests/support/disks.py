"""Small file systems of one's own, to fill up, to make read-only, to take away."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from helios.mounts import mount_table


@contextlib.contextmanager
def small_disk(path: Path, mib: int, kind: str = "tmpfs") -> Iterator[Path]:
    """A real file system of that many MiB at ``path``: ``tmpfs``, or ``ext4`` in a file. Needs root."""
    if os.getuid() != 0:
        pytest.skip("mounting a small disk needs root")
    path.mkdir()
    if kind == "tmpfs":
        _do("mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(path))
        image = None
    else:
        image = path.with_name(f"{path.name}.image")
        with image.open("wb") as file:
            file.truncate(mib << 20)
        _do("mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", str(image))
        _do("mount", "-o", "loop,errors=remount-ro", str(image), str(path))
    try:
        yield path
    finally:
        _do("umount", "-l", str(path))
        if image is not None:
            image.unlink()


@contextlib.contextmanager
def overlay(path: Path, mib: int) -> Iterator[Path]:
    """An overlayfs of that many MiB at ``path``, on a tmpfs beside it; skips where the kernel has none."""
    with small_disk(path.with_name(f"{path.name}.layers"), mib) as layers:
        for name in ("lower", "upper", "work"):
            (layers / name).mkdir()
        path.mkdir()
        options = f"lowerdir={layers}/lower,upperdir={layers}/upper,workdir={layers}/work"
        try:
            _do("mount", "-t", "overlay", "-o", options, "overlay", str(path))
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no overlayfs can be mounted here: {error.stderr.strip()}")
        try:
            yield path
        finally:
            _do("umount", "-l", str(path))


def fill_up(disk: Path, but: int = 0) -> Path:
    """Fill a disk to the last block, ``but`` for that many bytes; returns the file that does it."""
    path = disk / "others"
    with path.open("ab", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            while _takes(file.fileno(), size):
                pass
        if but:
            os.ftruncate(file.fileno(), os.fstat(file.fileno()).st_size - but)
    return path


def remount(disk: Path, how: str) -> None:
    """``ro`` or ``rw``; refused while a file is open for writing."""
    _do("mount", "-o", f"remount,{how}", str(disk))


def fail(disk: Path) -> None:
    """An error that makes an ext4 read-only at once, whoever writes there, until it is unmounted."""
    device = next(entry.source for entry in mount_table() if entry.mountpoint == disk)
    Path("/sys/fs/ext4", Path(device).name, "trigger_fs_error").write_text("a test")


@contextlib.contextmanager
def covered(path: Path) -> Iterator[None]:
    """While the block runs nothing below the directory can be opened for writing, made or removed; what is open can
    be written."""
    _do("mount", "--bind", str(path), str(path))
    try:
        _do("mount", "-o", "remount,bind,ro", str(path))
        yield
    finally:
        _do("umount", "-l", str(path))


def _takes(fd: int, size: int) -> bool:
    try:
        return os.write(fd, bytes(size)) > 0
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return False


def _do(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


SHUTDOWN = 0x8004587D
"""EXT4_IOC_SHUTDOWN: from now on everything fails with EIO, as when a disk is pulled out."""


class LoopDisk:
    """An ext4 filesystem on a device of its own, mounted at ``path``."""

    def __init__(self, path: Path, device: str) -> None:
        self.path, self._device = path, device
        path.mkdir()
        self.mount()

    def mount(self, *options: str) -> None:
        """Mount it. One that was pulled out stays so while a mount namespace has it, and others here may copy ours."""
        end = time.monotonic() + 60
        while True:
            _do("mount", *options, self._device, str(self.path))
            try:
                os.listdir(self.path)
            except OSError as error:
                if error.errno != errno.EIO or time.monotonic() > end:
                    raise
            else:
                return
            _do("umount", "-l", str(self.path))
            time.sleep(0.2)

    def unmount(self, *options: str) -> None:
        _do("umount", *options, str(self.path))

    def make_read_only(self, really: bool = True) -> None:
        remount(self.path, "ro" if really else "rw")

    def pull_out(self) -> None:
        """The disk is gone: what is open, cached pages included, can't be read any more."""
        fd = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, SHUTDOWN, struct.pack("I", 2))
        finally:
            os.close(fd)

    def free_device(self) -> None:
        while os.path.ismount(self.path):
            _do("umount", "-l", str(self.path))
        _do("losetup", "-d", self._device)


@contextlib.contextmanager
def loop_disk(directory: Path, mib: int) -> Iterator[LoopDisk]:
    """A new one, gone afterwards; skips where that can't be."""
    if os.getuid() != 0:
        pytest.skip("mounting a filesystem needs root")
    image = directory / "disk.img"
    with image.open("wb") as file:
        file.truncate(mib << 20)
    _do("mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", str(image))
    try:
        device = _do("losetup", "--find", "--show", str(image))
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
                _do("losetup", "-d", device)
        image.unlink()
