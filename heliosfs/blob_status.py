"""What a blob store says of one blob, and of itself."""

from __future__ import annotations

from dataclasses import dataclass

from heliosfs.tiers.directory import TierDirectory, TierUsage
from heliosfs.tiers.tier import Tier as Room


@dataclass(frozen=True, slots=True)
class Tier:
    """A directory that holds blobs, by the name that people and metrics know it by; ``room`` looks after its bounds."""

    name: str
    files: TierDirectory
    room: Room


@dataclass(frozen=True, slots=True)
class BlobStatus:
    """How much of a blob is here. ``tier``: ``l1`` or ``l2`` (all of it), ``partial`` or ``remote``; sizes in bytes.

    ``verified`` says that everything there is was checked against the blob's identity; what is local always was.
    ``size`` is None where nobody has the blob open and nothing of it is here.
    """

    tier: str
    local_bytes: int
    size: int | None
    verified: bool
    complete: bool

    def xattrs(self) -> dict[str, str]:
        """As attributes of a file."""
        progress = self.local_bytes / self.size if self.size else float(self.complete)
        return {"tier": self.tier, "progress": f"{progress:.4f}", "verified": "true" if self.verified else "false"}


@dataclass(frozen=True, slots=True)
class BlobsUsage:
    """What the store holds and does: its tiers, by name, those that are there; blobs being filled and queued, bytes in
    flight and in memory."""

    tiers: dict[str, TierUsage]
    filling: int
    queued: int
    in_flight: int
    memory: int


@dataclass(frozen=True, slots=True)
class Pending:
    """What the store has under way in the background: blobs being filled, fetches, bytes that are not durable yet,
    blobs that are being flushed or finished, and those that are copied from one tier to the other."""

    fills: int
    jobs: int
    unflushed: int
    settling: int
    copying: int

    @property
    def nothing(self) -> bool:
        """Whether it could be stopped without losing anything."""
        return not (self.fills or self.jobs or self.unflushed or self.settling or self.copying)
