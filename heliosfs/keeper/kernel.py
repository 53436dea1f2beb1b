"""Making a mount, letting it go, and what the kernel says of it.

Nothing in here looks at what is mounted: a mount whose worker hangs would hang us too.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import select
import struct
from typing import Final

FSTYPE: Final = "fuse.helios"
OPTIONS: Final = "allow_other,default_permissions,max_read=1048576"
REPLY: Final = struct.Struct("<IiQ")
"""What every answer begins with: length, error, number of the request (linux/fuse.h)."""

_FLAGS = 1 | 2 | 4 | 1024  # MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOATIME
_DETACH = 2 | 8  # MNT_DETACH, UMOUNT_NOFOLLOW
_NOTIFY_RESEND = 7

_libc = ctypes.CDLL(None, use_errno=True)


def mount(mountpoint: str, options: str) -> tuple[int, str]:
    """Mount there, read-only; returns the descriptor of the connection and ``major:minor``. Raises OSError."""
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    data = f"fd={fd},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()}" + (f",{options}" if options else "")
    place, flags = os.fsencode(mountpoint), ctypes.c_ulong(_FLAGS)
    try:
        _done(_libc.mount(b"helios", place, FSTYPE.encode(), flags, data.encode()), mountpoint)
        if (number := device(mountpoint)) is None:
            raise FileNotFoundError(f"the new mount is not in /proc/self/mountinfo as {mountpoint}")
    except OSError:
        os.close(fd)
        raise
    return fd, number


def device(mountpoint: str) -> str | None:
    """``major:minor`` of our file system at exactly this place (the topmost mount there counts); None without one."""
    found = None
    with open("/proc/self/mountinfo", errors="surrogateescape") as table:
        for line in table:
            fields, _, rest = line.partition(" - ")
            _, _, number, _, path, *_ = fields.split(" ")
            if re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), path) == mountpoint:
                found = number if rest.startswith(f"{FSTYPE} ") else None
    return found


def detach(mountpoint: str, number: str) -> None:
    """Take the mount with this device number out of the tree, in use or not; nothing if it is not there any more."""
    if device(mountpoint) == number:
        _done(_libc.umount2(os.fsencode(mountpoint), _DETACH), mountpoint)


def abort(number: str) -> None:
    """Fail every request, pending and to come, where fusectl is mounted; elsewhere closing the descriptors does."""
    with contextlib.suppress(FileNotFoundError):
        with open(f"/sys/fs/fuse/connections/{number.partition(':')[2]}/abort", "w") as control:
            control.write("1")


def connected(fd: int) -> bool:
    """Whether the other end still is: the mount of /dev/fuse, the process at a socket. Costs one poll(2)."""
    poller = select.poll()
    poller.register(fd, 0)
    return not poller.poll(0)


def resend(fuse_fd: int) -> None:
    """Have the kernel queue again what a worker took and did not answer; nothing before Linux 6.9."""
    with contextlib.suppress(OSError):
        os.write(fuse_fd, REPLY.pack(REPLY.size, _NOTIFY_RESEND, 0))


def oom_kills() -> int:
    """How many processes of this machine ran out of memory, or of their control group's, and were killed for it."""
    with open("/proc/vmstat") as counters:
        return next((int(line.split()[1]) for line in counters if line.startswith("oom_kill ")), 0)


def _done(result: int, path: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), path)
