"""Files being written in the store's staging directory: a blob as it is, or packs of chunks.

Nothing here is visible: ``put`` makes it so, ``abort`` removes it. A full disk raises NoSpace; the caller then aborts.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from helios.errors import NoSpace, Unavailable
from heliosfs.store import pack
from heliosfs.store.directory import FULL, full
from heliosfs.store.keys import pack_key
from heliosfs.store.placement import NO_CODEC, ChunkLocation
from heliosfs.store.syscalls import reserve, start_writeback
from registry.ingest.slabs import ALIGN, SLAB, WAIT_S, Slab
from registry.ingest.types import NewObject, Target

WRITEBACK: Final = 16 << 20
"""Writeback is started each time this many bytes were written, so that the fsync at the end is short."""

HEADROOM: Final = 256 << 20
"""Bytes that an ingest leaves free for everything else on the disk, or a hundredth of a small disk."""


class StagedFile:
    """One file in staging, written from start to end.

    With ``direct`` whole blocks bypass the page cache (O_DIRECT) where the filesystem allows it: a large blob would
    only push out what is being served, and filling the cache can cost more CPU than all hashing together.
    """

    def __init__(self, store: Target, *, direct: bool) -> None:
        self._directory = store.staging()
        self.path = self._directory / secrets.token_hex(8)
        self.size = 0
        self._clean = 0
        self._flushed = threading.Condition()
        self._unflushed = 0
        with _guard(self._directory):
            self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                self._direct = direct and self._try_direct()
            except OSError:
                self.abort()
                raise
        self._pending = 0
        """Bytes at the end of the file that are still in ``_bounce``."""
        self._bounce = memoryview(mmap.mmap(-1, SLAB)) if self._direct else memoryview(b"")

    def reserve(self, size: int) -> None:
        """Make sure that ``size`` bytes fit, with some headroom left. Raises NoSpace."""
        check_space(self._directory, size)
        with _guard(self._directory):
            reserve(self.fd, size)

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        view = memoryview(data)
        while self._direct and view:
            count = min(len(view), len(self._bounce) - self._pending)
            self._bounce[self._pending : self._pending + count] = view[:count]
            self._pending += count
            self.size += count
            view = view[count:]
            if self._pending == len(self._bounce):
                self._pending = 0
                self._write(self._bounce, self.size - len(self._bounce))
        if view:
            self.size += len(view)
            self._write(view, self.size - len(view))

    def write_slab(self, slab: Slab) -> None:
        """Append a slab's chunks.

        When they are aligned as the file is, whole blocks stay where they are, as ``slab.block``, and ``flush_block``
        writes them: from any thread and in any order.
        """
        if not self._direct or self._pending != slab.head or slab.offset != self.size:
            self.write(slab.data)
            return
        start, end = slab.head, slab.head + len(slab.data)
        whole = end - end % ALIGN
        slab.memory[:start] = self._bounce[: self._pending]
        self._pending = end - whole
        self._bounce[: self._pending] = slab.memory[whole:end]
        self.size += end - start
        if whole:
            with self._flushed:
                self._unflushed += 1
            slab.block = Block(self, slab.memory[:whole], self.size - end)

    def flush_block(self, block: Block) -> None:
        """Write what ``write_slab`` left."""
        try:
            self._write(block.data, block.offset)
        finally:
            with self._flushed:
                self._unflushed -= 1
                self._flushed.notify_all()

    def copy(self, source: StagedFile, offset: int, count: int) -> None:
        """Append bytes of another staged file, inside the kernel."""
        source.settle()
        self.settle()
        with _guard(self._directory):
            while count:
                done = os.copy_file_range(source.fd, self.fd, count, offset, self.size)
                if not done:
                    raise Unavailable(f"{source.path} is shorter than what was written to it")
                offset += done
                count -= done
                self.size += done
                self._start_writeback()

    def read(self, offset: int, buffer: memoryview) -> bool:
        """Fill a buffer with bytes written before, once ``settle`` was called; returns whether there are as many."""
        with _guard(self._directory):
            while buffer:
                count = os.preadv(self.fd, [buffer], offset)
                if not count:
                    return False
                buffer = buffer[count:]
                offset += count
        return True

    def settle(self) -> None:
        """Let the file hold every byte written; from then on it is written through the page cache."""
        self._wait_flushed()
        if self._direct:
            self._direct = False
            self._set_direct(False)
            pending, self._pending = self._pending, 0
            self._write(self._bounce[:pending], self.size - pending)
            self._bounce = memoryview(b"")

    def close(self) -> None:
        """End the writing; ``path`` then holds every byte."""
        if self.fd >= 0:
            self.settle()
            fd, self.fd = self.fd, -1
            with _guard(self._directory):
                os.close(fd)

    def abort(self) -> None:
        """Remove the file."""
        self._wait_flushed()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        self.path.unlink(missing_ok=True)

    def _wait_flushed(self) -> None:
        # Nobody may close the descriptor before: its number could be another file's by the time a block is written.
        with self._flushed:
            if not self._flushed.wait_for(lambda: not self._unflushed, WAIT_S):
                raise Unavailable(f"{self._directory} took no bytes for {WAIT_S:g} s; look at its disk")

    def _write(self, view: memoryview, offset: int) -> None:
        with _guard(self._directory):
            while view:
                count = os.pwrite(self.fd, view, offset)
                view = view[count:]
                offset += count
        if not self._direct:
            self._start_writeback()

    def _start_writeback(self) -> None:
        if self.size - self._clean >= WRITEBACK:
            start_writeback(self.fd, self._clean, self.size - self._clean)
            self._clean = self.size

    def _try_direct(self) -> bool:
        """Switch to O_DIRECT; returns whether filesystem and disk take aligned blocks of ours that way."""
        try:
            self._set_direct(True)
            os.pwrite(self.fd, mmap.mmap(-1, ALIGN), 0)
            os.ftruncate(self.fd, 0)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._set_direct(False)
            return False
        return True

    def _set_direct(self, on: bool) -> None:
        flags = fcntl.fcntl(self.fd, fcntl.F_GETFL)
        fcntl.fcntl(self.fd, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)


@dataclass(frozen=True, slots=True)
class Block:
    """Bytes that belong into a staged file at ``offset``."""

    file: StagedFile
    data: memoryview
    offset: int


def flush(slab: Slab) -> None:
    """Write the block of a slab, if the writer left one."""
    if slab.block is not None:
        slab.block.file.flush_block(slab.block)


class Packs:
    """Chunks written back to back into packs of about 64 MiB, each in staging until ``put``.

    ``encoded``: chunks may be, which takes packs of another version.
    """

    def __init__(self, store: Target, domain: str, *, encoded: bool = False) -> None:
        self._store, self._domain, self._encoded = store, domain, encoded
        self._open: StagedFile | None = None
        self._key = ""
        self._entries: list[pack.PackEntry] = []
        self._finished: list[tuple[str, StagedFile]] = []

    def write(self, chunk: bytes, data: memoryview, length: int | None = None, codec: str = NO_CODEC) -> ChunkLocation:
        """Add a chunk, of ``length`` bytes if that is not the data's length; returns where it will lie."""
        file = self._file(len(data))
        at = self._enter(chunk, file.size, len(data) if length is None else length, len(data), codec)
        file.write(data)
        return at

    def copy(self, chunk: bytes, source: StagedFile, offset: int, length: int) -> ChunkLocation:
        """Add a chunk that lies in another staged file."""
        file = self._file(length)
        at = self._enter(chunk, file.size, length, length, NO_CODEC)
        file.copy(source, offset, length)
        return at

    def put(self, stored: list[NewObject]) -> None:
        """Move every pack into the store, adding each to ``stored`` before it can be there."""
        self._seal()
        for key, file in self._finished:
            stored.append(NewObject(key, file.size))
            self._store.put_file(key, file.path)

    def abort(self) -> None:
        """Remove what is still in staging."""
        for file in [f for _, f in self._finished] + ([self._open] if self._open else []):
            file.abort()

    def _file(self, length: int) -> StagedFile:
        if self._open is not None and self._open.size >= pack.TARGET:
            self._seal()
        if self._open is None:
            check_space(self._store.staging(), length)  # the headroom is more than the rest of a pack
            self._open = StagedFile(self._store, direct=True)
            self._key = pack_key(self._domain, secrets.token_hex(16))
            self._open.write(pack.head(encoded=self._encoded))
        return self._open

    def _enter(self, chunk: bytes, offset: int, length: int, encoded: int, codec: str) -> ChunkLocation:
        self._entries.append(pack.PackEntry(chunk, offset, length, encoded, codec))
        return ChunkLocation(self._key, offset, length, encoded, codec)

    def _seal(self) -> None:
        if self._open is not None:
            self._open.write(pack.tail(self._entries))
            self._open.close()
            self._finished.append((self._key, self._open))
            self._open, self._entries = None, []


def check_space(directory: Path, size: int) -> None:
    """Raise NoSpace unless ``size`` more bytes leave some headroom on the directory's filesystem."""
    with _guard(directory):
        space = os.statvfs(directory)
    free = space.f_bavail * space.f_frsize
    headroom = min(HEADROOM, space.f_blocks * space.f_frsize // 100)
    if free < size + headroom:
        raise NoSpace(
            f"no room in {directory}: {size:,} bytes are needed and {headroom:,} kept free, but {free:,} are left",
            hint="free some space there, or put the store on a larger disk (registry.store)",
        )


@contextmanager
def _guard(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise full(directory, error) from error
        raise Unavailable(f"{directory} can't be written: {error}") from error
