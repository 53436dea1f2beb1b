"""Where passthrough is possible: what the kernel offered, and which filesystems it refused. No I/O in here.

The kernel reads a file itself only where the file's filesystem lies on no other one: of overlayfs, which is what a
container has where no volume is mounted, it refuses every file (fuse_backing_open, fs/fuse/passthrough.c: ELOOP). That
says nothing of another tier's filesystem.
"""

from __future__ import annotations

import errno
from typing import Final

FULL: Final = "passthrough and a keeper"
"""What a mount says of itself that lacks nothing."""

LASTING: Final = {
    errno.ELOOP: "it lies on top of another filesystem",
    errno.EOPNOTSUPP: "it can't be read that way",
    errno.EPERM: "it needs CAP_SYS_ADMIN",
}
"""Refusals that the next file of the same filesystem would get, too; others are of a moment, such as ENOMEM."""


class Passthrough:
    """What is known of one connection. Changed by one thread at a time; any may ask."""

    def __init__(self) -> None:
        self.offered = True
        self._refused: dict[int, str] = {}

    def possible(self, device: int) -> bool:
        """Whether a file of the filesystem with this ``st_dev`` is worth the kernel's answer."""
        return self.offered and device not in self._refused

    def refused(self, device: int, place: str, code: int) -> bool:
        """The kernel refused a file of a filesystem, which ``place`` names, with an errno; says whether that lasts."""
        if code in LASTING:
            self._refused = self._refused | {device: f"{place} ({LASTING[code]})"}
        return code in LASTING

    @property
    def reason(self) -> str:
        """What whoever mounted is told of how files are read."""
        if not self.offered:
            return "a keeper, but the kernel offers no passthrough: files are read through the mount's process"
        if not self._refused:
            return FULL
        places = "; ".join(sorted(self._refused.values()))
        return f"a keeper, and passthrough but for files on {places}: these are read through the mount's process"
