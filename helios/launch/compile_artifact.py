"""An artifact of compiled kernels: what is in it, who vouches for it, and what of an engine's cache goes into one.

A commit of the model's repository with an ``index`` and the engine's files below ``files/``. The index is

    helios-compile-cache 1 <HMAC-SHA256 of the rest, hexadecimal>
    {"facts": "…", "files": {"path": {"sha256": "…", "size": 1}, …}}

Compiled kernels are code: an engine runs them, and unpickles what lies beside them. Who may push to a model's
repository must not thereby run code on the nodes that serve it, so an artifact counts only with the seal of a secret
that the nodes share. The index names every file by its digest, so that the seal holds for all of them.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import msgspec

from helios.decoding import from_json
from helios.errors import IntegrityError, InvalidInput
from helios.names import check_path

INDEX: Final = "index"
FILES: Final = "files"
MAX_FILES: Final = 20_000
MAX_INDEX: Final = 16 << 20
_HEAD: Final = re.compile(rb"helios-compile-cache 1 ([0-9a-f]{64})\n")

LEFT_OUT: Final = (
    ".lock", ".tmp", ".pid",  # of the moment
    ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill",  # what a registry keeps back
)  # fmt: skip


class Entry(msgspec.Struct, frozen=True):
    """A file: its sha256 in hexadecimal, and its bytes."""

    sha256: str
    size: int


class Index(msgspec.Struct, frozen=True):
    """``facts`` are the key's; ``files`` by their paths in the engine's cache."""

    facts: str
    files: dict[str, Entry]

    @property
    def bytes(self) -> int:
        return sum(entry.size for entry in self.files.values())


def seal(index: Index, secret: bytes) -> bytes:
    """The index as it is stored."""
    body = msgspec.json.encode(index, order="sorted")
    return b"helios-compile-cache 1 " + _mac(body, secret).encode() + b"\n" + body


def unseal(data: bytes, secret: bytes, facts: str) -> Index:
    """Read an index that is for ``facts``; raises IntegrityError for one that is damaged, not sealed with ``secret``,
    or for something else."""
    head = _HEAD.match(data)
    if head is None:
        raise IntegrityError("its index is none of this version")
    body = data[head.end() :]
    if not hmac.compare_digest(_mac(body, secret).encode(), head[1]):
        raise IntegrityError(
            "its index has no seal of this node's key",
            hint="Nodes that are to share compiled kernels need the same compile_cache.key_file.",
        )
    try:
        index = from_json(body, Index)
        for path in index.files:
            check_path(path)
    except (msgspec.DecodeError, InvalidInput) as error:
        raise IntegrityError(f"its index does not decode: {error}") from None
    if index.facts != facts:
        raise IntegrityError("it is for another model, engine or device")
    return index


def fingerprint(secret: bytes) -> str:
    """Which secret it is, without telling it: nodes with another one look for, and publish, artifacts of their own."""
    return _mac(b"which", secret)[:16]


def _mac(body: bytes, secret: bytes) -> str:
    return hmac.new(secret, body, hashlib.sha256).hexdigest()


def check(files: Path, index: Index, digest: Callable[[Path], str]) -> None:
    """Raise IntegrityError unless a directory holds exactly the index's files, of which ``digest`` gives the sha256."""
    there = dict(walk(files, strict=True))
    for path in index.files.keys() ^ there.keys():
        raise IntegrityError(f"{path} is {'missing' if path in index.files else 'in it and not in its index'}")
    for path, entry in index.files.items():
        if there[path].st_size != entry.size or digest(files / path) != entry.sha256:
            raise IntegrityError(f"{path} is not what its index says")


def walk(root: Path, *, strict: bool = False) -> Iterator[tuple[str, os.stat_result]]:
    """The regular files below a directory, by their relative paths. What vanishes meanwhile is left out; raises
    IntegrityError for more than MAX_FILES, and with ``strict`` for links, pipes and the like; OSError."""
    for count, found in enumerate(_walk(root, "", strict)):
        if count >= MAX_FILES:
            raise IntegrityError(f"it has more than {MAX_FILES} files")
        yield found


def _walk(directory: Path, prefix: str, strict: bool) -> Iterator[tuple[str, os.stat_result]]:
    with os.scandir(directory) as entries:
        names = sorted(entries, key=lambda entry: entry.name)
    for entry in names:
        try:
            status = entry.stat(follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode):
                yield from _walk(Path(entry.path), f"{prefix}{entry.name}/", strict)
            elif stat.S_ISREG(status.st_mode):
                yield prefix + entry.name, status
            elif strict:
                raise IntegrityError(f"{prefix}{entry.name} is neither a file nor a directory")
        except FileNotFoundError:
            continue


def worth_keeping(path: str, status: os.stat_result) -> bool:
    """Whether a file of an engine's cache belongs into an artifact: no lock, nothing half-written, nothing that a
    registry would keep back (docs/registry-admission.md). Without one of them the engine compiles that part again."""
    try:
        check_path(path)
    except InvalidInput:
        return False
    name = path.rpartition("/")[2].lower()
    return status.st_size > 0 and not name.endswith(LEFT_OUT) and not name.startswith(".nfs") and ".tmp." not in name


def settled(cache: Path, since: float) -> bool:
    """Whether nothing that belongs into an artifact has been written since then (unix seconds)."""
    return not any(status.st_mtime > since and worth_keeping(path, status) for path, status in walk(cache))


def snapshot(
    cache: Path, before: Index | None, lower: Path | None, facts: str, staging: Path, most: int, since: float
) -> Index | None:
    """Copy what an artifact of at most ``most`` bytes holds of ``cache`` to ``staging``, because the engine goes on
    writing; None where nothing is new since ``before``, whose files are in ``lower``. What was written after ``since``
    (unix seconds) may be half of a file and is left out.

    Where old and new together are too much the old ones are dropped: they are of other arguments, ports or versions of
    the engine's own keys more often than not. Raises IntegrityError when the new ones alone are, and OSError.
    """
    known = {} if before is None or lower is None else before.files
    new: dict[str, int] = {}
    old: dict[str, int] = {}
    for path, status in walk(cache):
        if worth_keeping(path, status) and status.st_mtime <= since:
            same = lower is not None and path in known and _same(status, lower / path)
            (old if same else new)[path] = status.st_size
    if not new:
        return None
    size = sum(new.values())
    if size > most:
        raise IntegrityError(f"what was compiled takes {size} bytes, and compile_cache.limit_mib allows {most}")
    taken = new | old if size + sum(old.values()) <= most else new
    copied = {path: entry for path in sorted(taken) if (entry := _copy(cache / path, staging / path)) is not None}
    return Index(facts, copied) if copied.keys() & new.keys() else None


def _same(status: os.stat_result, old: Path) -> bool:
    """Whether a file is still the one that it was in the artifact: a view keeps sizes and times."""
    was = old.lstat()
    return (status.st_size, status.st_mtime_ns) == (was.st_size, was.st_mtime_ns)


def _copy(source: Path, target: Path) -> Entry | None:
    """Copy a file and hash the copy; None for one that changes or vanishes meanwhile."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        before = source.stat()
        shutil.copyfile(source, target)
        after = source.stat()
    except FileNotFoundError:
        return None
    target.chmod(before.st_mode & 0o777 | 0o600)
    if (before.st_size, before.st_mtime_ns, before.st_ino) != (after.st_size, after.st_mtime_ns, after.st_ino):
        return None
    with target.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Entry(digest, before.st_size)
