"""What an upstream says a snapshot holds, checked, and which of it is taken."""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from helios.decoding import from_msgpack
from helios.errors import IntegrityError, InvalidInput
from helios.names import RepoId, is_commit
from heliosfs.store.bulk import check_bulk
from heliosfs.store.manifest import check_tree
from heliosfs.store.recipe import MAX_BLOB

PICKLES: Final = frozenset({"bin", "pt", "pth", "ckpt", "pkl", "pickle"})
"""Extensions of weights that Python's pickle reads, and with them any code somebody put there."""

_SHARD = re.compile(r"-\d{5}-of-\d{5}(?=\.|$)")
_INDEX = ".index.json"
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")
_SHA1 = re.compile(r"[0-9a-f]{40}\Z")


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file as the upstream lists it: size in bytes, git oid, and the sha256 where it is an LFS file.

    For an LFS file ``git_oid`` is the pointer's id, otherwise that of the content.
    """

    path: str
    size: int
    git_oid: str
    sha256: str | None

    @property
    def lfs(self) -> bool:
        return self.sha256 is not None

    @property
    def key(self) -> str:
        """Names the content, for a partial download."""
        return f"sha256-{self.sha256}" if self.sha256 is not None else f"git-{self.git_oid}"

    def hasher(self) -> hashlib._Hash:
        """Of the content, to be compared with ``sha256`` or, without one, ``git_oid``."""
        return hashlib.sha256() if self.lfs else hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A repository at one commit of the upstream; ``time`` in whole seconds since 1970, None if it isn't known.

    ``restricted``: private, or gated, so that not everybody may read it. ``card``: the head of its README.
    """

    repo: RepoId
    commit: str
    files: tuple[RemoteFile, ...]
    author: str
    time: int | None = None
    lineage: Mapping[str, str] = field(default_factory=dict)
    restricted: bool = False
    card: Mapping[str, Any] = field(default_factory=dict)


class _File(msgspec.Struct, frozen=True, array_like=True):
    path: str
    size: int
    git_oid: str
    sha256: str | None


class _Listing(msgspec.Struct, frozen=True):
    """A snapshot as it is kept in SQL: zlib over msgpack."""

    repo: str
    commit: str
    files: tuple[_File, ...]
    author: str
    time: int | None
    lineage: dict[str, str]
    restricted: bool
    card: dict[str, Any] = {}


def encode_listing(snapshot: Snapshot) -> bytes:
    """The snapshot as bytes that ``decode_listing`` reads."""
    files = tuple(_File(file.path, file.size, file.git_oid, file.sha256) for file in snapshot.files)
    record = _Listing(
        str(snapshot.repo), snapshot.commit, files, snapshot.author, snapshot.time, dict(snapshot.lineage),
        snapshot.restricted, dict(snapshot.card),
    )  # fmt: skip
    return zlib.compress(msgspec.msgpack.encode(record), 1)


def decode_listing(data: bytes) -> Snapshot:
    """A snapshot from our own database; raises IntegrityError when it is damaged."""
    try:
        found = from_msgpack(zlib.decompress(data), _Listing)
    except (zlib.error, msgspec.DecodeError) as error:
        raise IntegrityError(f"a mirrored snapshot in the metadata is damaged: {error}") from error
    files = tuple(RemoteFile(file.path, file.size, file.git_oid, file.sha256) for file in found.files)
    repo = RepoId.from_canonical(found.repo)
    return Snapshot(repo, found.commit, files, found.author, found.time, found.lineage, found.restricted, found.card)


def check(repo: RepoId, commit: str | None, files: list[RemoteFile], wanted: str) -> None:
    """Raise IntegrityError unless the upstream's answer is a usable snapshot of the revision that was asked for."""
    if commit is None or not is_commit(commit):
        raise IntegrityError(f"the upstream gives {commit!r} as commit of {repo.id}@{wanted}; 40 hex digits expected")
    if is_commit(wanted) and wanted != commit:
        raise IntegrityError(f"the upstream answered with commit {commit} when asked for {repo.id}@{wanted}")
    try:
        check_bulk([file.path for file in files])
    except InvalidInput as error:
        raise IntegrityError(f"{repo.id}@{commit} is too large to take: {error.message}") from error
    try:
        check_tree({file.path: None for file in files})
    except InvalidInput as error:
        raise IntegrityError(f"the upstream lists an unsafe file in {repo.id}@{commit}: {error.message}") from error
    if len({file.path for file in files}) != len(files):
        raise IntegrityError(f"the upstream lists a path of {repo.id}@{commit} twice")
    for file in files:
        if file.size > MAX_BLOB:
            raise IntegrityError(f"{repo.id}@{commit}: {file.path!r} has {file.size} bytes; {MAX_BLOB} are the most")
        if file.size < 0 or not _SHA1.match(file.git_oid) or not (file.sha256 is None or _SHA256.match(file.sha256)):
            raise IntegrityError(f"the upstream's listing of {repo.id}@{commit} is malformed at {file.path!r}")


def choose(files: tuple[RemoteFile, ...]) -> tuple[list[RemoteFile], dict[str, str]]:
    """The files to take, and those left out with the file that stands in for each.

    Everything is taken but one thing: pickled weights whose safetensors twin lies in the same directory, together with
    their index. The choice depends on the listing alone, so a commit's files never differ between two registries.
    """
    safe = {_role(file.path): file.path for file in files if file.path.endswith(".safetensors")}
    skipped = {
        file.path: safe[_role(file.path)] for file in files if _is_pickle(file.path) and _role(file.path) in safe
    }
    return [file for file in files if file.path not in skipped], skipped


def _is_pickle(path: str) -> bool:
    return path.removesuffix(_INDEX).rpartition(".")[2] in PICKLES


def _role(path: str) -> str:
    """What a weights file is, apart from its format and number: ``unet/model`` for ``unet/pytorch_model-…-of-….bin``.

    Names as transformers, diffusers and PEFT write them: ``pytorch_model`` beside ``model``, any other stem
    (``adapter_model``, ``diffusion_pytorch_model``) under its own name, a variant such as ``.fp16`` after the stem.
    """
    directory, _, name = path.removesuffix(_INDEX).rpartition("/")
    stem = _SHARD.sub("", name.rpartition(".")[0])
    head, dot, variant = stem.partition(".")
    head = "model" if head == "pytorch_model" else head
    return f"{directory}/{head}{dot}{variant}"
