"""The local tier: a directory of blobs that one process owns.

    blobs/ab/<sha256>        a whole, verified blob: a plain read-only file
    partial/<sha256>.data    a sparse file of the blob's size, or a link to the object that is the blob
    partial/<sha256>.map     the journal of the chunks that are safely in it (bitmap.py)
    sums/ab/<sha256>         what the scrubber compares a whole blob with (sums.py)
    quarantine/              blobs whose bytes were found to be wrong (quarantine.py)
    lock                     held with flock by the owner; the text in it is for people

Where the object store is a directory beside it, on the same filesystem, an object that is a whole blob is not copied:
it is hard-linked, verified chunk by chunk in place, and takes no room.

A file under ``blobs/`` was verified chunk by chunk before it got there and is not hashed again when it is opened.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from helios.errors import Conflict, IntegrityError, NoSpace, Unavailable
from heliosfs.store.keys import PUBLIC, blob_key
from heliosfs.store.syscalls import REFUSED, sync_directory
from heliosfs.tiers import bitmap
from heliosfs.tiers.local import LocalBlob, unlink
from heliosfs.tiers.policy import Disk
from heliosfs.tiers.quarantine import Quarantine, Taken

log = logging.getLogger("heliosfs.tiers")


@dataclass(frozen=True, slots=True)
class L1Usage:
    """What the local tier holds, in blobs and bytes; ``free`` and ``total`` are its filesystem's."""

    blobs: int
    blob_bytes: int
    partials: int
    partial_bytes: int
    free: int
    total: int


@dataclass(frozen=True, slots=True)
class Found:
    """A blob on the disk: its size, and the bytes of room that removing it frees."""

    size: int
    cost: int


class L1:
    """The directory, while this process owns it. Threads may share it; every call blocks."""

    def __init__(self, root: Path, beside: Path | None = None) -> None:
        """Take the directory over, making it if needed; ``beside`` is an object store's directory.

        Raises Conflict when another process owns it, NoSpace or Unavailable when it can't be made or used.
        """
        self.root, self._beside = root, beside
        self.quarantine = Quarantine(root)
        self._lock = threading.Lock()
        self._unlinked: set[str] = set()
        try:
            for name in ("blobs", "partial"):
                if not (root / name).is_dir():
                    (root / name).mkdir(parents=True, exist_ok=True)
                    for directory in (root, root.parent):
                        sync_directory(directory)
            self._lock_fd = _open_lock(root / "lock")
        except OSError as error:
            kind = NoSpace if error.errno in (errno.ENOSPC, errno.EDQUOT) else Unavailable
            raise kind(
                f"the cache directory {root} can't be used: {error.strerror}",
                hint="Choose another with mount.cache in the configuration.",
            ) from None
        try:
            self._own()
        except BaseException:
            os.close(self._lock_fd)
            raise
        self._drop_halves()
        try:
            self.sync_partial()  # what was removed before stays removed
        except OSError as error:
            log.warning("the cache directory can't be synced", extra={"reason": error.strerror})
        self._whole = {entry.name: entry.stat().st_size for entry in self._whole_entries()}

    def close(self) -> None:
        """Give the directory up."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def __enter__(self) -> L1:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def blob(self, sha256: str, size: int) -> LocalBlob:
        """One blob's files; nothing is touched until its ``load`` is called."""
        return LocalBlob(self, sha256, size)

    def held(self, sha256: str) -> tuple[int, int | None, bool]:
        """Of a blob that nobody has open: bytes that are here, its size if known, and whether it is whole."""
        try:
            size = os.stat(self.whole_path(sha256)).st_size
            return size, size, True
        except FileNotFoundError:
            pass
        try:
            journal = bitmap.replay(Path(self.map_path(sha256)).read_bytes(), sha256)
        except (FileNotFoundError, IntegrityError):
            return 0, None, False
        local = sum(end - start for start, end in map(journal.recipe.span, _set(journal.have)))
        return local, journal.recipe.size, False

    def scan(self) -> dict[str, Found]:
        """Every blob that is here, by its digest; takes note of files that somebody else removed."""
        with self._lock:
            before = dict(self._whole)
        names = {entry.name for entry in self._whole_entries()}
        with self._lock:
            for sha256 in before.keys() - names:
                self._whole.pop(sha256, None)
                unlink(self.sums_path(sha256))
        with os.scandir(self.root / "partial") as entries:
            names |= {entry.name.removesuffix(".data") for entry in entries if entry.name.endswith(".data")}
        measured = ((sha256, self.measure(sha256)) for sha256 in names)
        return {sha256: found for sha256, found in measured if found is not None}

    def measure(self, sha256: str) -> Found | None:
        """The room that a blob's files take, or None where there are none."""
        try:
            whole = os.lstat(self.whole_path(sha256))
        except FileNotFoundError:
            pass
        else:
            cost = _cost(whole)
            return Found(whole.st_size, cost + _size_on_disk(self.sums_path(sha256)) if cost else 0)
        try:
            data = os.lstat(self.data_path(sha256))
        except FileNotFoundError:
            return None
        try:
            return Found(data.st_size, _cost(data) + _cost(os.lstat(self.map_path(sha256))))
        except FileNotFoundError:
            return Found(data.st_size, _cost(data))

    def remove(self, sha256: str) -> None:
        """Remove a blob's files, whole and partial; who has one open keeps it. Raises OSError.

        Nobody may load or write the blob meanwhile: a partial one is removed in two steps.
        """
        whole = self.whole_path(sha256)
        if unlink(whole):
            self.went(sha256)
        unlink(self.sums_path(sha256))
        if unlink(self.map_path(sha256)):
            self.sync_partial()  # an old journal must never come back beside a new data file
        unlink(self.data_path(sha256))

    def take_away(self, sha256: str, inode: int) -> Taken | None:
        """Put a whole file aside whose bytes are wrong, if it is still this one. Raises OSError."""
        taken = self.quarantine.take(self.whole_path(sha256), sha256, inode)
        if taken is not None:
            unlink(self.sums_path(sha256))
            self.went(sha256)
        return taken

    def is_whole(self, sha256: str) -> bool:
        """Whether all of a blob is here, without a look at the disk."""
        with self._lock:
            return sha256 in self._whole

    def disk(self) -> Disk:
        """The filesystem's free and total bytes."""
        disk = os.statvfs(self.root)
        return Disk(disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize)

    def usage(self) -> L1Usage:
        """What is here now."""
        partials = partial_bytes = 0
        with os.scandir(self.root / "partial") as entries:
            for entry in entries:
                if entry.name.endswith(".data"):
                    try:
                        partial_bytes += entry.stat(follow_symlinks=False).st_blocks * 512
                    except FileNotFoundError:
                        continue  # it became whole just now
                    partials += 1
        disk = self.disk()
        with self._lock:
            blobs, blob_bytes = len(self._whole), sum(self._whole.values())
        return L1Usage(blobs, blob_bytes, partials, partial_bytes, disk.free, disk.total)

    def whole_path(self, sha256: str) -> str:
        return f"{self.root}/blobs/{sha256[:2]}/{sha256}"

    def object_path(self, sha256: str) -> str | None:
        return None if self._beside is None else f"{self._beside}/{blob_key(PUBLIC, sha256)}"

    def data_path(self, sha256: str) -> str:
        return f"{self.root}/partial/{sha256}.data"

    def map_path(self, sha256: str) -> str:
        return f"{self.root}/partial/{sha256}.map"

    def sums_path(self, sha256: str) -> str:
        return f"{self.root}/sums/{sha256[:2]}/{sha256}"

    def became_whole(self, sha256: str, size: int) -> None:
        with self._lock:
            self._whole[sha256] = size

    def went(self, sha256: str) -> None:
        with self._lock:
            self._whole.pop(sha256, None)

    def sync_whole(self, sha256: str) -> None:
        for path in (self.root / "blobs" / sha256[:2], self.root / "blobs"):
            sync_directory(path)

    def sync_partial(self) -> None:
        with self._lock:
            before, self._unlinked = self._unlinked, set()
        try:
            sync_directory(self.root / "partial")
        except OSError:
            with self._lock:
                self._unlinked |= before
            raise

    def unlinked(self, sha256: str) -> None:
        """A blob's journal was removed, which may not be on the disk yet."""
        with self._lock:
            self._unlinked.add(sha256)

    def may_return(self, sha256: str) -> bool:
        """Whether a power cut may undo the removal of a blob's journal."""
        with self._lock:
            return sha256 in self._unlinked

    def _own(self) -> None:
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._lock_fd, 200, 0).decode(errors="replace").strip() or "another process"
            raise Conflict(
                f"the cache directory {self.root} is in use by {holder}",
                hint="Unmount that one first, or choose another directory with mount.cache in the configuration.",
            ) from None
        try:
            os.ftruncate(self._lock_fd, 0)
            os.pwrite(self._lock_fd, f"process {os.getpid()} ({_command()})\n".encode(), 0)
        except OSError as error:  # the lock counts, the text in it does not
            log.info("the owner can't be written into the lock", extra={"reason": error.strerror})

    def _drop_halves(self) -> None:
        """Remove partial files that are of no use: half of a pair, which a kill left, and what is whole as well, when
        a power cut undid the removal of the older one."""
        pairs: dict[str, set[str]] = {}
        for path in (self.root / "partial").iterdir():
            pairs.setdefault(path.stem, set()).add(path.suffix)
        for stem, suffixes in pairs.items():
            if suffixes != {".data", ".map"} or os.path.lexists(self.whole_path(stem)):
                for suffix in suffixes & {".data", ".map"}:
                    path = self.root / "partial" / (stem + suffix)
                    try:
                        path.unlink()
                    except OSError as error:  # it is not believed, whether it can be removed or not
                        log.warning("a leftover stays", extra={"path": str(path), "reason": error.strerror})

    def _whole_entries(self) -> Iterator[os.DirEntry[str]]:
        with os.scandir(self.root / "blobs") as fans:
            for fan in fans:
                if fan.is_dir(follow_symlinks=False):
                    with os.scandir(fan) as entries:
                        yield from entries


def _open_lock(path: Path) -> int:
    """A lock can be held on a read-only disk, too, if it was there before."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        if error.errno not in REFUSED:
            raise
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def _cost(status: os.stat_result) -> int:
    """Bytes that removing this name frees: none while the file has another one."""
    return status.st_blocks * 512 if status.st_nlink == 1 else 0


def _size_on_disk(path: str) -> int:
    try:
        return os.lstat(path).st_blocks * 512
    except FileNotFoundError:
        return 0


def _set(have: bytearray) -> Iterator[int]:
    return (index for index, flag in enumerate(have) if flag)


def _command() -> str:
    words = Path("/proc/self/cmdline").read_bytes().split(b"\0")
    return b" ".join(words[:4]).decode(errors="replace").strip()[:120]
