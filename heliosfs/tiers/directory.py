"""One tier: a directory of blobs that one process owns.

    blobs/ab/<sha256>        a whole, verified blob: a plain read-only file
    partial/<sha256>.data    a sparse file of the blob's size, or a link to the object that is the blob
    partial/<sha256>.map     the journal of the chunks that are safely in it (bitmap.py)
    partial/<sha256>.moving  a copy from another tier that is not done; removed at start
    sums/ab/<sha256>         what the scrubber compares a whole blob with (sums.py)
    quarantine/              blobs whose bytes were found to be wrong (quarantine.py)
    lock                     held with flock by the owner; the text in it is for people

Where the object store is a directory beside it, on the same filesystem, an object that is a whole blob is not copied:
it is hard-linked, verified chunk by chunk in place, and takes no room.

A file under ``blobs/`` was verified, chunk by chunk or as a whole, before it got there and is not hashed again when it
is opened.

The path may come to mean another directory, because something was unmounted, mounted or removed: ``check`` compares the
lock file. Nothing is made below the root but when the directory is taken, so that nothing goes to whatever lies there.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

from helios.errors import IntegrityError, NoSpace, Unavailable
from heliosfs.store.directory import FULL
from heliosfs.store.keys import PUBLIC, blob_key
from heliosfs.store.syscalls import sync_directory
from heliosfs.tiers import bitmap, ownership
from heliosfs.tiers.leases import open_elsewhere
from heliosfs.tiers.local import LocalBlob
from heliosfs.tiers.places import make_fan, unlink
from heliosfs.tiers.policy import Disk
from heliosfs.tiers.quarantine import Quarantine, Taken
from heliosfs.tiers.reading import DiskReads
from heliosfs.tiers.silence import Asked, waits_for_nobody

log = logging.getLogger("heliosfs.tiers")

SETTING: Final = {"l1": "mount.cache", "l2": "mount.l2"}
"""What says where a tier's directory is, by the tier's name."""


THREADS: Final = 8
"""Reads and flushes at a time: those of one tier never wait for another's."""


@dataclass(frozen=True, slots=True)
class TierUsage:
    """What a tier holds, in blobs and bytes; ``free`` and ``total`` are its filesystem's."""

    blobs: int
    blob_bytes: int
    partials: int
    partial_bytes: int
    free: int
    total: int


@dataclass(frozen=True, slots=True)
class Found:
    """A blob on the disk: its size, the bytes of room that removing it frees, whether it is whole."""

    size: int
    cost: int
    whole: bool = True


class Busy(Exception):
    """Somebody else has the file open."""


class TierDirectory:
    """The directory, while this process owns it. Threads may share it; every call blocks."""

    def __init__(self, name: str, root: Path, beside: Path | None = None, *, create: bool = True) -> None:
        """Take the directory over, making it if needed and ``create``; ``beside`` is an object store's directory.

        One on a read-only filesystem that has been a tier before is taken as it is. Raises Conflict when another
        process owns it, NoSpace or Unavailable when it can't be made or used.
        """
        self.name, self.root, self._beside = name, root, beside
        self.quarantine = Quarantine(root)
        self.threads = trio.CapacityLimiter(THREADS)
        self.asked, self.silent = Asked(), False
        self.reads = DiskReads(self.asked)
        self._lock = threading.Lock()
        self._unlinked: set[str] = set()
        self._proved: dict[str, int] = {}
        try:
            self._lock_fd = ownership.open_lock(root, create)
        except OSError as error:
            kind = NoSpace if error.errno in FULL else Unavailable
            raise kind(
                f"the cache directory {root} can't be used: {error.strerror}",
                hint=f"Choose another with {SETTING[name]} in the configuration.",
            ) from None
        try:
            ownership.take(self._lock_fd, root, SETTING[name])
            ownership.drop_leftovers(root, self.whole_path)
            self._sync_removals()
            self.prompt, self.device = waits_for_nobody(root), os.fstat(self._lock_fd).st_dev
            self._whole = {entry.name: entry.stat().st_size for entry in self._whole_entries()}
        except OSError as error:
            os.close(self._lock_fd)
            raise Unavailable(f"the cache directory {root} can't be read: {error.strerror}") from error
        except BaseException:
            os.close(self._lock_fd)
            raise

    def close(self) -> None:
        """Give the directory up."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def give_up(self) -> None:
        """Its disk hangs: nobody waits for it, and it is nobody's, until every call has come back."""
        self.silent = True
        self.reads.give_up()

    def __enter__(self) -> TierDirectory:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def blob(self, sha256: str, size: int) -> LocalBlob:
        """One blob's files; nothing is touched until its ``load`` is called."""
        return LocalBlob(self, sha256, size)

    def check(self) -> bool:
        """See that the directory is still this one, and answers; returns whether it can be written. Raises OSError."""
        with self.asked.call():
            fd = os.open(self.root / "lock", os.O_RDONLY | os.O_CLOEXEC)
            try:
                if not os.path.sameopenfile(fd, self._lock_fd):
                    raise OSError(errno.ESTALE, "another directory is in its place")
            finally:
                os.close(fd)
            with os.scandir(self.root / "partial") as entries:
                next(entries, None)
            return not os.statvfs(self.root).f_flag & os.ST_RDONLY

    def try_writing(self) -> bool:
        """See that something can be written to the disk. Raises OSError."""
        with self.asked.call():
            ownership.write_owner(self.root)
        return True

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

    def whole_bytes(self, sha256: str) -> int | None:
        """The size of a whole blob that is here, without a look at the disk."""
        with self._lock:
            return self._whole.get(sha256)

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
        whole, data = _status(self.whole_path(sha256)), _status(self.data_path(sha256))
        journal, sums = _status(self.map_path(sha256)), _status(self.sums_path(sha256))
        known = whole or data
        if known is None:
            return None
        if whole is None or not _cost(whole):
            sums = None
        cost = sum(_cost(status) for status in (whole, sums, data, journal) if status is not None)
        return Found(known.st_size, cost, whole is not None)

    def remove(self, sha256: str) -> int:
        """Remove a blob's files, whole and partial. Raises Busy when somebody else has the whole one open; OSError.

        Nobody of this process may load or write the blob meanwhile: a partial one is removed in two steps. Who opened
        it in the very moment keeps it: then its descriptor is returned, to be watched and closed, else -1.
        """
        fd = self._gone(sha256)
        unlink(self.sums_path(sha256))
        if unlink(self.map_path(sha256)):
            self.sync_partial()  # an old journal must never come back beside a new data file
        unlink(self.data_path(sha256))
        return fd

    def is_open(self, sha256: str) -> bool:
        """Whether anybody has the whole file of a blob open; this process must not. Raises OSError."""
        fd = os.open(self.whole_path(sha256), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            return open_elsewhere(fd)
        finally:
            os.close(fd)

    def _gone(self, sha256: str) -> int:
        """Remove the whole file."""
        path = self.whole_path(sha256)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return -1
        try:
            takes_room = _cost(os.fstat(fd)) > 0
            if takes_room and open_elsewhere(fd):
                raise Busy
            unlink(path)
            self.went(sha256)
            if takes_room and open_elsewhere(fd):
                fd, kept = -1, fd
                return kept
            return -1
        finally:
            if fd >= 0:
                os.close(fd)

    def place(self, sha256: str, size: int) -> None:
        """A copy is whole, verified and flushed: give it the blob's name, durably. Raises OSError."""
        path = self.whole_path(sha256)
        make_fan(path)
        os.rename(self.moving_path(sha256), path)
        self.became_whole(sha256, size)
        self.sync_whole(sha256)

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

    def whole(self) -> frozenset[str]:
        """The blobs that are here whole, without a look at the disk."""
        with self._lock:
            return frozenset(self._whole)

    def disk(self) -> Disk:
        """The filesystem's free and total bytes."""
        with self.asked.call():
            disk = os.statvfs(self.root)
        return Disk(disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize)

    def usage(self) -> TierUsage:
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
        blobs, blob_bytes = self.counted()
        return TierUsage(blobs, blob_bytes, partials, partial_bytes, disk.free, disk.total)

    def counted(self) -> tuple[int, int]:
        """Whole blobs and their bytes, without a look at the disk."""
        with self._lock:
            return len(self._whole), sum(self._whole.values())

    def whole_path(self, sha256: str) -> str:
        return f"{self.root}/blobs/{sha256[:2]}/{sha256}"

    def object_path(self, sha256: str) -> str | None:
        return None if self._beside is None else f"{self._beside}/{blob_key(PUBLIC, sha256)}"

    def data_path(self, sha256: str) -> str:
        return f"{self.root}/partial/{sha256}.data"

    def map_path(self, sha256: str) -> str:
        return f"{self.root}/partial/{sha256}.map"

    def moving_path(self, sha256: str) -> str:
        return f"{self.root}/partial/{sha256}.moving"

    def sums_path(self, sha256: str) -> str:
        return f"{self.root}/sums/{sha256[:2]}/{sha256}"

    def became_whole(self, sha256: str, size: int) -> None:
        with self._lock:
            self._whole[sha256] = size
            self._proved.pop(sha256, None)

    def went(self, sha256: str) -> None:
        with self._lock:
            self._whole.pop(sha256, None)
            self._proved.pop(sha256, None)

    def prove(self, sha256: str, inode: int) -> None:
        """This whole file was seen to have its sha256: it is right for whatever recipe of the blob."""
        with self._lock:
            self._proved[sha256] = inode

    def proved(self, sha256: str, inode: int) -> bool:
        """Whether that was seen of this file, since this process has the directory."""
        with self._lock:
            return self._proved.get(sha256) == inode

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

    def _sync_removals(self) -> None:
        """What was removed before stays removed."""
        try:
            self.sync_partial()
        except OSError as error:
            log.warning("the cache directory can't be synced", extra={"reason": error.strerror})

    def _whole_entries(self) -> Iterator[os.DirEntry[str]]:
        with os.scandir(self.root / "blobs") as fans:
            for fan in fans:
                if fan.is_dir(follow_symlinks=False):
                    with os.scandir(fan) as entries:
                        yield from entries


def _cost(status: os.stat_result) -> int:
    """Bytes that removing this name frees: none while the file has another one."""
    return status.st_blocks * 512 if status.st_nlink == 1 else 0


def _status(path: str) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except FileNotFoundError:
        return None


def _set(have: bytearray) -> Iterator[int]:
    return (index for index, flag in enumerate(have) if flag)
