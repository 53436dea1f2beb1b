"""How each file of an upload should be sent: inside the commit, or as an LFS object before it."""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Mapping
from typing import Any, Final

import msgspec
from pathspec import GitIgnoreSpec

from helios.errors import InvalidInput
from helios.names import check_path
from heliosfs.store.manifest import FileEntry
from registry.ingest.kinds import is_lfs

MAX_FILES: Final = 1000
MAX_IGNORE: Final = 64 << 10
"""Longest .gitignore that is looked at, in bytes."""


class File(msgspec.Struct):
    """A file that a client wants to upload: ``sample`` is base64 of its first 512 bytes, ``size`` in bytes."""

    path: str
    size: int
    sample: str = ""


class Preupload(msgspec.Struct):
    files: list[File]
    gitIgnore: str | None = None  # noqa: N815 - as it is written


def answer(wanted: Preupload, held: Mapping[str, FileEntry], hosted_ignore: str) -> dict[str, Any]:
    """What to do with each file. ``held`` are the branch's files, ``hosted_ignore`` its .gitignore.

    ``oid`` is what the branch has at the path, so that clients skip what has not changed: the sha256 of an LFS file,
    git's id of another. Raises InvalidInput.
    """
    if len(wanted.files) > MAX_FILES:
        raise InvalidInput(f"preupload takes {MAX_FILES} files at a time, not {len(wanted.files)}")
    ignored = _ignored(hosted_ignore if wanted.gitIgnore is None else wanted.gitIgnore)
    return {"files": [_file(file, held.get(file.path), ignored) for file in wanted.files]}


def _file(file: File, held: FileEntry | None, ignored: GitIgnoreSpec) -> dict[str, Any]:
    if not 0 <= file.size < 1 << 63:
        raise InvalidInput(f"{file.path[:200]!r} can't have {file.size} bytes")
    try:
        sample = b64decode(file.sample, validate=True)
    except ValueError:
        raise InvalidInput(f"the sample of {file.path[:200]!r} is not base64") from None
    # An empty object can't be an LFS object: clients send it inside the commit whatever they are told.
    large = file.size > 0 and is_lfs(check_path(file.path), file.size, sample)
    out: dict[str, Any] = {
        "path": file.path,
        "uploadMode": "lfs" if large else "regular",
        "shouldIgnore": ignored.match_file(file.path),
    }
    if held is not None:
        out["oid"] = held.sha256 if held.lfs else held.git_oid
    return out


def _ignored(text: str) -> GitIgnoreSpec:
    if len(text) > MAX_IGNORE:
        raise InvalidInput(f".gitignore is longer than {MAX_IGNORE} bytes")
    try:
        return GitIgnoreSpec.from_lines(text.splitlines())
    except ValueError as error:
        raise InvalidInput(f".gitignore is malformed: {error}") from None
