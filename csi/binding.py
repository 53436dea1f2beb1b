"""Read-only bind mounts that are there whole or not at all.

``mount(2)`` makes a bind mount writable and only a second call makes it read-only: whoever is killed between them
leaves a writable one. The newer calls (Linux 5.12) prepare a detached mount, make it read-only there, and attach it in
one step, so that no state of ours is needed to clean up after a SIGKILL. A detached mount goes with its descriptor.

Sources: open_tree(2), mount_setattr(2), move_mount(2); their numbers are the same on every architecture but Alpha.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from helios.errors import HeliosError, NoSpace, NotFound, Unavailable

_OPEN_TREE, _MOVE_MOUNT, _MOUNT_SETATTR = 428, 429, 442
_AT_FDCWD: Final = -100
_AT_EMPTY_PATH: Final = 0x1000
_OPEN_TREE_CLONE: Final = 1
_MOVE_MOUNT_F_EMPTY_PATH: Final = 4
_MS_PRIVATE: Final = 1 << 18
_RDONLY, _NOSUID, _NODEV, _NOEXEC = 1, 2, 4, 8

FLAGS: Final = {"ro": _RDONLY, "nosuid": _NOSUID, "nodev": _NODEV, "noexec": _NOEXEC}
"""Mount options that a volume may ask for; the first three it has anyway."""


class _Attributes(ctypes.Structure):
    _fields_ = (
        ("set", ctypes.c_uint64),
        ("clear", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


def bind(source: Path, target: Path, options: frozenset[str], wanted: Callable[[], bool]) -> None:
    """Show the directory ``source`` at the existing directory ``target``, read-only, without set-uid and devices.

    The new mount shares no propagation with the source; below a shared mount it becomes shared itself, so that
    other mount namespaces which follow that one see it come and go. Links at the end of ``target`` are not followed.
    Blocks for as long as the filesystem of ``source`` takes to look it up; ``wanted`` says after that whether anybody
    still waits for it: if not, nothing is mounted. Raises Unavailable, NotFound, NoSpace.
    """
    flags = FLAGS["ro"] | FLAGS["nosuid"] | FLAGS["nodev"]
    for option in options:
        flags |= FLAGS[option]
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long

    def call(number: int, *arguments: object) -> int:
        done = int(libc.syscall(ctypes.c_long(number), *arguments))
        if done < 0:
            raise _error(ctypes.get_errno(), source, target)
        return done

    where = ctypes.c_int(_AT_FDCWD)
    clone = ctypes.c_uint(_OPEN_TREE_CLONE | os.O_CLOEXEC)
    fd = call(_OPEN_TREE, where, os.fsencode(source), clone)
    try:
        change = _Attributes(set=flags, propagation=_MS_PRIVATE)
        size = ctypes.c_size_t(ctypes.sizeof(change))
        if not wanted():
            raise Unavailable(f"{source} took too long to be looked up; it was not mounted at {target}")
        call(_MOUNT_SETATTR, ctypes.c_int(fd), b"", ctypes.c_uint(_AT_EMPTY_PATH), ctypes.byref(change), size)
        flag = ctypes.c_uint(_MOVE_MOUNT_F_EMPTY_PATH)
        call(_MOVE_MOUNT, ctypes.c_int(fd), b"", where, os.fsencode(target), flag)
    finally:
        os.close(fd)


def _error(code: int, source: Path, target: Path) -> HeliosError:
    what = f"{source} can't be mounted at {target}: {os.strerror(code)}"
    if code == errno.ENOSYS:
        return Unavailable(what, hint="It needs Linux 5.12 or newer.")
    if code == errno.EPERM:
        return Unavailable(what, hint="The driver needs CAP_SYS_ADMIN: its container has to be privileged.")
    if code in (errno.ENOSPC, errno.ENOMEM):
        return NoSpace(what, hint="The limit of mounts is in /proc/sys/fs/mount-max.")
    if code == errno.ENOENT:
        return NotFound(what)
    return Unavailable(what)
