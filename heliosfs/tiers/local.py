"""One blob on the local disk: absent, partial or whole.

A partial blob is a sparse file and a journal (journal.py). The order of its writes is what makes a kill at any instant
safe: data, fdatasync, journal entry, fdatasync again; and at the end data, fsync, rename. Nothing that was not verified
is ever written by the callers, nothing that was not flushed is ever in the journal. A *sealed* partial blob is a link
to an object of the store beside it: all bytes are there, read-only, the journal says which were verified, and nothing
is written to it.

Calls block and come from any thread. ``load``, ``sync``, ``record`` and ``finish`` of one blob are never made at the
same time (the fetch engine sees to that); ``write`` and ``read_into`` may be.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from helios.errors import IntegrityError
from heliosfs.store.recipe import Recipe
from heliosfs.store.syscalls import open_cached, start_writeback
from heliosfs.tiers import bitmap
from heliosfs.tiers.journal import NEW, JournalFile
from heliosfs.tiers.places import Places, advise, blocks, make_fan, open_data, save_sums, unlink
from heliosfs.tiers.sums import Tally, follows

log = logging.getLogger("heliosfs.tiers")


@dataclass(slots=True)
class Loaded:
    """What was found on disk. ``have`` has one byte a chunk, 1 where the chunk is here; None without a recipe.

    ``doubted``: where a whole file, of ``size`` bytes, has another size or was made by another recipe than was asked
    for: one of the two may be wrong (doubt.py).
    ``failed``: places that could not be read, and why.
    """

    whole: bool = False
    recipe: Recipe | None = None
    have: bytearray | None = None
    doubted: Places | None = None
    size: int = 0
    failed: list[tuple[Places, OSError]] = field(default_factory=list)


class LocalBlob:
    """The files of one blob of ``size`` bytes; ``fd`` is -1 while there is none, and the same across ``finish``.

    They lie in one place; which one is open until there are some (``load``, ``go_to``), and stays while the blob is
    open, whatever is copied elsewhere meanwhile.
    """

    def __init__(self, places: Places, sha256: str, size: int) -> None:
        self._places, self.sha256, self.size = places, sha256, size
        self.fd = -1
        self.whole = False
        self.sealed = False
        self.damaged = False
        """Set when a chunk of a sealed file was wrong: the file is not kept once nobody uses it."""
        self.disputed = False
        """Set when partial files follow another recipe or size: they stay until a recipe was seen to be this blob's."""
        self._journal: JournalFile | None = None
        self._named = False
        """Whether the names of the partial files are on the disk for certain."""
        self._tally: Tally | None = None
        self._sums_bytes = 0
        self._lock = threading.Lock()
        self._users = 0
        self._closed = False
        self._seen: os.stat_result | None = None
        """Of the open file, as a thread saw it last: where a disk may hang the loop does not ask."""

    @property
    def places(self) -> Places:
        """Where its files are, or would be made."""
        return self._places

    def load(self, recipe_digest: str, *others: Places) -> Loaded:
        """Open what the disk has: a whole file before a partial one, in its place before ``others``.

        Files that contradict themselves are removed, with a warning; ones that contradict what was asked for stay. A
        place that fails costs only itself: ``failed`` names it.
        """
        with self._lock:
            found, home = Loaded(), self._places
            if self._closed:  # given up before it began
                return found
            for look in (self._look_whole, self._look_partial):
                for places in dict.fromkeys((home, *others)):
                    if not places.silent and all(places is not failed for failed, _ in found.failed):
                        self._places = places
                        try:
                            with places.asked.call():
                                if look(recipe_digest, found):
                                    self._see()
                                    return found
                                if found.doubted is not None:
                                    self._places = home
                                    return found
                        except OSError as error:
                            found.failed.append((places, error))
            self._places = home
            return found

    def go_to(self, places: Places) -> bool:
        """Make its files there, if any are ever made; returns whether it could still be decided. Never waits."""
        if not self._lock.acquire(blocking=False):  # they are being made
            return self._places is places
        try:
            if self.fd >= 0 or self._users or self._closed:
                return self._places is places
            self._places = places
            return True
        finally:
            self._lock.release()

    def load_at_once(self, recipe_digest: str) -> bool:
        """Open the whole file if that takes no time and it is as it should be; says whether it did. Else ``load``."""
        if not self._places.prompt or self._places.silent:
            return False
        with self._lock:
            fd = open_cached(self._places.whole_path(self.sha256))
            beside = open_cached(self._places.sums_path(self.sha256)) if fd >= 0 else -1
            try:
                if beside < 0 or not self._fits(os.fstat(fd)) or not follows(beside, recipe_digest):
                    return False
                self._has_whole(fd, os.fstat(beside).st_size)
                fd = -1
                return True
            finally:
                for each in (fd, beside):
                    if each >= 0:
                        os.close(each)

    def adopt(self, recipe: Recipe) -> bool:
        """Link the store's object, unverified, where there is one and nothing else is here; returns whether it did."""
        with self._lock, self._places.asked.call(long=True):
            path = self._places.object_path(self.sha256)
            if path is None or self._places.silent or self.fd >= 0 or self._closed:
                return False
            data_path = self._places.data_path(self.sha256)
            try:
                self._remove_partial()
                self.disputed = False
                with self._places.asked.call():
                    os.link(path, data_path, follow_symlinks=False)
            except OSError:  # it went just now, or belongs to somebody else
                return False
            try:
                with self._places.asked.call():
                    fd, sealed = open_data(data_path)
                if sealed and os.fstat(fd).st_size == self.size:
                    self.fd, self.sealed = fd, True
                    self._start_journal(recipe)
                    self._see()
                    return True
                os.close(fd)
            except OSError as error:
                log.info("an object can't be linked", extra={"blob": self.sha256, "reason": error.strerror})
                self._close_files()
                self.sealed = False
            self._remove_partial()
            return False

    def write(self, recipe: Recipe, index: int, data: memoryview) -> None:
        """Write a verified chunk at its place, making the files if there are none. Raises OSError.

        After it returns, readers get these bytes; they outlive a crash only after ``sync`` and ``record``.
        """
        with self._using(recipe) as fd:
            self.verified(index, data)
            start, _ = recipe.span(index)
            written = 0
            try:
                while written < len(data) and not self.whole:
                    written += os.pwrite(fd, data[written:], start + written)
            except OSError:
                if not self.whole:
                    raise
                # a late duplicate: the blob became whole meanwhile, and the descriptor read-only
            else:
                start_writeback(fd, start, len(data))
            self._see()

    def verified(self, index: int, data: memoryview) -> None:
        """These bytes of a chunk have the right hash: the sums for the scrubber are made of them."""
        tally = self._tally
        if tally is not None:
            tally.note(index, data)

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill the view from ``offset``. Raises OSError; a file that became shorter is EIO."""
        filled = 0
        while filled < len(view):
            count = os.preadv(self.fd, [view[filled:]], offset + filled)
            if not count:
                raise OSError(errno.EIO, f"the cached blob {self.sha256} is shorter than {self.size} bytes")
            filled += count

    def sync(self) -> None:
        """Flush what was written. Raises OSError: then nothing written since the last call can be relied on."""
        with self._using() as fd:
            os.fdatasync(fd)

    def record(self, chunks: Iterable[int]) -> None:
        """Enter chunks that were written before the last ``sync`` into the journal; then they survive a power cut.

        Raises OSError; may be called again.
        """
        with self._using():
            assert self._journal is not None
            end = self._journal.write(chunks)
            if not self._named:
                self._places.sync_partial()
                self._named = True
            self._journal.end = end

    def finish(self) -> None:
        """Every chunk was written: make the blob whole, read-only and durable under its own name.

        Readers keep their descriptor: it now is a read-only one of the same file. Raises OSError; may be called again.
        """
        with self._using() as fd:
            if not self.whole:
                os.fsync(fd)
                os.fchmod(fd, 0o444)
                path = self._places.whole_path(self.sha256)
                make_fan(path)
                read_only = os.open(self._places.data_path(self.sha256), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
                try:
                    os.rename(self._places.data_path(self.sha256), path)
                    self.whole = True
                    self._places.became_whole(self.sha256, self.size)
                    os.dup2(read_only, fd, inheritable=False)
                finally:
                    os.close(read_only)
                advise(fd)
            self._see()
            self._places.sync_whole(self.sha256)
            if unlink(self._places.map_path(self.sha256)):
                self._places.unlinked(self.sha256)
            journal, self._journal = self._journal, None
            if journal is not None:
                journal.close()
            tally, self._tally = self._tally, None
            if tally is not None:
                self._sums_bytes = save_sums(self._places.sums_path(self.sha256), tally.sums())

    def forget(self, chunks: Iterable[int]) -> None:
        """Take chunks that turned out to be wrong out of the journal, durably. Raises OSError.

        Like ``record`` it is not called beside the others.
        """
        with self._using():
            if self._journal is not None:
                path = self._places.map_path(self.sha256)
                self._journal.forget(path, self.sha256, self.size, chunks, self._places.sync_partial)

    @property
    def identity(self) -> tuple[int, int] | None:
        """Device and inode of the open data file; None where there is none."""
        if self.fd < 0:
            return None
        status = self._status()
        return status.st_dev, status.st_ino

    @property
    def cost(self) -> int:
        """Bytes of room that the open files take; 0 for a file that has another name. Raises OSError."""
        if self.fd < 0:
            return 0
        status = self._status()
        data = status.st_blocks * 512 if status.st_nlink < 2 else 0
        journal = self._journal.end if self._journal is not None else 0
        beside = self._sums_bytes if self.whole else journal
        return data + blocks(beside) if data or not self.whole else 0

    @property
    def unlinked(self) -> bool:
        """Whether the open file may have no name any more; asked of the disk only where that takes no time."""
        return self.fd >= 0 and (not self._places.prompt or os.fstat(self.fd).st_nlink == 0)

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called; calls may still be under way, and the descriptors go with the last of them."""
        return self._closed

    @property
    def ended(self) -> bool:
        """Whether ``close`` was called and every call under way then has returned."""
        return self._closed and not self._users  # it is set under the lock that calls begin under

    def let_go(self, *, behind: bool = False) -> None:
        """``close``, without waiting for a disk that may hang; ``behind``: a call may be under way that is given up."""
        if self._places.prompt and not self._places.silent and not behind:
            self.close()
        else:
            threading.Thread(target=self._close_late, name="close", daemon=True).start()

    def _close_late(self) -> None:
        try:
            self.close()
        except OSError as error:  # a disk that hung and then went; the descriptors are gone with it
            log.info("a file could not be put away", extra={"blob": self.sha256, "reason": error.strerror})

    def close(self) -> None:
        """Close the files, at the latest when the last call under way returns. No call may follow."""
        with self._lock:
            self._closed = True
            if not self._users:
                self._close_files()

    @contextlib.contextmanager
    def _using(self, recipe: Recipe | None = None) -> Iterator[int]:
        """The data file's descriptor, not closed meanwhile; with a recipe the files are made if there are none."""
        with contextlib.ExitStack() as stack:
            with self._lock:
                if self._closed:
                    raise OSError(errno.EBADF, f"the blob {self.sha256} was closed")
                stack.enter_context(self._places.asked.call(long=True))
                if self.fd < 0 and recipe is not None:
                    self._create(recipe)
                self._users += 1
                stack.callback(self._let_go)
            yield self.fd

    def _see(self) -> None:
        if not self._places.prompt and self.fd >= 0:
            self._seen = os.fstat(self.fd)

    def _status(self) -> os.stat_result:
        seen = self._seen
        return os.fstat(self.fd) if seen is None or self._places.prompt else seen

    def _let_go(self) -> None:
        with self._lock:
            self._users -= 1
            if self._closed and not self._users:
                self._close_files()

    def _close_files(self) -> None:
        fd, journal, self.fd, self._journal = self.fd, self._journal, -1, None
        try:
            if fd >= 0:
                os.close(fd)  # which closes it, even where it raises
        finally:
            if journal is not None:
                journal.close()
        if self.damaged and not self.whole:
            with self._places.asked.call(long=True):
                self._remove_partial()

    def _forget_files(self) -> None:
        self._close_files()
        self.sealed = False

    def _look_whole(self, recipe_digest: str, found: Loaded) -> bool:
        found.whole = self._open_whole(recipe_digest, found)
        return found.whole

    def _look_partial(self, recipe_digest: str, found: Loaded) -> bool:
        journal = self._open_partial(recipe_digest)
        if journal is not None:
            found.recipe, found.have = journal.recipe, journal.have
        return journal is not None

    def _open_whole(self, recipe_digest: str, found: Loaded) -> bool:
        try:
            fd = os.open(self._places.whole_path(self.sha256), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return False
        try:
            status = os.fstat(fd)
            sums_bytes, alike = self._sums(recipe_digest)
            alike = alike or self._places.proved(self.sha256, status.st_ino)
            if not alike or not self._fits(status):
                found.doubted, found.size = self._places, status.st_size
                return False
            self._has_whole(fd, sums_bytes)
            fd = -1
            return True
        finally:
            if fd >= 0:
                os.close(fd)

    def _sums(self, recipe_digest: str) -> tuple[int, bool]:
        """Bytes of the sums beside the whole file, and whether it was made by this recipe."""
        try:
            fd = os.open(self._places.sums_path(self.sha256), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return 0, False
        try:
            return os.fstat(fd).st_size, follows(fd, recipe_digest)
        finally:
            os.close(fd)

    def _fits(self, status: os.stat_result) -> bool:
        """Whether a file with this status can be the whole blob."""
        return stat.S_ISREG(status.st_mode) and status.st_size == self.size

    def _has_whole(self, fd: int, sums_bytes: int) -> None:
        """The descriptor is one of the whole file; its sums take so many bytes."""
        self.fd, self.whole, self._sums_bytes = fd, True, sums_bytes
        advise(fd)

    def _open_partial(self, recipe_digest: str) -> bitmap.Journal | None:
        data_path, map_path = self._places.data_path(self.sha256), self._places.map_path(self.sha256)
        try:
            self.fd, sealed = open_data(data_path)
            self._journal, journal = JournalFile.open(map_path, self.sha256)
            if os.fstat(self.fd).st_size != journal.recipe.size:
                raise IntegrityError(f"the partial file of {self.sha256} has the wrong size")
        except FileNotFoundError:
            self._forget_files()
            self._remove_partial()  # half of a pair says nothing
            return None
        except IntegrityError as error:
            log.warning("a partial blob is started anew", extra={"blob": self.sha256, "reason": str(error)})
            self._forget_files()
            self._remove_partial()
            return None
        except OSError:
            self._forget_files()
            raise
        self.disputed = (journal.recipe.size, journal.recipe.digest) != (self.size, recipe_digest)
        if self.disputed:
            fields = {"blob": self.sha256, "recipe": journal.recipe.digest, "asked": recipe_digest}
            log.info("a partial blob follows another recipe than the one asked for", extra=fields)
            self._forget_files()
            return None
        self._journal.cut()
        self.sealed = sealed
        self._tally = Tally(journal.recipe)
        advise(self.fd)
        return journal

    def _create(self, recipe: Recipe) -> None:
        try:
            self._remove_partial()  # what could not be loaded
            self.disputed = False
            self.fd = os.open(self._places.data_path(self.sha256), NEW, 0o600)
            os.ftruncate(self.fd, self.size)
            self._start_journal(recipe)
        except OSError:
            self._close_files()
            with contextlib.suppress(OSError):  # a half is of no use to anybody, now or later
                self._remove_partial()
            raise

    def _start_journal(self, recipe: Recipe) -> None:
        self._journal = JournalFile.create(self._places.map_path(self.sha256), recipe)
        self._tally = Tally(recipe)
        advise(self.fd)

    def _remove_partial(self) -> None:
        if unlink(self._places.map_path(self.sha256)) or self._places.may_return(self.sha256):
            # an old journal must never come back, after a power cut, beside a new data file
            self._places.sync_partial()
        unlink(self._places.data_path(self.sha256))
