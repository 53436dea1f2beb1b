"""What the addresses and access tokens of uploads allow, signed (registry/xet/tokens.py).

huggingface_hub sends LFS content to the address that the batch call gave it, and nothing else: no Authorization. So the
address carries what was allowed. hf-xet sends the access token that it was given.
"""

from __future__ import annotations

from typing import Final

from registry.xet.tokens import Grant

LIFE_S: Final = 12 * 3600
"""How long an upload may be started, in seconds: a batch of 256 large files is sent one after the other."""


class LfsGrant(Grant, frozen=True, array_like=True, tag="lfs"):
    """One object may be sent: its sha256 and size in bytes."""

    sha256: str
    size: int


class XetGrant(Grant, frozen=True, array_like=True, tag="xet-write"):
    """Xorbs and shards may be sent to a spool."""

    spool: str


class PartGrant(Grant, frozen=True, array_like=True, tag="lfs-part"):
    """Part ``number`` of an object, from 0, of ``length`` bytes, may be sent to a spool."""

    spool: str
    sha256: str
    number: int
    length: int


class WholeGrant(Grant, frozen=True, array_like=True, tag="lfs-whole"):
    """The parts of an object, of ``part`` bytes each but the last, may be put together."""

    spool: str
    sha256: str
    size: int
    part: int
