"""What a cache directory holds, checked by its own words: nothing unverified may lie there as if it were right."""

from __future__ import annotations

import hashlib
from pathlib import Path

from blake3 import blake3

from heliosfs.tiers import bitmap


def verify(cache: Path) -> tuple[int, int]:
    """Check every whole blob and every chunk that a journal vouches for; returns how many of each there are."""
    whole = chunks = 0
    for path in (cache / "blobs").rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                assert hashlib.file_digest(file, "sha256").hexdigest() == path.name, f"{path} is not what it is called"
            whole += 1
    for path in (cache / "partial").rglob("*.map"):
        blob = path.name.removesuffix(".map")
        journal = bitmap.replay(path.read_bytes(), blob)
        if not path.with_suffix(".data").exists():  # it became whole as its worker was ended
            assert (cache / "blobs" / blob[:2] / blob).exists(), f"{path} is alone"
            continue
        data = path.with_suffix(".data").read_bytes()
        for index, there in enumerate(journal.have):
            if there:
                start, end = journal.recipe.span(index)
                assert blake3(data[start:end]).digest() == journal.recipe.id(index), f"chunk {index} of {blob} is wrong"
                chunks += 1
    return whole, chunks
