"""Whether this machine and this user can mount natively: with a keeper, the kernel reading whole files itself."""

from __future__ import annotations

import gzip
import os
import platform
import re
from pathlib import Path
from typing import Final

from helios.errors import Unavailable

CAP_SYS_ADMIN: Final = 21

KERNEL: Final = (6, 9)
"""The first kernel with FUSE passthrough and resending."""


STACKED: Final = frozenset({"overlay", "ecryptfs", "aufs"})
"""Filesystems on top of others, whose files the kernel refuses for passthrough."""


def kernel_version(release: str) -> tuple[int, int]:
    """``6.9.3-amd64`` -> (6, 9)."""
    match = re.match(r"(\d+)\.(\d+)", release)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def effective_capabilities(status: str) -> int:
    """The CapEff bits of a /proc/<pid>/status text."""
    match = re.search(r"^CapEff:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return int(match[1], 16) if match else 0


def privileged() -> bool:
    """Whether this process has CAP_SYS_ADMIN: it may mount, and register files for passthrough."""
    return bool(effective_capabilities(Path("/proc/self/status").read_text()) >> CAP_SYS_ADMIN & 1)


def may_mount() -> bool:
    """Whether this process may keep a native mount: root with CAP_SYS_ADMIN."""
    return os.geteuid() == 0 and privileged()


def read_kernel_config(release: str) -> str | None:
    """The running kernel's build configuration, where it can be read."""
    try:
        return gzip.decompress(Path("/proc/config.gz").read_bytes()).decode()
    except OSError:
        pass
    try:
        return Path(f"/boot/config-{release}").read_text()
    except OSError:
        return None


def obstacles(release: str, kernel_config: str | None, allowed: bool) -> list[str]:
    """Why a native mount is not possible, in words; empty when it is."""
    found = []
    if kernel_version(release) < KERNEL:
        found.append(f"the kernel is {release}, it needs {KERNEL[0]}.{KERNEL[1]}")
    if kernel_config is not None and "CONFIG_FUSE_PASSTHROUGH=y" not in kernel_config.splitlines():
        found.append("the kernel is built without CONFIG_FUSE_PASSTHROUGH")
    if not allowed:
        found.append("it needs CAP_SYS_ADMIN")
    return found


def reasons_against(mode: str) -> list[str]:
    """Why this process mounts portably with ``mount.mode`` set so; empty: it mounts natively.

    Raises Unavailable where it should mount natively and can't.
    """
    if mode == "portable":
        return ["mount.mode says so"]
    release = platform.release()
    found = obstacles(release, read_kernel_config(release), may_mount())
    if found and mode == "native":
        raise Unavailable(f"a native mount is not possible: {'; '.join(found)}", hint="Or set mount.mode to auto.")
    return found
