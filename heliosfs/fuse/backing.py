"""Backing files: which files the kernel reads itself, registered on the connection (linux/fuse.h, Linux >= 6.9)."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import struct
from pathlib import Path
from typing import Final

from helios.mounts import mount_of
from heliosfs.fuse.modes import IoModes
from heliosfs.fuse.passthrough import Passthrough

log = logging.getLogger("heliosfs.fuse")

BACKING_OPEN: Final = 0x4010E501
BACKING_CLOSE: Final = 0x4004E502
_BACKING = struct.Struct("<iIQ")


class Backings:
    """Registers and forgets backing files of one connection; ``modes`` writes down what is under way, ``passthrough``
    knows of which filesystems they may be."""

    def __init__(self, device: int, modes: IoModes, passthrough: Passthrough) -> None:
        self._device, self._modes, self._passthrough = device, modes, passthrough

    def register(self, fd: int) -> int:
        """Let the kernel read this open file itself; returns the backing id, 0 when it can't (or there is no file).

        ``IoModes.opened`` writes the id down.
        """
        if fd < 0 or not self._passthrough.possible(device := os.fstat(fd).st_dev):
            return 0
        self._modes.registering = True
        try:
            return self._open(fd)
        except OSError as error:
            self._refused(fd, device, error)
            return 0

    def try_out(self, fd: int) -> None:
        """Find out whether the filesystem of an open file is refused, before anybody opens a file of it. Not while it
        is unsettled what a dead worker registered."""
        if self._modes.registering or not self._passthrough.possible(device := os.fstat(fd).st_dev):
            return
        self._modes.registering = True
        try:
            self.close(self._open(fd))
        except OSError as error:
            self._refused(fd, device, error)
        self._modes.registering = False

    def close(self, *ids: int) -> None:
        """Forget backing ids; 0 stands for none, and what an earlier worker closed is closed."""
        for backing in filter(None, ids):
            with contextlib.suppress(FileNotFoundError):
                fcntl.ioctl(self._device, BACKING_CLOSE, struct.pack("<I", backing))

    def find_lost(self) -> None:
        """Close what a worker registered that died before it could write the id down. Called at the start."""
        if not self._modes.registering:
            return
        probe = os.memfd_create("probe", os.MFD_CLOEXEC)
        try:
            following = self._open(probe)
            self.close(*self._modes.lost(following), following)
        except OSError as error:
            log.warning("a backing file may stay open until the unmount", extra={"reason": error.strerror})
        finally:
            os.close(probe)
        self._modes.registering = False

    def _refused(self, fd: int, device: int, error: OSError) -> None:
        place = _place(fd)
        lasts = self._passthrough.refused(device, place, error.errno or 0)
        fields = {"filesystem": place, "reason": error.strerror, "lasts": lasts}
        log.warning("the kernel refuses passthrough; a file is read through the channel", extra=fields)

    def _open(self, fd: int) -> int:
        backing: int = fcntl.ioctl(self._device, BACKING_OPEN, bytearray(_BACKING.pack(fd, 0, 0)))
        return backing


def _place(fd: int) -> str:
    """Where an open file is, for people: its filesystem and where that is mounted."""
    with contextlib.suppress(OSError):
        entry = mount_of(Path(os.readlink(f"/proc/self/fd/{fd}")))
        if entry is not None:
            return f"{entry.fstype} at {os.fsencode(entry.mountpoint).decode(errors='backslashreplace')}"
    return "a filesystem that is mounted elsewhere"
