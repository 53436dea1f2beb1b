"""Where a file is cut into chunks.

A safetensors or GGUF file: its header is cut on its own, every large tensor starts a chunk and is cut on a 4 MiB grid
from its start, and runs of small tensors (below 1 MiB each) share chunks of up to 4 MiB, cut between tensors. So a
fine-tune that changes some tensors shares the chunks of all others, whatever moved. Any other file is
cut on a plain 4 MiB grid. The first and the last chunk of a large file are then cut finer towards its edges: a reader
gets no byte before its whole chunk is here, and readers begin at the start or at the end. A header of up to 4 MiB stays
one chunk: whoever reads its first byte reads all of it. No chunk is empty or longer than 4 MiB; chunks of one file
touch without gaps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Final

from heliosfs.store.recipe import MAX_CHUNK, Recipe

SMALL_TENSOR: Final = 1 << 20
"""Tensors below this many bytes share chunks: a norm's weights of 8 KB do not earn an entry in the index."""

LARGE: Final = 32 << 20
"""Files of at least so many bytes are cut finer at their edges. A smaller one would gain a dozen chunks for the sake of
a fraction of them, and lose too much of what it shares with one that is a little longer: its last chunk."""

EDGE: Final = 64 << 10
"""Bytes of the chunk at an edge, the kernel's first READ of a file and what most formats look for there. At a distance
TCP brings it in three round trips on a new connection, and 4 MiB in eight."""


def grid(start: int, end: int) -> Iterator[int]:
    """Lengths of the chunks of a plain span."""
    for offset in range(start, end, MAX_CHUNK):
        yield min(MAX_CHUNK, end - offset)


def growing(length: int) -> Iterator[int]:
    """Lengths of the pieces of a chunk at an edge, away from it: each is as long as all before it, from ``EDGE`` on.

    What is left stands alone where another piece would leave less than itself.
    """
    done = 0
    while length - done >= 2 * (piece := max(EDGE, done)):
        yield piece
        done += piece
    yield length - done


def cut_plain(size: int) -> list[int]:
    """Chunk lengths of a file in which no tensors are known."""
    return _finer_at_the_edges(list(grid(0, size)), size)


def cut_tensors(header_end: int, tensors: Iterable[tuple[int, int]]) -> list[int]:
    """Chunk lengths of a file of tensors.

    ``header_end`` is the offset where their data starts; ``tensors`` are their (start, end) offsets, in file order;
    they touch.
    """
    lengths = list(grid(0, header_end))
    run, size = 0, header_end
    for start, end in tensors:
        length, size = end - start, end
        if run and (length >= SMALL_TENSOR or run + length > MAX_CHUNK):
            lengths.append(run)
            run = 0
        if length >= SMALL_TENSOR:
            lengths.extend(grid(start, end))
        else:
            run += length
    if run:
        lengths.append(run)
    return _finer_at_the_edges(lengths, size)


def _finer_at_the_edges(lengths: list[int], size: int) -> list[int]:
    if size < LARGE:
        return lengths
    first, *middle, last = lengths
    head = growing(first) if first == MAX_CHUNK else [first]
    return [*head, *middle, *reversed(list(growing(last)))]


def chunks_read_first(recipe: Recipe) -> int:
    """How many chunks every reader of the file begins with: its first one, in one piece or several; 0: it is empty."""
    count = len(_HEAD_ENDS)
    return count if tuple(recipe.ends[:count]) == _HEAD_ENDS else min(1, len(recipe))


_HEAD_ENDS: Final = tuple(accumulate(growing(MAX_CHUNK)))
