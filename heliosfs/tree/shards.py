"""Which weight files are loaded together, and in which order. No I/O in here.

Loaders take the files that an index (``*.safetensors.index.json``) names and no others. vLLM, which knows only files
of the index's own directory, sorts them by name, numbers in names by value (``safetensors_weights_iterator``);
transformers and diffusers sort them by name alone, which is the same where numbers have leading zeros. So the index
says which files belong together, and their names say in which order; the order in the index itself says nothing.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Final

import msgspec

from helios.decoding import from_json
from heliosfs.store.manifest import FileEntry
from heliosfs.tree.snapshot import WEIGHTS, Snapshot

MAX_NAMES: Final = 4096
"""Most files that an index may name."""

MAX_NAME: Final = 255
"""Longest name of a file, in characters."""

SUFFIX: Final = ".safetensors"
CONFIG: Final = "config.json"
"""In a directory with this file, loaders take every safetensors file where no index says otherwise."""

_SHARD: Final = re.compile(
    r"(?P<set>.+?)[-.]\d{2,6}(?P<of>-of-\d+)?(?P<kind>" + "|".join(map(re.escape, WEIGHTS)) + ")"
)
_INDEX: Final = re.compile(r".+\.safetensors\.index(?:\.[^.]+)?\.json")
"""Also with a variant, as diffusers writes it: ``diffusion_pytorch_model.safetensors.index.fp16.json``."""


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def indexes(snapshot: Snapshot, path: str) -> list[str]:
    """The paths of the indexes that may name a weight file."""
    parent, _, name = path.rpartition("/")
    if not name.endswith(SUFFIX):
        return []
    directory = snapshot.directories[parent]
    found = (other for other, entry in directory.items() if entry is not None and _INDEX.fullmatch(other))
    return [f"{parent}/{other}" if parent else other for other in found]


def read_index(data: bytes | memoryview) -> frozenset[str]:
    """The names of the files that an index names; none where it is malformed."""
    try:
        named = set(from_json(data, _Index).weight_map.values())
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return frozenset()
    if len(named) > MAX_NAMES or any(len(name) > MAX_NAME for name in named):
        return frozenset()
    return frozenset(named)


def following(snapshot: Snapshot, path: str, named: Collection[frozenset[str]] = ()) -> list[str]:
    """The files that are loaded with a weight file, in loading order: those after it, then those before it.

    ``named`` is what each index of its directory names, nothing where that is not known. Files that are no parts of one
    whole, such as the quantisations of a model, are alternatives to each other and are not returned.
    """
    parent, _, name = path.rpartition("/")
    directory = snapshot.directories[parent]
    names = sorted(_together(name, directory, named), key=_natural)
    index = names.index(name)
    prefix = f"{parent}/" if parent else ""
    return [prefix + other for other in names[index + 1 :] + names[:index]]


def sets(snapshot: Snapshot) -> list[list[str]]:
    """The weight files of a commit by what is loaded together, as far as names say so, each in exactly one set."""
    found: list[list[str]] = []
    seen: set[str] = set()
    for path in sorted(snapshot.files, key=_natural):
        if path.endswith(WEIGHTS) and path not in seen:
            found.append([path, *following(snapshot, path)])
            seen.update(found[-1])
    return found


def _together(name: str, directory: Mapping[str, FileEntry | None], named: Collection[frozenset[str]]) -> Iterable[str]:
    files = [other for other, entry in directory.items() if entry is not None]
    for each in named:
        if name in each:
            return [other for other in files if other in each and other.endswith(SUFFIX)]
    shard = _SHARD.fullmatch(name)
    if shard is not None:
        matches = ((other, _SHARD.fullmatch(other)) for other in files)
        mine = shard.group("set", "of", "kind")
        return [other for other, match in matches if match is not None and match.group("set", "of", "kind") == mine]
    parts = [other for other in files if other.endswith(SUFFIX)]
    if named or CONFIG not in directory or name not in parts or any(map(_SHARD.fullmatch, parts)):
        return [name]
    return [other for other in parts if _variant(other) == _variant(name)]


def _variant(name: str) -> str:
    """``fp16`` of ``model.fp16.safetensors``: the same weights once more, for another purpose."""
    return name.removesuffix(SUFFIX).partition(".")[2]


def _natural(name: str) -> list[tuple[int, str]]:
    """Numbers by their value, all else by its characters."""
    pieces = re.split(r"([0-9]+)", name)
    return [(int(piece), "") if number % 2 else (0, piece) for number, piece in enumerate(pieces)]
