"""Which class each blob has, of all that it was given. No I/O in here.

Volumes and pins give and take classes one after another, and a node has thousands of blobs of each: so who gave what is
counted per blob, and a change costs as much as it has blobs, however many there are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from heliosfs.tiers.policy import Priority

_BITS: Final = 24
"""Of one blob's count for one class: more than ever give it. The counts of all classes are one number, the highest
class's in front, so that its length tells which is the highest that was given."""


class Classes:
    """A blob has the highest class of those that it was given and that were not taken back."""

    def __init__(self) -> None:
        self._of: dict[str, Priority] = {}
        self._counts: dict[str, int] = {}

    @property
    def of(self) -> Mapping[str, Priority]:
        """The class of each blob that was given one; always the same mapping, which follows every change."""
        return self._of

    def give(self, blobs: Iterable[str], priority: Priority) -> None:
        """Give blobs a class, each of them once."""
        one = 1 << (_BITS * priority)
        for sha256 in blobs:
            self._set(sha256, self._counts.get(sha256, 0) + one)

    def take(self, blobs: Iterable[str], priority: Priority) -> None:
        """Take a class back that was given to these blobs."""
        one = 1 << (_BITS * priority)
        for sha256 in blobs:
            self._set(sha256, self._counts[sha256] - one)

    def _set(self, sha256: str, counts: int) -> None:
        if not counts:
            del self._counts[sha256], self._of[sha256]
            return
        self._counts[sha256] = counts
        self._of[sha256] = Priority((counts.bit_length() - 1) // _BITS)
