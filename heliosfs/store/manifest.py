"""Manifests and commit records: what a snapshot of a repository holds, and who made it.

Both are text records: a line with the format's name and version, then canonical JSON (sorted keys, no white space,
UTF-8) and no final newline. docs/format.md is normative.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, Final, TypeVar

import msgspec

from helios.decoding import from_json
from helios.errors import IntegrityError, InvalidInput
from helios.names import RepoId, check_path, is_commit

MANIFEST_MAGIC: Final = b"helios-manifest 1\n"
COMMIT_MAGIC: Final = b"helios-commit 1\n"

PART: Final = 1000
"""Files of a manifest that are encoded at a time."""

T = TypeVar("T")


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file of a snapshot.

    ``sha256`` names the blob; ``git_oid`` is the id the Hub shows: the git blob's sha1 for a regular file, the sha1 of
    the pointer file for an LFS one; ``recipe`` the recipe's digest; ``size`` in bytes.
    """

    sha256: str
    size: int
    git_oid: str
    recipe: str
    lfs: bool = False
    executable: bool = False


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A snapshot's files by path."""

    files: dict[str, FileEntry]

    def encode(self) -> bytes:
        """The record's bytes."""
        return b"".join(self._parts())

    @property
    def digest(self) -> str:
        """sha256 of the record, 64 hexadecimal digits: the content's identity."""
        return hashlib.sha256(self.encode()).hexdigest()

    @classmethod
    def decode(cls, data: bytes, digest: str | None = None) -> Manifest:
        """Read a record, checking names, bounds and, with ``digest``, its sha256. Raises IntegrityError."""
        if digest is not None and hashlib.sha256(data).hexdigest() != digest:
            raise IntegrityError(f"a manifest does not match its digest {digest}")
        manifest = decode_record(data, MANIFEST_MAGIC, cls)
        end = 0
        for part in manifest._parts():
            check_canonical(data[end : end + len(part)], part, "manifest")
            end += len(part)
        check_canonical(data[end:], b"", "manifest")
        try:
            check_tree(manifest.files)
        except InvalidInput as error:
            raise IntegrityError(f"a manifest holds a bad path: {error}") from error
        for path, entry in manifest.files.items():
            if not (
                is_hex(entry.sha256, 64)
                and is_hex(entry.recipe, 64)
                and is_hex(entry.git_oid, 40)
                and 0 <= entry.size < 1 << 63
            ):
                raise IntegrityError(f"a manifest has a malformed entry for {path!r}")
        return manifest

    def _parts(self) -> Iterator[bytes]:
        """The record piece by piece: as a whole it would take several times its size while it is made or compared."""
        yield MANIFEST_MAGIC + b'{"files":{'
        paths = sorted(self.files)
        for start in range(0, len(paths), PART):
            part = {path: msgspec.to_builtins(self.files[path]) for path in paths[start : start + PART]}
            yield (b"," if start else b"") + canonical(part)[1:-1]
        yield b"}}"


class CommitRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who published which manifest, when.

    ``time`` is in whole seconds since 1970 UTC; ``lineage`` names where the content comes from (``upstream``,
    ``base_model``...) and is empty when nothing is known.
    """

    repo: str
    commit: str
    manifest: str
    author: str
    time: int
    message: str = ""
    parent: str | None = None
    lineage: dict[str, str] = {}

    def encode(self) -> bytes:
        return COMMIT_MAGIC + canonical(msgspec.to_builtins(self))

    @classmethod
    def decode(cls, data: bytes) -> CommitRecord:
        """Read a record, checking names and bounds. Raises IntegrityError."""
        record = decode_record(data, COMMIT_MAGIC, cls)
        check_canonical(data, record.encode(), "commit record")
        try:
            RepoId.from_canonical(record.repo)
        except InvalidInput as error:
            raise IntegrityError(f"a commit record names a bad repository: {error}") from error
        if not (
            is_commit(record.commit)
            and is_hex(record.manifest, 64)
            and (record.parent is None or is_commit(record.parent))
            and 0 <= record.time < 1 << 63
        ):
            raise IntegrityError(f"a commit record of {record.repo} has a malformed commit, parent, manifest or time")
        return record


def local_commit(repo: RepoId, manifest_digest: str) -> str:
    """Commit id of a locally published snapshot: the first 40 hex digits of sha256(repository + manifest digest).

    Publishing the same files under the same name twice therefore gives the same commit.
    """
    return hashlib.sha256(f"{repo}\n{manifest_digest}".encode()).hexdigest()[:40]


def git_blob_oid(data: bytes) -> str:
    """git's object id of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def lfs_pointer(sha256: str, size: int) -> bytes:
    """The git-lfs pointer file that stands for a large file (git-lfs specification, version 1)."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def check_tree(paths: Mapping[str, object]) -> None:
    """Raise InvalidInput for unsafe paths and for a path that is both a file and a directory."""
    for path in paths:
        check_path(path)
        parent = path.rpartition("/")[0]
        while parent:
            if parent in paths:
                raise InvalidInput(f"the path {parent!r} is both a file and a directory")
            parent = parent.rpartition("/")[0]


def canonical(value: Any) -> bytes:
    """Canonical JSON: sorted keys, no white space, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def decode_record(data: bytes, magic: bytes, kind: type[T]) -> T:
    """Read a text record: the line ``magic``, then JSON. Raises IntegrityError. See ``check_canonical``."""
    head, newline, body = data.partition(b"\n")
    name = magic.split(b" ")[0]
    if head + newline != magic:
        if newline and head.startswith(name + b" "):
            version = head[len(name) : len(name) + 20].decode(errors="replace")
            raise IntegrityError(f"{name.decode()}{version} is newer than this Helios; upgrade it")
        raise IntegrityError(f"not a {name.decode()} record: it starts with {data[:16]!r}")
    try:
        return from_json(body, kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise IntegrityError(f"a {name.decode()} record does not decode: {error}") from error


def check_canonical(data: bytes, again: bytes, what: str) -> None:
    """One content has one encoding: otherwise equal snapshots would have different digests."""
    if data != again:
        raise IntegrityError(f"a {what} is not canonical JSON: unsorted or repeated keys, or white space")


def is_hex(text: str, length: int) -> bool:
    """Whether the text is this many lower-case hexadecimal digits."""
    return len(text) == length and not text.strip("0123456789abcdef")
