"""How a file is cut into chunks: what kind of file it is, and the recipe of one that lies on a disk.

Whoever publishes a file and the registry that takes it in cut it with the same code, so both name the same chunks.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Final

from blake3 import blake3

from helios.errors import InvalidInput
from heliosfs.store import gguf
from heliosfs.store.batch import Chunk
from heliosfs.store.chunking import cut_plain, cut_tensors
from heliosfs.store.recipe import MAX_CHUNK, Recipe
from heliosfs.store.safetensors import MAX_HEADER, header_length, parse_header

FIRST_LOOK: Final = 1 << 20
"""Bytes of a GGUF file in which its whole head is looked for first."""

BUFFERS: Final = 4
"""Buffers of a chunk's size between reading a file and hashing all of it: the memory that one ``recipe_of`` takes."""

GOLDEN: Final = 0.6180339887498949

Peek = Callable[[int], bytes]
"""Gives the first bytes of a file, as many as asked for: never more than it has."""


def extension(path: str) -> str:
    """The lower-case extension of a path's last part, without the dot; empty when there is none."""
    name = path.rpartition("/")[2]
    return name.rpartition(".")[2].lower() if "." in name else ""


def cut(path: str, size: int, peek: Peek) -> list[int]:
    """Lengths of a file's chunks. Reads the header of a safetensors or GGUF file ahead.

    A file that is named ``*.safetensors`` and is none is refused with InvalidInput. A file of another name that is one,
    down to the last offset, is cut like one, and so is a GGUF file: the chunks of a blob depend on its bytes alone.
    """
    named = extension(path) == "safetensors"
    start = peek(min(9, size))
    if not named and start.startswith(gguf.MAGIC):
        return _cut_gguf(size, peek)
    if not named and not (start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= min(MAX_HEADER, size - 8)):
        return cut_plain(size)
    try:
        length = header_length(start[:8], size, path)
        tensors = parse_header(peek(8 + length)[8:], size, path)
        return cut_tensors(8 + length, [(tensor.start, tensor.end) for tensor in tensors])
    except InvalidInput:
        if named:
            raise
        return cut_plain(size)


def _cut_gguf(size: int, peek: Peek) -> list[int]:
    """As ``cut``; the head's length is not known before it was read, so twice as much is looked at each time."""
    ahead = FIRST_LOOK
    while True:
        try:
            return cut_tensors(*gguf.spans(peek(min(ahead, size)), size))
        except InvalidInput:
            return cut_plain(size)
        except gguf.Short:
            if ahead >= min(size, gguf.MAX_HEAD):
                return cut_plain(size)
            ahead *= 2


def groups(lengths: list[int], most: int = MAX_CHUNK) -> Iterator[list[int]]:
    """Runs of consecutive chunks of at most ``most`` bytes together."""
    group: list[int] = []
    total = 0
    for length in lengths:
        if total + length > most:
            yield group
            group, total = [], 0
        group.append(length)
        total += length
    if group:
        yield group


def recipe_of(local: Path, path: str, size: int, done: Callable[[int], None] = lambda _: None) -> Recipe:
    """The recipe of a local file of ``size`` bytes that will be published as ``path``. It is read once, from start to
    end; its sha256 is computed in a thread beside. ``done`` is told how many more bytes were read.

    Raises InvalidInput for a file that can't be read, has another size or is a damaged ``*.safetensors``.
    """
    with _opened(local, path) as fd:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        lengths = _cut_open(fd, path, size)
        sha256, ids = hashlib.sha256(), []
        spare = [memoryview(bytearray(min(size, MAX_CHUNK))) for _ in range(min(BUFFERS, 1 + size // MAX_CHUNK))]
        busy: deque[tuple[Future[None], memoryview]] = deque()
        offset = 0
        with ThreadPoolExecutor(1, thread_name_prefix="sha256") as beside:
            for group in groups(lengths):
                if not spare:
                    work, buffer = busy.popleft()
                    work.result()
                    spare.append(buffer)
                buffer = spare.pop()
                data = _read(fd, path, buffer[: sum(group)], offset)
                busy.append((beside.submit(sha256.update, data), buffer))
                offset += len(data)
                start = 0
                for length in group:
                    ids.append((blake3(data[start : start + length]).digest(), length))
                    start += length
                done(len(data))
        if os.pread(fd, 1, size):
            raise InvalidInput(f"{path}: more than the {size} bytes it had; did it grow meanwhile?")
        return Recipe.build(sha256.hexdigest(), ids)


def sample_of(local: Path, path: str, size: int, count: int, least: int) -> list[Chunk]:
    """``count`` of the chunks of a local file, from all over it; none where there are fewer than ``least``.

    They are the same ones of every file that is cut alike, and lie at multiples of the golden ratio, modulo 1: weights
    repeat layer by layer, and so would a regular choice. Raises as ``recipe_of`` does.
    """
    with _opened(local, path) as fd:
        lengths = _cut_open(fd, path, size)
        if len(lengths) < least:
            return []
        ends = list(accumulate(lengths))
        chunks = []
        for number in sorted({int(len(lengths) * (turn * GOLDEN % 1)) for turn in range(count)}):
            data = memoryview(bytearray(lengths[number]))
            chunks.append((blake3(_read(fd, path, data, ends[number] - len(data))).digest(), len(data)))
        return chunks


@contextlib.contextmanager
def _opened(local: Path, path: str) -> Iterator[int]:
    """The file as a descriptor; raises InvalidInput where it can't be read."""
    try:
        fd = os.open(local, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)
    except OSError as error:
        raise InvalidInput(f"{path}: can't be read: {error.strerror}") from None


def _cut_open(fd: int, path: str, size: int) -> list[int]:
    return cut(path, size, lambda count: bytes(_read(fd, path, memoryview(bytearray(count)), 0)))


def _read(fd: int, path: str, buffer: memoryview, offset: int) -> memoryview:
    """Fill the buffer from an offset of a file."""
    done = 0
    while done < len(buffer):
        count = os.preadv(fd, [buffer[done:]], offset + done)
        if not count:
            raise InvalidInput(f"{path}: ended after {offset + done} bytes; it is cut short or has changed")
        done += count
    return buffer
