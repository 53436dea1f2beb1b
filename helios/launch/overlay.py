"""A directory that an engine may write to, over files that it may not: those of a mount.

Where the kernel lets us, an overlayfs: the mount's commit is its lower directory, so nothing is read before it is
needed. Elsewhere (not root, an old kernel, a container without CAP_SYS_ADMIN) the files are copied. What is written
goes with the view.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from helios import mounts
from helios.errors import Unavailable
from helios.lockfile import LockFile

_MS_NOSUID: Final = 2
_MS_NODEV: Final = 4
MAX_OPTIONS: Final = 4000
"""mount(2) takes one page of options."""


@dataclass(slots=True)
class View:
    """``path`` shows the lower files and takes changes. ``why_copied``: empty for an overlayfs, else the reason."""

    path: Path
    why_copied: str
    _place: Path
    _lock: LockFile
    _closed: bool = False

    def close(self) -> None:
        """Take it down; what was written is gone. Raises Unavailable or OSError; once more is no harm."""
        if not self._closed:
            _remove(self._place)
            self._lock.release()
            self._closed = True


def writable(lower: Path, base: Path, name: str) -> View:
    """A view over ``lower``, kept below ``base`` as ``name``, which nobody else uses. Raises OSError."""
    base.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = LockFile.acquire(base / f"{name}.lock")
    if lock is None:
        raise Unavailable(f"{base / name} is in use")
    place = base / name
    try:
        _remove(place)
        for each in ("upper", "work", "view"):
            (place / each).mkdir(parents=True, mode=0o700)
        why = _overlay(lower, place)
        if why:
            shutil.copytree(lower, place / "view", dirs_exist_ok=True)
            _make_writable(place / "view")
    except BaseException:
        with contextlib.suppress(Unavailable, OSError):
            _remove(place)
        lock.release()
        raise
    return View(place / "view", why, place, lock)


def repair(base: Path) -> None:
    """Take down views whose owners are gone, all that can be. Raises Unavailable or OSError for the first other."""
    errors: list[Unavailable | OSError] = []
    for name in sorted({path.name.removesuffix(".lock") for path in base.glob("*")}):
        lock = LockFile.acquire(base / f"{name}.lock")
        if lock is not None:
            try:
                _remove(base / name)
            except (Unavailable, OSError) as error:
                errors.append(error)
            finally:
                lock.release()
    if errors:
        raise errors[0]


def _overlay(lower: Path, place: Path) -> str:
    """Mount it; returns why not, or nothing."""
    named = (("lowerdir", lower), ("upperdir", place / "upper"), ("workdir", place / "work"))
    options = b",".join(name.encode() + b"=" + _escaped(path) for name, path in named)
    if len(options) > MAX_OPTIONS:
        return "the paths are too long for an overlayfs"
    libc = ctypes.CDLL(None, use_errno=True)
    target = os.fsencode(place / "view")
    if libc.mount(b"overlay", target, b"overlay", _MS_NOSUID | _MS_NODEV, options) != 0:
        return f"an overlayfs can't be mounted: {os.strerror(ctypes.get_errno())}"
    try:
        _try_out(place / "view")
    except OSError as error:
        mounts.detach(place / "view")
        return f"an overlayfs is mounted, and can't be written to: {error.strerror}"
    return ""


def _try_out(view: Path) -> None:
    """Do what compilers do. The kernel mounts an overlayfs whose work directory does not suit it read-only, and says so
    in its log alone (overlayfs.rst, "Upper and Lower"). Raises OSError."""
    name = f".try-{secrets.token_hex(8)}"
    (view / name).mkdir()
    (view / name / "fresh").write_bytes(b"1")
    (view / name / "fresh").replace(view / name / "made")
    (view / name / "made").unlink()
    (view / name).rmdir()


def _escaped(path: Path) -> bytes:
    """A path in the options of mount(2), where commas and colons separate (overlayfs.rst, "Multiple lower layers")."""
    out = os.fsencode(path).replace(b"\\", b"\\\\")
    return out.replace(b",", b"\\,").replace(b":", b"\\:")


def _make_writable(root: Path) -> None:
    for directory, _, files in os.walk(root):
        os.chmod(directory, 0o700)
        for name in files:
            path = os.path.join(directory, name)
            os.chmod(path, os.stat(path).st_mode & 0o777 | 0o600)


def _remove(place: Path) -> None:
    view = place / "view"
    entry = mounts.find_mount(Path(os.path.realpath(place)) / "view")
    if entry is not None:
        mounts.detach(view)
    if place.exists():
        shutil.rmtree(place)
