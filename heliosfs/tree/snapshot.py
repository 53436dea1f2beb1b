"""One commit's files, indexed by directory and by etag."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

from helios.names import RepoId
from heliosfs.store.manifest import FileEntry

WEIGHTS: Final = (".safetensors", ".gguf", ".bin", ".pt", ".pth")
"""Endings of the files that hold a model's weights."""


@dataclass(frozen=True)
class Snapshot:
    """The files of a commit. ``time`` is the commit's, in seconds since 1970; ``files`` by path."""

    repo: RepoId
    commit: str
    time: int
    files: Mapping[str, FileEntry]

    directories: Mapping[str, Mapping[str, FileEntry | None]] = field(init=False)
    """For each directory (``""`` is the top) its names; None stands for a directory."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "directories", _directories(self.files))

    @cached_property
    def by_etag(self) -> Mapping[str, str]:
        """The path of a file for each etag."""
        return {etag(entry): path for path, entry in self.files.items()}

    def tree_json(self) -> bytes:
        """``trees/<commit>.json`` of the Hugging Face cache: the listing that huggingface_hub >= 1.33 keeps.

        Format version 1, as huggingface_hub writes it (``_tree_cache.py``); without ``xet_hash``, which is optional.
        """
        files = {}
        for path, entry in sorted(self.files.items()):
            files[path] = {"size": entry.size, "blob_id": entry.git_oid}
            if entry.lfs:
                files[path] |= {"lfs_sha256": entry.sha256, "lfs_size": entry.size}
        return json.dumps({"format_version": 1, "files": files}, indent=1).encode()


def _directories(files: Mapping[str, FileEntry]) -> dict[str, dict[str, FileEntry | None]]:
    out: dict[str, dict[str, FileEntry | None]] = {"": {}}
    for path in sorted(files, key=lambda path: path.replace("/", "\0")):  # so that each directory is in order
        parent, _, name = path.rpartition("/")
        missing = []
        directory = parent
        while directory not in out:
            missing.append(directory)
            directory = directory.rpartition("/")[0]
        for directory in reversed(missing):
            above, _, last = directory.rpartition("/")
            out[above][last] = None
            out[directory] = {}
        out[parent][name] = files[path]
    return out


def etag(entry: FileEntry) -> str:
    """The name of a file's content in the Hugging Face cache: sha256 for an LFS file, else git's blob id."""
    return entry.sha256 if entry.lfs else entry.git_oid
