"""What kind of file it is: how git would store it. Where it is cut: heliosfs/store/cutting.py."""

from __future__ import annotations

import codecs
from typing import Final

from heliosfs.store.cutting import extension

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
