"""The front's directory: whose it is, and whether it is there.

    ROOT/.front         {"id", "store"}: which front this is, and of which store
    ROOT/.lock          held by the process that uses it
    MEMORY              {"id", "directory", "owes", "away"}, on the registry's own disk: what is known of the front
                        while its disk is missing (and beside it what it missed: missed.py)

An empty directory where the front was is the mount point of a missing disk: it is not filled. ``owes``: the front has
objects that the cloud may lack, so that an object which is nowhere else is not lost, only away. ``away``: something
was written or removed without the front and nobody can say what, so that nothing in it is believed before it was
compared with the cloud.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path
from typing import Final

import msgspec

from helios.decoding import from_json
from helios.errors import IntegrityError, InvalidInput, Unavailable, UsageError
from helios.lockfile import LockFile
from heliosfs.store.directory import DirectoryStore
from heliosfs.store.keys import check_key
from heliosfs.store.syscalls import replace_file

MARKER: Final = ".front"
HARMLESS: Final = frozenset({"lost+found", ".lock", ".format", ".staging", ".front.new"})
"""What may be in a directory that becomes a front."""


class _Marker(msgspec.Struct, frozen=True):
    id: str
    store: str


class _Known(msgspec.Struct, frozen=True):
    id: str
    directory: str
    owes: bool = False
    away: bool = False


class Memory:
    """What the registry knows of its front, be that there or not. Calls are durable on return; they raise OSError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: _Known | None = None
        try:
            self.known = from_json(path.read_bytes(), _Known)
        except FileNotFoundError:
            pass
        except (msgspec.DecodeError, OSError) as error:
            raise IntegrityError(
                f"{path} can't be read: {error}",
                hint="It says what the front store still owes the cloud. Restore it, or remove it if that is nothing.",
            ) from None

    def note(self, **changes: object) -> None:
        """Change what is known, if that is a change."""
        assert self.known is not None
        new = msgspec.structs.replace(self.known, **changes)
        if new != self.known:
            self._write(new)

    def meet(self, id_: str, directory: Path) -> None:
        """This is the front from now on."""
        if self.known is None or self.known.id != id_:
            self._write(_Known(id_, str(directory), owes=True, away=True))
        else:
            self.note(directory=str(directory))

    def _write(self, new: _Known) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self.path, msgspec.json.encode(new), self.path.with_suffix(".new"))
        self.known = new


class Disk:
    """The directory, opened and locked. Close it when done."""

    def __init__(self, root: Path, store: DirectoryStore, lock: LockFile) -> None:
        self.root, self.store, self._lock = root, store, lock
        status = root.stat()
        self._closed = False
        self._identity = status.st_dev, status.st_ino

    def is_there(self) -> bool:
        """Whether the directory is still the one that was opened: its disk may have been taken away."""
        try:
            status = self.root.stat()
            return (status.st_dev, status.st_ino) == self._identity and (self.root / MARKER).exists()
        except OSError:
            return False

    def space(self) -> tuple[int, int]:
        """Bytes free and in all. Raises OSError."""
        found = os.statvfs(self.root)
        return found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize

    def objects(self) -> dict[str, tuple[int, float]]:
        """What lies there: bytes of each object, and when it came, in seconds of the clock. Raises OSError."""
        keys = [info.key for info in self.store.list("") if _is_key(info.key)]
        found = {key: (self.root / key).stat() for key in keys}
        return {key: (status.st_size, status.st_mtime) for key, status in found.items()}

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        # Its disk may be gone, and with it what there was to tidy up; the lock goes with the process.
        with contextlib.suppress(OSError):
            self.store.close()
        with contextlib.suppress(OSError):
            self._lock.release()


def open_disk(root: Path, store: str, memory: Memory) -> Disk:
    """Open the front of the store of this name, or make it in an empty directory.

    Raises UsageError where the directory is something else, Unavailable where it is missing or can't be used.
    """
    root = root.absolute()
    known = memory.known
    if known is not None and known.directory != str(root) and known.owes and not _is(root, known.id):
        raise UsageError(
            f"the front store in {known.directory} holds objects that are not in {store} yet",
            hint=f"Set registry.front to that directory until they are; if it is lost for good, remove {memory.path}.",
        )
    try:
        marker = _read(root)
        if marker is None:
            if known is not None and known.directory == str(root):
                raise Unavailable(
                    f"the front store's disk is missing: nothing of it is in {root}",
                    hint=f"Mount it. If it is lost for good, remove {memory.path}; what only it had is lost then.",
                )
            root.mkdir(parents=True, exist_ok=True)
            if strange := {entry.name for entry in os.scandir(root)} - HARMLESS:
                raise UsageError(f"registry.front: {root} is not empty ({min(strange)}): give the front its own")
        elif marker.store != store:
            raise UsageError(f"registry.front: {root} is the front of {marker.store}, not of {store}")
        lock = LockFile.acquire(root / ".lock")
    except OSError as error:
        raise Unavailable(f"the front store in {root} can't be used: {error}") from error
    if lock is None:
        raise UsageError(
            f"registry.front: another process uses {root}", hint="Give each registry process a front of its own."
        )
    try:
        opened = DirectoryStore(root)
        if marker is None:
            marker = _Marker(secrets.token_hex(16), store)
            replace_file(root / MARKER, msgspec.json.encode(marker), root / f"{MARKER}.new")
        memory.meet(marker.id, root)
        return Disk(root, opened, lock)
    except BaseException as error:
        lock.release()
        if isinstance(error, OSError):
            raise Unavailable(f"the front store in {root} can't be used: {error}") from error
        raise


def leave(memory: Memory, store: str) -> None:
    """There is no front now. Raises UsageError while one has what the store lacks."""
    if memory.known is None:
        return
    if memory.known.owes:
        raise UsageError(
            f"the front store in {memory.known.directory} holds objects that are not in {store} yet",
            hint=f"Set registry.front again until they are; if it is lost for good, remove {memory.path}.",
        )
    memory.note(away=True)


def _is_key(text: str) -> bool:
    try:
        check_key(text)
    except InvalidInput:
        return False
    return True


def _is(root: Path, id_: str) -> bool:
    try:
        marker = _read(root)
    except OSError:
        return False
    return marker is not None and marker.id == id_


def _read(root: Path) -> _Marker | None:
    try:
        return from_json((root / MARKER).read_bytes(), _Marker)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as error:
        raise UsageError(f"registry.front: {root / MARKER} makes no sense: {error}") from None
