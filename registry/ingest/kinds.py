"""What kind of file it is: how git would store it, and where its chunks end."""

from __future__ import annotations

import codecs
from typing import Final

from helios.errors import InvalidInput
from heliosfs.store import gguf
from heliosfs.store.chunking import cut_plain, cut_tensors
from heliosfs.store.safetensors import MAX_HEADER, header_length, parse_header
from registry.ingest.reader import Reader

LFS_EXTENSIONS: Final = frozenset({
    "7z", "arrow", "avro", "bin", "bz2", "ckpt", "data", "flac", "ftz", "gguf", "ggml", "gz", "h5", "jpeg", "jpg",
    "joblib", "lz4", "mlmodel", "mlpackage", "model", "mp3", "mp4", "msgpack", "npy", "npz", "ogg", "onnx", "ot",
    "parquet", "pb", "pdf", "pickle", "pkl", "png", "pt", "pth", "rar", "safetensors", "tar", "tflite", "tgz",
    "tiktoken", "wasm", "wav", "webp", "xz", "zip", "zst",
})  # fmt: skip
"""Extensions that are large binary files whatever they hold, much as in the Hub's default .gitattributes."""

LFS_SIZE: Final = 10 << 20
"""From this many bytes on every file is an LFS file: the Hub takes no larger regular file."""

SNIFF: Final = 8 << 10
"""Bytes at the start of a file that decide whether it is text."""

FIRST_LOOK: Final = 1 << 20
"""Bytes of a GGUF file in which its whole head is looked for first."""


def extension(path: str) -> str:
    """The lower-case extension of a path's last part, without the dot; empty when there is none."""
    name = path.rpartition("/")[2]
    return name.rpartition(".")[2].lower() if "." in name else ""


def is_lfs(path: str, size: int, start: bytes) -> bool:
    """Whether the Hub would keep the file in LFS; ``start`` is its first 8 KiB, or all of it."""
    return extension(path) in LFS_EXTENSIONS or size >= LFS_SIZE or not _is_text(start[:SNIFF], whole=size <= SNIFF)


def _is_text(start: bytes, *, whole: bool) -> bool:
    if b"\0" in start:
        return False
    try:
        codecs.getincrementaldecoder("utf-8")().decode(start, final=whole)  # else a character may be cut at the end
    except UnicodeDecodeError:
        return False
    return True


def cut(path: str, size: int, reader: Reader) -> list[int]:
    """Lengths of a file's chunks. Reads the header of a safetensors or GGUF file ahead.

    A file that is named ``*.safetensors`` and is none is refused with InvalidInput. A file of another name that is one,
    down to the last offset, is cut like one, and so is a GGUF file: the chunks of a blob depend on its bytes alone.
    """
    named = extension(path) == "safetensors"
    start = reader.peek(min(9, size))
    if not named and start.startswith(gguf.MAGIC):
        return _cut_gguf(size, reader)
    if not named and not (start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= min(MAX_HEADER, size - 8)):
        return cut_plain(size)
    try:
        length = header_length(start[:8], size, path)
        tensors = parse_header(reader.peek(8 + length)[8:], size, path)
        return cut_tensors(8 + length, [(tensor.start, tensor.end) for tensor in tensors])
    except InvalidInput:
        if named:
            raise
        return cut_plain(size)


def _cut_gguf(size: int, reader: Reader) -> list[int]:
    """As ``cut``; the head's length is not known before it was read, so twice as much is looked at each time."""
    ahead = FIRST_LOOK
    while True:
        try:
            return cut_tensors(*gguf.spans(reader.peek(min(ahead, size)), size))
        except InvalidInput:
            return cut_plain(size)
        except gguf.Short:
            if ahead >= min(size, gguf.MAX_HEAD):
                return cut_plain(size)
            ahead *= 2
