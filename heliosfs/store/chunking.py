"""Where a file is cut into chunks.

A safetensors file: its header (length field included) is cut on its own, every large tensor starts a chunk and is cut
on a 4 MiB grid from its start, and runs of small tensors (below 1 MiB each) share chunks of up to 4 MiB, cut between
tensors. So a fine-tune that changes some tensors shares the chunks of all others, whatever moved. Any other file is
cut on a plain 4 MiB grid. No chunk is empty or longer than 4 MiB; chunks of one file touch without gaps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from heliosfs.store.recipe import MAX_CHUNK
from heliosfs.store.safetensors import Tensor

SMALL_TENSOR: Final = 1 << 20
"""Tensors below this many bytes share chunks: a norm's weights of 8 KB do not earn an entry in the index."""


def grid(start: int, end: int) -> Iterator[int]:
    """Lengths of the chunks of a plain span."""
    for offset in range(start, end, MAX_CHUNK):
        yield min(MAX_CHUNK, end - offset)


def cut_plain(size: int) -> list[int]:
    """Chunk lengths of a file that is not a safetensors file."""
    return list(grid(0, size))


def cut_safetensors(header_end: int, tensors: Iterable[Tensor]) -> list[int]:
    """Chunk lengths of a safetensors file.

    ``header_end`` is the offset where the tensors' data starts; ``tensors`` are in file order and touch.
    """
    lengths = list(grid(0, header_end))
    run = 0
    for tensor in tensors:
        length = tensor.end - tensor.start
        if run and (length >= SMALL_TENSOR or run + length > MAX_CHUNK):
            lengths.append(run)
            run = 0
        if length >= SMALL_TENSOR:
            lengths.extend(grid(tensor.start, tensor.end))
        else:
            run += length
    if run:
        lengths.append(run)
    return lengths
