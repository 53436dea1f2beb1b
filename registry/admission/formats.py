"""What a file is, as far as it matters to who loads it, told by its name: loaders go by that."""

from __future__ import annotations

from typing import Final

PICKLE: Final = "pickle"

FORMATS: Final[dict[str, frozenset[str]]] = {
    "safetensors": frozenset({"safetensors"}),
    "gguf": frozenset({"gguf"}),
    "json": frozenset({"json", "jsonl", "ipynb"}),
    "text": frozenset({
        "", "txt", "md", "yaml", "yml", "toml", "jinja", "cfg", "ini", "csv", "tsv", "xml", "html", "rst", "svg",
        "gitattributes", "gitignore", "sig",
    }),
    "code": frozenset({"py", "sh", "js", "ts", "c", "cc", "cpp", "h", "cu", "rs", "go"}),
    "media": frozenset({"png", "jpg", "jpeg", "gif", "webp", "mp3", "mp4", "wav", "flac", "ogg", "pdf"}),
    "tokenizer": frozenset({"model", "tiktoken", "spm", "bpe", "vocab", "merges"}),
    "data": frozenset({"parquet", "arrow", "zst"}),
    "onnx": frozenset({"onnx", "onnx_data", "tflite"}),
    PICKLE: frozenset({"bin", "pt", "pth", "ckpt", "pkl", "pickle", "joblib", "dill"}),
}  # fmt: skip
"""Format -> extensions of its files. What stands in none is ``other``: archives, HDF5, whatever comes next."""

OTHER: Final = "other"

_BY_EXTENSION: Final = {extension: name for name, found in FORMATS.items() for extension in found}


def named(path: str) -> str:
    """The format that a file's name says: one of ``FORMATS``, or ``other``."""
    extension = path.rpartition("/")[2].lower()
    return _BY_EXTENSION.get(extension.rpartition(".")[2] if "." in extension else "", OTHER)
