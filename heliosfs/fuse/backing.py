"""Backing files: which files the kernel reads itself, registered on the connection (linux/fuse.h, Linux >= 6.9)."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import struct
from typing import Final

from heliosfs.fuse.modes import IoModes

log = logging.getLogger("heliosfs.fuse")

BACKING_OPEN: Final = 0x4010E501
BACKING_CLOSE: Final = 0x4004E502
_BACKING = struct.Struct("<iIQ")


class Backings:
    """Registers and forgets backing files of one connection; ``modes`` writes down what is under way."""

    def __init__(self, device: int, modes: IoModes) -> None:
        self._device, self._modes = device, modes
        self._possible = True

    def register(self, fd: int) -> int:
        """Let the kernel read this open file itself; returns the backing id, 0 when it can't (or there is no file).

        ``IoModes.opened`` writes the id down.
        """
        if fd < 0 or not self._possible:
            return 0
        self._modes.registering = True
        try:
            return self._open(fd)
        except OSError as error:
            self._possible = False
            log.warning(
                "the kernel refuses passthrough; files are read through the channel", extra={"reason": error.strerror}
            )
            return 0

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

    def _open(self, fd: int) -> int:
        backing: int = fcntl.ioctl(self._device, BACKING_OPEN, bytearray(_BACKING.pack(fd, 0, 0)))
        return backing
