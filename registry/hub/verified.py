"""Bytes for the Hub's clients, which do not check what they get: every chunk is hashed here before it may leave.

A range goes out in windows of whole chunks. A window is read and hashed, from the same open file that sendfile then
uses, while the one before is sent. The first window is checked before the answer's head, so that a damaged chunk there
is a clean error; one further back breaks the connection.

A chunk that passed is not hashed again for ``FRESH_S`` seconds as long as its object is the same file, unchanged:
device, inode, size, times of modification and of change. So a model that many nodes download is hashed once, not once
a node. docs/hub-api.md says what this costs and what it leaves open.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import BinaryIO, Final

from blake3 import blake3

from helios.errors import HeliosError, IntegrityError, NotFound
from helios.http.server import FilePart
from heliosfs.store.chunks import good, read
from heliosfs.store.objects import ObjectStore
from heliosfs.store.placement import PlacedBlob, Segment
from heliosfs.store.recipe import MAX_CHUNK

log = logging.getLogger("helios.registry.hub")

FRESH_S: Final = 600.0
"""How long a chunk that passed is not hashed again, in seconds."""
REMEMBERED: Final = 1 << 16
"""Chunks whose passing is remembered: 256 GB of models in some 18 MB of memory."""
HEALED: Final = 3
"""A chunk may turn out to be wrong so many times before it is given up, if the store finds a good copy each time."""
THREADS: Final = 4
"""Most windows checked at a time; each thread has a buffer of 4 MiB."""
WINDOWS: Final = (1, 2, 4, 8)
"""Chunks in the first window, the second and so on: a short way to the first byte, then few changes of threads."""
COPIED_WINDOWS: Final = (1,)
"""The same where there is no file to send from, or where chunks are encoded: a client's windows, two at a time, are in
memory."""

Stamp = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Wanted:
    """The file that is being asked for, for errors and log lines."""

    repo: str
    commit: str
    path: str


class Passed:
    """Which bytes of which unchanged file had which hash, and when. Threads may share one."""

    def __init__(
        self,
        fresh_s: float = FRESH_S,
        limit: int = REMEMBERED,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fresh_s, self._limit, self._clock = fresh_s, limit, clock
        self._lock = threading.Lock()
        self._files: OrderedDict[tuple[str, Stamp], dict[int, tuple[bytes, float]]] = OrderedDict()
        self._count = 0

    def fresh(self, key: str, stamp: Stamp, offset: int, digest: bytes) -> bool:
        """Whether the chunk at this offset of the object passed a short while ago, in this very state of the file."""
        with self._lock:
            chunks = self._files.get((key, stamp))
            found = None if chunks is None else chunks.get(offset)
        return found is not None and found[0] == digest and self._clock() - found[1] < self._fresh_s

    def add(self, key: str, stamp: Stamp, offset: int, digest: bytes) -> None:
        """Remember that the chunk has just passed; the file used longest ago is forgotten first."""
        with self._lock:
            chunks = self._files.setdefault((key, stamp), {})
            self._files.move_to_end((key, stamp))
            self._count += offset not in chunks
            chunks[offset] = digest, self._clock()
            while self._count > self._limit and len(self._files) > 1:
                self._count -= len(self._files.popitem(last=False)[1])
            if self._count > self._limit:
                del chunks[next(iter(chunks))]
                self._count -= 1


@dataclass(slots=True)
class _Window:
    """Chunks that passed: where their bytes are, and the open files, closed once they are sent."""

    parts: list[FilePart]
    files: ExitStack


class VerifiedReader:
    """Serves ranges of blobs as parts of files in which every chunk has passed. Close it at the end."""

    def __init__(
        self,
        store: ObjectStore,
        failed: Callable[[], None],
        passed: Passed | None = None,
        told: Callable[[PlacedBlob, int], str] = lambda blob, index: "restore the object from a copy of the store",
    ) -> None:
        """``failed`` is called, from any thread, for every chunk that can't be read or doesn't match its hash; ``told``
        then says what happens and what to do. Neither waits."""
        self._store, self._failed, self._passed, self._told = store, failed, passed or Passed(), told
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="verify")
        self._local = threading.local()

    def close(self) -> None:
        """Wait for the windows that are being checked."""
        self._threads.shutdown()

    async def parts(self, blob: PlacedBlob, start: int, stop: int, wanted: Wanted) -> AsyncGenerator[FilePart, None]:
        """The bytes ``start`` to ``stop`` of the blob; raises IntegrityError ahead of a part with a damaged chunk.

        A part's file stays open until the next part is asked for.
        """
        near = all(self._store.near(at.key) for at in blob.placement.objects)
        sizes = WINDOWS if near and blob.plain else COPIED_WINDOWS
        windows = _windows(blob.recipe.covering(start, stop - start), sizes)
        ahead = self._submit(blob, next(windows, None), start, stop, wanted)
        try:
            while ahead is not None:
                window = await asyncio.wrap_future(ahead)
                with window.files:
                    ahead = self._submit(blob, next(windows, None), start, stop, wanted)
                    for part in window.parts:
                        yield part
        finally:
            if ahead is not None:
                ahead.add_done_callback(_drop)

    def _submit(
        self, blob: PlacedBlob, chunks: range | None, start: int, stop: int, wanted: Wanted
    ) -> Future[_Window] | None:
        if chunks is None:
            return None
        return self._threads.submit(self._check, blob, chunks, start, stop, wanted)

    def _check(self, blob: PlacedBlob, chunks: range, start: int, stop: int, wanted: Wanted) -> _Window:
        """Check chunks and say where the bytes of theirs lie that are between ``start`` and ``stop``."""
        with ExitStack() as files:
            parts: list[FilePart] = []
            for segment in blob.segments(chunks):
                first, end = blob.recipe.span(segment.first)[0], blob.recipe.span(segment.first + segment.count - 1)[1]
                low, high = max(start - first, 0), min(stop, end) - first
                file, offset = self._segment(blob, segment, files, wanted)
                parts.append(FilePart(file, offset + low, high - low))
            return _Window(parts, files.pop_all())

    def _segment(self, blob: PlacedBlob, segment: Segment, files: ExitStack, wanted: Wanted) -> tuple[BinaryIO, int]:
        """Check the chunks of a segment; returns a file with their bytes one after another, and where they begin."""
        first, key = segment.first, segment.object.key
        for _ in range(HEALED + segment.count):
            try:
                return self._checked(blob, segment, files)
            except _WrongChunk as problem:
                first, error = problem.index, problem.why
            except (NotFound, OSError) as problem:
                raise self._damaged(blob, first, key, wanted, problem) from problem
            at = blob.locate(first)
            if not self._store.heal(key, at.offset, at.encoded_length, good(at, blob.recipe.id(first))):
                break
        raise self._damaged(blob, first, key, wanted, error) from error

    def _checked(self, blob: PlacedBlob, segment: Segment, files: ExitStack) -> tuple[BinaryIO, int]:
        key, chunks = segment.object.key, range(segment.first, segment.first + segment.count)
        local = self._store.open_local(key) if segment.plain else None
        if local is not None:
            file = files.enter_context(local)
            stamp = _stamp(file)
            for index in chunks:
                at = blob.locate(index)
                digest = blob.recipe.id(index)
                if not self._passed.fresh(key, stamp, at.offset, digest):
                    with _wrong(index):
                        _compare(_read(file, at.offset, self._buffer(at.length)), digest)
                    self._passed.add(key, stamp, at.offset, digest)
            return file, segment.offset
        # No local file to send from: the checked bytes themselves go into one, in memory.
        copy = files.enter_context(os.fdopen(os.memfd_create("window"), "w+b", buffering=0))
        for index in chunks:
            at = blob.locate(index)
            with _wrong(index):
                data = read(self._store, at, self._buffer(at.encoded_length))
                _compare(data, blob.recipe.id(index))
            copy.write(data)
        return copy, 0

    def _damaged(
        self, blob: PlacedBlob, index: int, key: str, wanted: Wanted, error: HeliosError | OSError
    ) -> IntegrityError:
        self._failed()
        low, high = blob.recipe.span(index)
        reason = error.message if isinstance(error, HeliosError) else str(error)
        log.error(
            "a chunk in the store is damaged and was not sent",
            extra={
                "model": wanted.repo,
                "commit": wanted.commit,
                "file": wanted.path,
                "chunk": index,
                "blob": blob.recipe.blob,
                "object": key,
                "reason": reason,
            },
        )
        # Clients of the Hub see the message alone.
        return IntegrityError(
            f"{wanted.path} of {wanted.repo}: chunk {index} (bytes {low} to {high}) is damaged in the registry's "
            f"store; {self._told(blob, index)}",
            hint=f"The damaged object is {key}.",
        )

    def _buffer(self, length: int) -> memoryview:
        """This thread's buffer."""
        if not hasattr(self._local, "buffer"):
            self._local.buffer = memoryview(bytearray(MAX_CHUNK))
        view: memoryview = self._local.buffer
        return view[:length]


def _windows(chunks: range, sizes: Sequence[int]) -> Iterator[range]:
    """The chunks in groups that grow to the last of the sizes."""
    first, turn = chunks.start, 0
    while first < chunks.stop:
        stop = min(chunks.stop, first + sizes[min(turn, len(sizes) - 1)])
        yield range(first, stop)
        first, turn = stop, turn + 1


def _stamp(file: BinaryIO) -> Stamp:
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _read(file: BinaryIO, offset: int, buffer: memoryview) -> memoryview:
    done = 0
    while done < len(buffer):
        count = os.preadv(file.fileno(), [buffer[done:]], offset + done)
        if not count:
            raise IntegrityError(f"the object ends at byte {offset + done}")
        done += count
    return buffer


def _compare(data: memoryview, digest: bytes) -> None:
    if blake3(data).digest() != digest:
        raise IntegrityError("its content has another hash")


class _WrongChunk(Exception):
    """A chunk that is not what it should be, and why."""

    def __init__(self, index: int, why: IntegrityError) -> None:
        super().__init__(index)
        self.index, self.why = index, why


@contextmanager
def _wrong(index: int) -> Iterator[None]:
    try:
        yield
    except IntegrityError as error:
        raise _WrongChunk(index, error) from error


def _drop(future: Future[_Window]) -> None:
    """Close the files of a window that nobody is going to send."""
    if not future.cancelled() and future.exception() is None:
        future.result().files.close()
