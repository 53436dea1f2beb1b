"""Looking at a file's bytes again: with BLAKE3 against the recipe, or with XXH3 against sums made when they were right.

The file is read past the page cache (O_DIRECT): that shows what the disk has, and takes nobody's pages away. Where a
filesystem can't do that, pages that were not in memory before are dropped again.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
from array import array
from collections.abc import Iterable, Iterator
from typing import Final

from blake3 import blake3

from helios.errors import IntegrityError
from heliosfs.store.recipe import MAX_CHUNK, Recipe
from heliosfs.tiers.sums import MAX_BYTES, Sums, sum_of

ALIGN: Final = 4096
_FLAGS: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW


def load_sums(path: str, sha256: str) -> Sums | None:
    """A blob's sums; None where there are none, or none that can be used."""
    try:
        with open(path, "rb") as file:
            return Sums.decode(file.read(MAX_BYTES), sha256)
    except (OSError, IntegrityError):
        return None


class DiskReader:
    """Reads a file without leaving a trace in the page cache. For one thread at a time."""

    def __init__(self, path: str) -> None:
        """Raises OSError."""
        self._direct = True
        try:
            self._fd = os.open(path, _FLAGS | os.O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._fd = os.open(path, _FLAGS)
            self._plainly()
        status = os.fstat(self._fd)
        self.device, self.inode, self.size = status.st_dev, status.st_ino, status.st_size
        self._buffer = memoryview(mmap.mmap(-1, MAX_CHUNK + 2 * ALIGN, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))

    def read(self, offset: int, length: int) -> memoryview:
        """``length`` bytes (MAX_CHUNK at most), fewer at the file's end; valid until the next call. Raises OSError."""
        start = offset - offset % ALIGN
        end = offset + length + -(offset + length) % ALIGN
        try:
            filled = self._fill(start, end - start)
        except OSError as error:
            if not self._direct or error.errno != errno.EINVAL:
                raise
            self._plainly()
            filled = self._fill(start, end - start)
        return self._buffer[offset - start : max(offset - start, min(filled, offset - start + length))]

    def close(self) -> None:
        os.close(self._fd)

    def _plainly(self) -> None:
        """Read through the page cache, and nothing ahead."""
        fcntl.fcntl(self._fd, fcntl.F_SETFL, 0)
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_RANDOM)
        self._direct = False

    def _fill(self, start: int, length: int) -> int:
        filled, cached = 0, not self._direct and self._in_memory(start, length)
        while filled < length:
            count = os.preadv(self._fd, [self._buffer[filled:length]], start + filled)
            filled += count
            if not count or (self._direct and count % ALIGN):
                break
        if not self._direct and not cached:
            os.posix_fadvise(self._fd, start, length, os.POSIX_FADV_DONTNEED)
        return filled

    def _in_memory(self, start: int, length: int) -> bool:
        """Whether reading would take nothing from the disk."""
        count = min(length, self.size - start)
        try:
            return os.preadv(self._fd, [self._buffer[:count]], start, os.RWF_NOWAIT) == count
        except OSError:
            return False


class Examination:
    """One look at one file, a chunk a step. ``step`` blocks; calls come one after another, from any thread.

    ``sums`` is what is known of it, None: only its sha256. With ``strong`` every chunk is hashed with BLAKE3, else
    only one whose sum differs. ``chunks`` are those to look at, all from ``start`` by default. What was found, after
    the last step: ``bad`` chunks and the ``reason``, ``unreadable`` where it was the disk that said so; ``fresh`` sums,
    where there were none or wrong ones.
    """

    def __init__(
        self,
        path: str,
        sha256: str,
        sums: Sums | None,
        *,
        strong: bool,
        chunks: Iterable[int] | None = None,
        start: int = 0,
    ) -> None:
        """Raises OSError."""
        self._file = DiskReader(path)
        self._sha256, self._strong = sha256, strong
        self._known = sums.values if sums is not None else None
        self._recipe = sums.recipe if sums is not None else None
        self._whole, self._start = chunks is None, start
        self.device, self.inode, self.size = self._file.device, self._file.inode, self._file.size
        self.unreadable = False
        self.bad: list[int] = []
        self.reason = ""
        self.fresh: Sums | None = None
        self._steps = self._by_name() if self._recipe is None else self._by_recipe(self._recipe, chunks)

    def step(self) -> int:
        """Look at the next chunk; returns its bytes, 0 when it is over."""
        try:
            return next(self._steps, 0)
        except OSError as error:
            self.bad.append(-1)
            self.unreadable, self.reason = True, f"it can't be read: {error.strerror}"
            return 0

    def close(self) -> None:
        self._file.close()

    def _by_recipe(self, recipe: Recipe, chunks: Iterable[int] | None) -> Iterator[int]:
        if self.size != recipe.size:
            self.bad, self.reason = [-1], f"it has {self.size} bytes instead of {recipe.size}"
            return
        values, known = array("Q", bytes(8 * len(recipe))), self._known
        for index in range(self._start, len(recipe)) if chunks is None else chunks:
            start, end = recipe.span(index)
            data = self._file.read(start, end - start)
            values[index] = sum_of(data)
            doubt = self._strong or known is None or values[index] != known[index]
            if doubt and blake3(data).digest() != recipe.id(index):
                data = self._file.read(start, end - start)  # once more: it may have been the reading
                values[index] = sum_of(data)
                if blake3(data).digest() != recipe.id(index):
                    self.bad.append(index)
                    self.reason = f"chunk {index} of {len(recipe)} does not have its hash"
                    if self._whole:
                        return
            yield end - start
        if self._whole and not self._start and values != known:
            self.fresh = Sums(recipe, values)

    def _by_name(self) -> Iterator[int]:
        """Nothing is known but the sha256: hash it all, and make what the next look goes by."""
        whole, values, chunks = hashlib.sha256(), array("Q"), []
        for start in range(0, self.size, MAX_CHUNK):
            data = self._file.read(start, min(MAX_CHUNK, self.size - start))
            whole.update(data)
            values.append(sum_of(data))
            chunks.append((blake3(data).digest(), len(data)))
            yield len(data)
        if whole.hexdigest() != self._sha256:
            self.bad, self.reason = [-1], "it does not have its sha256"
        else:
            self.fresh = Sums(Recipe.build(self._sha256, chunks), values)
