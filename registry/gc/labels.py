"""What the chunks of a blob are, for reports: the type of the tensor in which each begins."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable

from helios.errors import InvalidInput
from heliosfs.store.safetensors import header_length, parse_header
from registry.blobs import BlobReader

OTHER = "other"
"""Everything that is not a tensor of a safetensors file or in a GGUF file."""


def labels_of(blob: BlobReader) -> Callable[[int], str]:
    """Says what is at an offset of the blob: ``BF16`` and the like, ``GGUF``, or ``other``. Raises IntegrityError."""
    start = blob.read(0, min(blob.size, 9))
    if start[:4] == b"GGUF":
        return lambda _offset: "GGUF"
    if start[8:9] != b"{":
        return lambda _offset: OTHER
    try:
        length = header_length(start[:8], blob.size, "blob")
        tensors = parse_header(blob.read(8, length), blob.size, "blob")
    except InvalidInput:
        return lambda _offset: OTHER
    starts = [tensor.start for tensor in tensors]

    def label(offset: int) -> str:
        index = bisect_right(starts, offset) - 1
        return OTHER if index < 0 else tensors[index].dtype

    return label
