"""What fetching and filling ask of whoever looks after the disk's room (heliosfs/tiers/evictor.py)."""

from __future__ import annotations

from typing import Protocol

from heliosfs.tiers.local import LocalBlob
from heliosfs.tiers.policy import Answer, Reservation


class Room(Protocol):
    """Called from the trio loop; nothing here waits, but ``moved``."""

    def ask(self, local: LocalBlob, need: int, group: str, group_need: int) -> Answer:
        """May the rest of a blob be written, ``need`` bytes of room? Asked again until it is granted or ``end``ed."""

    def missing(self, sha256: str, size: int) -> int:
        """About how many bytes of room the rest of a blob takes that nobody has open."""

    def end(self, sha256: str) -> None:
        """The blob is whole, or is not to be filled any more."""

    def waits(self, sha256: str) -> bool:
        """Whether others are going for the blob."""

    def refusal(self, sha256: str) -> str:
        """Why the blob was not let in; empty where it was."""

    async def moved(self) -> None:
        """Wait until something was removed, for a moment at most."""

    def lend(self, local: LocalBlob, count: int) -> Reservation | None:
        """Room for chunks of ``count`` bytes that are about to be fetched; None: they can't be kept."""

    def grew(self, local: LocalBlob, loan: Reservation | None) -> None:
        """A chunk of the blob, which is open, was written with this loan, or a part of one that the disk refused."""

    def give_back(self, loan: Reservation) -> None:
        """Nothing more will be written with it."""

    def failed(self, local: LocalBlob, error: OSError) -> bool:
        """A disk refused something; whether that is seen to, and concerns only blobs that lie where this one does."""

    def writable(self, local: LocalBlob) -> bool:
        """Whether the blob's disk takes anything now."""
