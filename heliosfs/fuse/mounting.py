"""Mounting with pyfuse3 alone, the portable mode: options, read-ahead, and a check that the mount answers."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import trio

from helios.errors import DeadlineExceeded, Unavailable
from helios.mounts import find_mount

log = logging.getLogger("heliosfs.fuse")

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


def set_readahead(mountpoint: Path, kib: int) -> bool:
    """Set how far the kernel reads ahead, and with it the size of its requests; says whether it was allowed to."""
    entry = find_mount(mountpoint)
    if entry is None:
        return False
    try:
        Path(f"/sys/class/bdi/{entry.device}/read_ahead_kb").write_text(str(kib))
    except OSError as error:
        log.info("the read-ahead stays as it is, which costs throughput", extra={"reason": error.strerror})
        return False
    return True


async def wait_until_it_answers(mountpoint: Path) -> None:
    """Ask the mount for its root. Raises DeadlineExceeded or Unavailable."""
    with trio.move_on_after(ANSWER_S) as waiting:
        try:
            await trio.to_thread.run_sync(os.stat, mountpoint, abandon_on_cancel=True)
        except OSError as error:
            raise Unavailable(f"the new mount at {mountpoint} fails: {error.strerror}") from None
    if waiting.cancelled_caught:
        raise DeadlineExceeded(f"the new mount at {mountpoint} does not answer")
