"""Which mounts there are: the kernel's table, and the state file that each mount's daemon holds.

``$HELIOS_HOME/run/mounts/<hash of the mount point>.json`` is held under flock by the daemon: a free lock means that it
is dead. Nothing in here touches what is mounted, because a mount whose daemon hangs would hang us too.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from helios.decoding import from_json
from helios.errors import Unavailable
from helios.home import Home, hash_text
from helios.lockfile import LockFile, held, overwrite
from helios.process import ProcessId

FSTYPE: Final = "fuse.helios"

_MNT_FORCE = 1
_MNT_DETACH = 2
_UMOUNT_NOFOLLOW = 8
MAX_LINKS: Final = 40
"""As many symbolic links as the kernel follows in one path."""

_OCTAL = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class MountEntry:
    """A line of /proc/self/mountinfo (proc(5)); ``device`` is ``major:minor``, ``root`` what of the filesystem is shown
    there, and ``options`` are the mount's own."""

    mountpoint: Path
    device: str
    fstype: str
    source: str
    root: str = "/"
    options: frozenset[str] = frozenset()


class MountState(msgspec.Struct, frozen=True, kw_only=True):
    """What a mount's daemon says about itself; ``since`` is in seconds since 1970."""

    mountpoint: str
    pid: int
    start: str
    since: float
    cache: str
    registry: list[str]
    socket: str
    log: str | None
    """Where the daemon logs to; None: standard error."""
    created: bool
    """Whether the mount point was made for the mount, and is removed with it."""
    url: str | None = None
    """Where metrics are served over TCP, if they are."""
    worker: ProcessId | None = None
    """The process that serves it where ``pid`` is a keeper; another one after it was replaced."""
    mode: str = "portable"
    reason: str = ""

    @property
    def process(self) -> ProcessId:
        return ProcessId(self.pid, self.start)


def mount_table(text: str | None = None) -> list[MountEntry]:
    """The kernel's mounts in the order they were made; ``text`` stands in for /proc/self/mountinfo."""
    return [_entry(line) for line in (_table() if text is None else text.splitlines())]


def _table() -> list[str]:
    return Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()


def _entry(line: str) -> MountEntry:
    fields, _, rest = line.partition(" - ")
    _, _, device, root, mountpoint, options, *_ = fields.split(" ")
    fstype, source, *_ = rest.split(" ")
    shown, path = _unescaped(root), Path(_unescaped(mountpoint))
    return MountEntry(path, device, fstype, source, shown, frozenset(options.split(",")))


def _place(line: str) -> str:
    """The mount point alone: a node has hundreds of mounts, and most looks are for one of them."""
    return _unescaped(line.split(" ", 5)[4])


def _unescaped(text: str) -> str:
    return _OCTAL.sub(lambda m: chr(int(m[1], 8)), text) if "\\" in text else text


def find_mount(mountpoint: Path) -> MountEntry | None:
    """What is mounted at exactly this place (the topmost), or None."""
    place = str(mountpoint)
    return next((_entry(line) for line in reversed(_table()) if _place(line) == place), None)


def mount_of(path: Path) -> MountEntry | None:
    """The mount that an absolute path without links lies in."""
    found = None
    for entry in mount_table():
        inside = path.is_relative_to(entry.mountpoint)
        if inside and (found is None or len(entry.mountpoint.parts) >= len(found.mountpoint.parts)):
            found = entry  # of two at one place the later one
    return found


def canonical(path: Path) -> Path:
    """The absolute path with links resolved, without looking at what is mounted there.

    Nor at anything below a mount of ours: one that nobody serves would not answer. Raises OSError.
    """
    mounted = {_place(line): line.partition(" - ")[2].partition(" ")[0] for line in _table()}
    current, links = "/", 0
    rest = list(Path(os.path.abspath(path)).parts[:0:-1])
    while rest:
        name = rest.pop()
        step = os.path.dirname(current) if name == ".." else os.path.join(current, name)
        if mounted.get(step) == FSTYPE or (not rest and step in mounted):
            return Path(step, *reversed(rest))
        if name != ".." and os.path.islink(step):
            links += 1
            if links > MAX_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
            target = Path(os.readlink(step))
            current = "/" if target.is_absolute() else current
            rest += [part for part in reversed(target.parts) if part != "/"]
        else:
            current = step
    return Path(current)


def state_path(home: Home, mountpoint: Path) -> Path:
    """Where the state of the mount at a canonical mount point is."""
    return home.run / "mounts" / f"{hash_text(str(mountpoint)):016x}.json"


def claim(home: Home, mountpoint: Path) -> LockFile | None:
    """Take the mount point for this process; None while another daemon holds it."""
    path = state_path(home, mountpoint)
    home.ensure_run()
    path.parent.mkdir(mode=0o700, exist_ok=True)
    return LockFile.acquire(path)


def write_state(path: Path, data: bytes) -> None:
    """Say in a state file, whose lock somebody else holds, what is true now. Raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        overwrite(fd, data)
    finally:
        os.close(fd)


def parse_state(data: bytes) -> MountState | None:
    """Read a state file; None when it is empty or cut short."""
    try:
        return from_json(data, MountState)
    except msgspec.DecodeError:
        return None


def state_of(home: Home, mountpoint: Path) -> MountState | None:
    """The state of the mount at a canonical mount point; None where this home has none."""
    return _read(state_path(home, mountpoint))


def states(home: Home) -> list[tuple[MountState, bool]]:
    """The mounts of this home, by mount point, and whether each one's daemon lives."""
    paths = sorted((home.run / "mounts").glob("*.json"))
    found = [(state, held(path)) for path in paths if (state := _read(path))]
    return sorted(found, key=lambda pair: pair[0].mountpoint)


def _read(path: Path) -> MountState | None:
    for _ in range(5):
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        if state := parse_state(data):
            return state
        time.sleep(0.02)  # it is being written
    return None


def detach(mountpoint: Path, *, force: bool = False) -> None:
    """Unmount, at once and even when in use: it leaves the tree now and the kernel when its last user lets go.

    ``force``: whoever waits for an answer gets an error, where root asks; others can only ``abort`` before.

    Raises Unavailable with the reason.
    """
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        flags = _MNT_DETACH | _UMOUNT_NOFOLLOW | (_MNT_FORCE if force else 0)
        if libc.umount2(os.fsencode(mountpoint), flags) != 0:
            code = ctypes.get_errno()
            if code != errno.EINVAL:  # not mounted
                raise Unavailable(f"{mountpoint} can't be unmounted: {os.strerror(code)}")
        return
    try:
        command = ["fusermount3", "-u", "-z", str(mountpoint)]
        done = subprocess.run(command, capture_output=True, timeout=10, text=True, check=False)
    except FileNotFoundError:
        raise Unavailable("fusermount3 is missing", hint="Install the package fuse3.") from None
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{mountpoint} can't be unmounted: fusermount3 did not answer") from None
    if done.returncode != 0 and find_mount(mountpoint) is not None:
        raise Unavailable(f"{mountpoint} can't be unmounted: {done.stderr.strip()}")


def abort(device: str) -> bool:
    """Fail every request of the FUSE mount with this ``major:minor``, pending and to come; says whether that could be
    done: by its user and by root, where fusectl is mounted."""
    try:
        Path(f"/sys/fs/fuse/connections/{device.partition(':')[2]}/abort").write_text("1")
    except OSError:
        return False
    return True
