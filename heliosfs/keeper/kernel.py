"""The kernel's side of a mount: making it, letting it go, and the few FUSE messages that a keeper speaks.

Nothing in here looks at what is mounted: a mount whose worker hangs would hang us too. Structures: linux/fuse.h.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import select
import struct
from typing import Final

from heliosfs.keeper.board import Board

FSTYPE: Final = "fuse.helios"
OPTIONS: Final = "allow_other,default_permissions,max_read=1048576"

_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOATIME = 1, 2, 4, 1024
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8
_REQUEST = struct.Struct("<IIQQIIIHH")
_REPLY = struct.Struct("<IiQ")
_NOTIFY_RESEND = 7
_RESENT = 1 << 63
_FORGET, _RELEASE, _FLUSH, _RELEASEDIR, _INTERRUPT, _BATCH_FORGET = 2, 18, 25, 29, 36, 42
_BACKING_CLOSE = 0x4004E502
_READ_BYTES = (1 << 20) + (1 << 16)  # the kernel demands room for its largest request

_libc = ctypes.CDLL(None, use_errno=True)


def mount(mountpoint: str, options: str) -> int:
    """Mount there, read-only; returns the descriptor of the connection. Raises OSError."""
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    data = f"fd={fd},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()}"
    data += f",{options}" if options else ""
    flags = ctypes.c_ulong(_MS_RDONLY | _MS_NOSUID | _MS_NODEV | _MS_NOATIME)
    if _libc.mount(b"helios", os.fsencode(mountpoint), FSTYPE.encode(), flags, data.encode()) != 0:
        code = ctypes.get_errno()
        os.close(fd)
        raise OSError(code, os.strerror(code), mountpoint)
    return fd


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
    if device(mountpoint) != number:
        return
    if _libc.umount2(os.fsencode(mountpoint), _MNT_DETACH | _UMOUNT_NOFOLLOW) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), mountpoint)


def abort(number: str) -> None:
    """Fail every request, pending and to come, where fusectl is mounted; elsewhere closing the descriptors does."""
    with contextlib.suppress(FileNotFoundError):
        with open(f"/sys/fs/fuse/connections/{number.partition(':')[2]}/abort", "w") as control:
            control.write("1")


def connected(fuse_fd: int) -> bool:
    """Whether the mount still is; costs one poll(2)."""
    poller = select.poll()
    poller.register(fuse_fd, 0)
    return not poller.poll(0)


def oom_kills() -> int:
    """How many processes of this machine ran out of memory, or of their control group's, and were killed for it."""
    with open("/proc/vmstat") as counters:
        return next((int(line.split()[1]) for line in counters if line.startswith("oom_kill ")), 0)


def resend(fuse_fd: int) -> None:
    """Have the kernel queue again what a worker took and did not answer (Linux 6.9)."""
    os.write(fuse_fd, _REPLY.pack(_REPLY.size, _NOTIFY_RESEND, 0))


def refuse(fuse_fd: int, board: Board) -> int:
    """Answer EIO to every request that waits; returns how many. The descriptor must not block.

    FORGET and INTERRUPT have no answer. Closing a file succeeds, and is taken off the board, because nobody will hear
    of it again.
    """
    buffer = memoryview(bytearray(_READ_BYTES))
    taken: list[tuple[int, int, int]] = []
    while True:
        try:
            os.readv(fuse_fd, [buffer])
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EINTR):  # the caller was killed meanwhile
                continue
            if error.errno in (errno.EAGAIN, errno.ENODEV):  # that is all; unmounted
                break
            raise
        _, opcode, unique, node, *_ = _REQUEST.unpack_from(buffer)
        if opcode not in (_FORGET, _BATCH_FORGET, _INTERRUPT):
            taken.append((opcode, unique, node))
    unused = [board.put_back({unique & ~_RESENT for _, unique, _ in taken})]
    for opcode, unique, node in taken:
        code = 0 if opcode in (_RELEASE, _RELEASEDIR, _FLUSH) else -errno.EIO
        with contextlib.suppress(FileNotFoundError):  # the caller was killed meanwhile
            os.write(fuse_fd, _REPLY.pack(_REPLY.size, code, unique))
        if opcode == _RELEASE:
            unused.append(board.released(node))
    for backing in filter(None, unused):
        with contextlib.suppress(OSError):  # it is not the kernel's any more
            fcntl.ioctl(fuse_fd, _BACKING_CLOSE, struct.pack("<I", backing))
    return len(taken)
