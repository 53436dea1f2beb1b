"""What a simulated Hub holds: repositories, commits, files with the Hub's ids. It shares no code with Helios."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LFS_FROM = 100_000
"""Files of at least this many bytes, and weights of any size, are LFS files unless a test says otherwise."""

WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")


@dataclass(frozen=True)
class HubFile:
    """One file of a snapshot: its bytes, or the path they are read from."""

    data: bytes | Path
    size: int
    sha256: str
    oid: str
    lfs: bool

    @property
    def pointer_size(self) -> int:
        """Bytes of the pointer file that stands for an LFS file."""
        return len(pointer(self.sha256, self.size))

    @classmethod
    def of(cls, data: bytes | Path, path: str, lfs: bool | None = None) -> HubFile:
        content = data.read_bytes() if isinstance(data, Path) else data
        sha256 = hashlib.sha256(content).hexdigest()
        is_lfs = (len(content) >= LFS_FROM or path.endswith(WEIGHTS)) if lfs is None else lfs
        in_git = pointer(sha256, len(content)) if is_lfs else content
        oid = hashlib.sha1(b"blob %d\0" % len(in_git) + in_git).hexdigest()
        return cls(data, len(content), sha256, oid, is_lfs)

    def read(self, offset: int, count: int) -> bytes:
        if isinstance(self.data, bytes):
            return self.data[offset : offset + count]
        with self.data.open("rb") as file:
            file.seek(offset)
            return file.read(count)

    def as_sibling(self, path: str, blobs: bool) -> dict[str, Any]:
        item: dict[str, Any] = {"rfilename": path}
        if blobs:
            item |= {"blobId": self.oid, "size": self.size}
            if self.lfs:
                item["lfs"] = {"sha256": self.sha256, "size": self.size, "pointerSize": self.pointer_size}
        return item

    def as_tree_item(self, path: str, xet_hash: str | None = None) -> dict[str, Any]:
        item: dict[str, Any] = {"type": "file", "oid": self.oid, "size": self.size, "path": path}
        if self.lfs:
            item["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": self.pointer_size}
            if xet_hash is not None:
                item["xetHash"] = xet_hash
        return item


def pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


@dataclass(frozen=True)
class Said:
    """What a commit says of itself, and which one it followed."""

    title: str
    message: str
    parent: str | None


@dataclass
class Repo:
    """A repository: commits by id, refs by name."""

    commits: dict[str, dict[str, HubFile]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    tags: set[str] = field(default_factory=set)
    """Which of the refs are tags; ``refs/pr/1`` and ``refs/convert/parquet`` go by their full names."""
    said: dict[str, Said] = field(default_factory=dict)
    gated: str | None = None
    """The token that opens the repository; None: public."""
    listed: bool = False
    """A gated repository whose listing anybody may see, as on the Hub; its files only with the token."""
    private: str | None = None
    """The token without which the repository does not exist."""
    masked_xet: bool = False
    """Listings show Xet hashes, those of a gated repository as 64 asterisks."""
    card: dict[str, Any] = field(default_factory=dict)

    def resolve(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.refs.get(revision)

    def ref_list(self, requests: bool) -> dict[str, list[dict[str, str]]]:
        """The answer of ``/refs``."""
        out: dict[str, list[dict[str, str]]] = {"branches": [], "converts": [], "tags": []}
        if requests:
            out["pullRequests"] = []
        for name, commit in self.refs.items():
            if name.startswith("refs/pr/"):
                if requests:
                    out["pullRequests"].append({"name": name[8:], "ref": name, "targetCommit": commit})
            elif name.startswith("refs/convert/"):
                out["converts"].append({"name": name[13:], "ref": name, "targetCommit": commit})
            elif name in self.tags:
                out["tags"].append({"name": name, "ref": f"refs/tags/{name}", "targetCommit": commit})
            else:
                out["branches"].append({"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit})
        return out

    def history(self, commit: str) -> list[dict[str, Any]]:
        """The answer of ``/commits``, all pages."""
        out: list[dict[str, Any]] = []
        at: str | None = commit
        while at is not None and at in self.said:
            said = self.said[at]
            author = {"user": "somebody", "avatar": "https://huggingface.co/avatars/x.svg"}
            out.append({"id": at, "title": said.title, "message": said.message, "authors": [author],
                        "date": "2026-03-01T12:00:00.000Z"})  # fmt: skip
            at = said.parent
        return out
