"""Mounting with pyfuse3 alone, the portable mode: options, read-ahead, and a check that the mount answers."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import trio

from helios.errors import DeadlineExceeded, Unavailable
from helios.mounts import find_mount
from heliosfs.fuse.protocol import MAX_BACKGROUND

log = logging.getLogger("heliosfs.fuse")

CONNECTIONS: Final = Path("/sys/fs/fuse/connections")

ASK: Final = "import os, sys\ntry: os.stat(sys.argv[1])\nexcept OSError as error: sys.exit(error.strerror)"

BESIDE: Final = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
NEWNS, REMOUNT, REC, PRIVATE = 0x20000, 0x20, 0x4000, 0x40000
for call, *args in (
    (libc.unshare, NEWNS),
    (libc.mount, b"none", b"/", None, ctypes.c_ulong(REC | PRIVATE), None),
    (libc.mount, b"none", b"/sys", None, ctypes.c_ulong(REMOUNT), None),
):
    if call(*args) != 0:
        sys.exit(os.strerror(ctypes.get_errno()))
try:
    with open(sys.argv[1], "w") as file:
        file.write(sys.argv[2])
except OSError as error:
    sys.exit(error.strerror)
"""
"""Writes to a /sys that is mounted read-only, in a mount namespace of its own, in which it is not: the mounts of
everybody else stay as they are."""

ANSWER_S = 15.0
"""How long a new mount may take to answer its first request, in seconds."""


def may_allow_other(fuse_conf: Path = Path("/etc/fuse.conf")) -> bool:
    """Whether this user may let others read a mount: root may, others where ``user_allow_other`` is set."""
    if os.geteuid() == 0:
        return True
    try:
        lines = fuse_conf.read_text().splitlines()
    except OSError:
        return False
    return any(line.strip() == "user_allow_other" for line in lines)


def check_unmountable(mtab: Path = Path("/etc/mtab")) -> None:
    """Raise Unavailable where a mount of this user could never be removed again.

    Without root fusermount3 unmounts, and it asks /etc/mtab who mounted (it mounts without asking).
    """
    if os.geteuid() != 0 and not mtab.exists():
        raise Unavailable(f"without {mtab} only root can unmount", hint=f"As root: ln -s /proc/self/mounts {mtab}")


def options(allow_other: bool) -> set[str]:
    """Options of the mount, for ``pyfuse3.init``.

    No ``max_read``: libfuse refuses it unless the INIT reply repeats it, which pyfuse3 can't. Without it the kernel's
    own limit holds, 1 MiB.
    """
    out = {"fsname=helios", "subtype=helios", "ro", "noatime", "default_permissions"}
    return out | {"allow_other"} if allow_other else out


async def set_readahead(mountpoint: Path, kib: int) -> bool:
    """Set how far the kernel reads ahead, and with it the size of its requests; says whether it was allowed to.

    In a pod /sys may be mounted read-only even where the container is privileged; then it is done by a process that
    sees it otherwise (``BESIDE``). The INIT reply of FUSE can't: it may lower the kernel's 128 KiB, not raise them.
    """
    entry = find_mount(mountpoint)
    if entry is None:
        return False
    place = Path(f"/sys/class/bdi/{entry.device}/read_ahead_kb")
    try:
        place.write_text(str(kib))  # noqa: ASYNC240 - the kernel's own memory, no disk
    except OSError as error:
        why = error.strerror if error.errno != errno.EROFS else await _written_beside(place, str(kib))
        if why:
            log.info("the read-ahead stays as it is, which costs throughput", extra={"reason": why})
        return not why
    return True


async def _written_beside(place: Path, text: str) -> str:
    """Write to a file of a /sys that is mounted read-only; why that can't be, empty: it is done."""
    command = [sys.executable, "-ISc", BESIDE, str(place), text]
    with trio.move_on_after(ANSWER_S):
        done = await trio.run_process(command, capture_stderr=True, check=False, stdin=subprocess.DEVNULL)
        return "" if done.returncode == 0 else done.stderr.decode(errors="replace").strip() or "Read-only file system"
    return f"no answer within {ANSWER_S:g} s"


def set_background(mountpoint: Path, connections: Path = CONNECTIONS) -> bool:
    """Let the kernel have as many requests for read-ahead under way as a native mount has, instead of 12; says whether
    it was allowed to: root is, where fusectl is mounted at ``connections``."""
    entry = find_mount(mountpoint)
    if entry is None:
        return False
    try:
        (connections / entry.device.partition(":")[2] / "max_background").write_text(str(MAX_BACKGROUND))
    except OSError as error:
        log.info("few requests for read-ahead at once, which costs throughput", extra={"reason": error.strerror})
        return False
    return True


async def wait_until_it_answers(mountpoint: Path) -> None:
    """Have another process ask the mount for its root. Raises DeadlineExceeded or Unavailable.

    Not this one: a process with a thread that waits for its own mount can't be killed, and keeps the locks it has from
    whoever is to answer instead.
    """
    command = [sys.executable, "-ISc", ASK, str(mountpoint)]
    asker = await trio.lowlevel.open_process(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert asker.stderr is not None
    try:
        with trio.fail_after(ANSWER_S):
            said = b"".join([part async for part in asker.stderr])
            failed = await asker.wait() != 0
    except trio.TooSlowError:
        raise DeadlineExceeded(f"the new mount at {mountpoint} does not answer") from None
    finally:
        await trio.aclose_forcefully(asker.stderr)
        if asker.returncode is None:
            asker.kill()
    if failed:
        raise Unavailable(f"the new mount at {mountpoint} fails: {said.decode(errors='replace').strip()}")
