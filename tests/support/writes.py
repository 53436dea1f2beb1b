"""Everything that would change a read-only filesystem, one call each."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

WRITES: Final[dict[str, Callable[[Path, str], Any]]] = {
    "create": lambda d, f: os.open(d / "new", os.O_CREAT | os.O_WRONLY),
    "write": lambda d, f: os.open(d / f, os.O_WRONLY),
    "read and write": lambda d, f: os.open(d / f, os.O_RDWR),
    "append": lambda d, f: os.open(d / f, os.O_WRONLY | os.O_APPEND),
    "truncate on open": lambda d, f: os.open(d / f, os.O_WRONLY | os.O_TRUNC),
    "truncate": lambda d, f: os.truncate(d / f, 0),
    "mkdir": lambda d, f: os.mkdir(d / "new"),
    "rmdir": lambda d, f: os.rmdir(d / "a"),
    "unlink": lambda d, f: os.unlink(d / f),
    "rename": lambda d, f: os.rename(d / f, d / "other"),
    "rename over": lambda d, f: os.rename(d / f, d / "empty"),
    "symlink": lambda d, f: os.symlink("x", d / "new"),
    "link": lambda d, f: os.link(d / f, d / "new"),
    "mkfifo": lambda d, f: os.mkfifo(d / "new"),
    "mknod": lambda d, f: os.mknod(d / "new", stat.S_IFREG | 0o644),
    "chmod": lambda d, f: os.chmod(d / f, 0o777),
    "chown": lambda d, f: os.chown(d / f, os.getuid(), os.getgid()),
    "utime": lambda d, f: os.utime(d / f),
    "setxattr": lambda d, f: os.setxattr(d / f, "user.x", b"y"),
    "removexattr": lambda d, f: os.removexattr(d / f, "user.helios.sha256"),
}
"""By name: a call that must be refused with EROFS, of a directory and a file in it; the directory ``a`` and the file
``empty`` are there too."""
