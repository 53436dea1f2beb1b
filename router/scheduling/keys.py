"""Numbers for names and texts, the same in every process."""

from __future__ import annotations

from hashlib import blake2b


def key_of(*parts: str) -> int:
    """A number of 60 bits for texts; which text ends where is a part of it."""
    digest = blake2b(digest_size=8)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        digest.update(b"%d:" % len(data))
        digest.update(data)
    return int.from_bytes(digest.digest(), "big") >> 4


def fraction_of(key: int) -> float:
    """A key of ``key_of`` as a number in [0, 1)."""
    return key / (1 << 60)
