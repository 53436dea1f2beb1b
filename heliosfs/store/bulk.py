"""How much one snapshot may hold: what every mount can take into memory. Checked where a snapshot is made, and again
where one is read."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from typing import Final

import msgspec

from helios.errors import InvalidInput
from heliosfs.store.manifest import MANIFEST_MAGIC, FileEntry, canonical

MAX_MANIFEST: Final = 32 << 20
"""Longest manifest, in bytes: about 100,000 files."""

DIRECTORY_BYTES: Final = 512
"""Most memory that one directory takes, beside twice its path."""

MAX_DIRECTORY_BYTES: Final = 32 << 20
"""Most memory for the directories of one snapshot: a short manifest can name very many."""

_LARGEST = FileEntry("0" * 64, (1 << 63) - 1, "0" * 40, "0" * 64)
_ENTRY_BYTES: Final = len(canonical({"": msgspec.to_builtins(_LARGEST)}))
"""Most that a file adds to a manifest, beside its path."""


def manifest_bytes(paths: Collection[str]) -> int:
    """The most bytes that the manifest of these paths can have."""
    least = len(MANIFEST_MAGIC) + 16 + _ENTRY_BYTES * len(paths)
    if least > MAX_MANIFEST:
        return least
    return least + sum(len(json.dumps(path, ensure_ascii=False).encode("utf-8", "surrogatepass")) for path in paths)


def directory_bytes(paths: Iterable[str]) -> int:
    """Memory for the directories of these paths; counting ends where it is more than ``MAX_DIRECTORY_BYTES``."""
    directories: set[str] = set()
    cost = 0
    for path in paths:
        parent = path.rpartition("/")[0]
        while parent and parent not in directories:
            directories.add(parent)
            cost += DIRECTORY_BYTES + 2 * len(parent)
            if cost > MAX_DIRECTORY_BYTES:
                return cost
            parent = parent.rpartition("/")[0]
    return cost


def check_bulk(paths: Collection[str]) -> None:
    """Raise InvalidInput when a snapshot of these paths is more than a mount takes."""
    size = manifest_bytes(paths)
    if size > MAX_MANIFEST:
        raise InvalidInput(
            f"{len(paths):,} files need a manifest of up to {size:,} bytes; {MAX_MANIFEST:,} are possible",
            hint="About 100,000 files fit into one repository: split it, or pack small files together.",
        )
    if directory_bytes(paths) > MAX_DIRECTORY_BYTES:
        raise InvalidInput(
            f"the {len(paths):,} files lie in too many directories for one repository",
            hint="Some 50,000 directories fit: split the repository, or make its tree less deep.",
        )
