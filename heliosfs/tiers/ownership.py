"""Taking a tier's directory: made if need be, locked, and cleared of what a kill or a power cut left. Calls block."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Callable
from pathlib import Path

from helios.errors import Conflict
from heliosfs.store.syscalls import REFUSED, sync_directory

log = logging.getLogger("heliosfs.tiers")


def open_lock(root: Path, create: bool) -> int:
    """Open the lock file, making the directory if ``create``. Raises OSError.

    For reading only, which is enough for a lock: the filesystem can be made read-only meanwhile.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC
    try:
        if create:
            for name in ("blobs", "partial"):
                if not (root / name).is_dir():
                    (root / name).mkdir(parents=True, exist_ok=True)
                    for directory in (root, root.parent):
                        sync_directory(directory)
        return os.open(root / "lock", flags | os.O_CREAT * create, 0o644)
    except OSError as error:
        if error.errno not in REFUSED:
            raise
        try:
            return os.open(root / "lock", flags)
        except FileNotFoundError:
            raise error from None


def take(lock: int, root: Path, setting: str) -> None:
    """Own the directory as long as ``lock`` is open; ``setting`` says where it is. Raises Conflict."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(lock, 200, 0).decode(errors="replace").strip() or "another process"
        raise Conflict(
            f"the cache directory {root} is in use by {holder}",
            hint=f"Unmount that one first, or choose another directory with {setting} in the configuration.",
        ) from None
    try:
        write_owner(root)
    except OSError as error:  # the lock counts, the text in it does not
        log.info("the owner can't be written into the lock", extra={"reason": error.strerror})


def write_owner(root: Path) -> None:
    """Say who the owner is, which also shows whether the disk takes anything. Raises OSError."""
    fd = os.open(root / "lock", os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
    try:
        os.pwrite(fd, f"process {os.getpid()} ({_command()})\n".encode(), 0)
        os.fsync(fd)
    finally:
        os.close(fd)


def drop_leftovers(root: Path, whole_path: Callable[[str], str]) -> None:
    """Remove what is of no use. A kill leaves half of a pair or of a copy, and what was being written; a power cut
    may undo the removal of the older when a blob is both whole and partial."""
    useless: list[Path] = []
    pairs: dict[str, list[Path]] = {}
    for path in (root / "partial").iterdir():
        pairs.setdefault(path.stem, []).append(path)
    for stem, paths in pairs.items():
        pair = [path for path in paths if path.suffix in (".data", ".map")]
        if len(pair) != 2 or os.path.lexists(whole_path(stem)):
            useless += pair
        useless += [path for path in paths if path not in pair]
    for path in (root / "sums").glob("*/*"):
        if not os.path.lexists(whole_path(path.name)):
            useless.append(path)
    for path in useless:
        try:
            path.unlink()
        except OSError as error:  # it is not believed, whether it can be removed or not
            log.warning("a leftover stays", extra={"path": str(path), "reason": error.strerror})


def _command() -> str:
    words = Path("/proc/self/cmdline").read_bytes().split(b"\0")
    return b" ".join(words[:4]).decode(errors="replace").strip()[:120]
