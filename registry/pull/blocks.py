"""Which bytes of a file are here, which are being fetched, and what to ask for next: no I/O, no clock.

A file is a row of blocks of 1 MiB (the last one may be shorter). A block is missing, under way, or here. ``Blocks``
hands out *spans*: runs of missing blocks inside one piece of 8 MiB, each to one fetch, so that no byte is asked for
twice. A fetch says how far it has come (``advance``) and that it is over (``end``); blocks it did not complete are
missing again. Readers tell where they are (``want``): what they need next is asked for first, then what follows them.

**The last block is held back** until the whole file is verified: whoever has every byte has right ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

BLOCK: Final = 1 << 20
PIECE: Final = 8 << 20
"""Most bytes of a span, and its alignment."""
LOOK: Final = 32
"""Blocks that ``ready`` looks at: most of what a reader is given at a time."""

_MISSING, _UNDER_WAY, _HERE = 0, 1, 2


@dataclass(eq=False, slots=True)
class Span:
    """Bytes ``start`` to ``stop`` that one fetch brings; those before ``at`` are here."""

    start: int
    stop: int
    at: int


class Blocks:
    """The state of one file of ``size`` bytes. Its owner has a lock."""

    def __init__(self, size: int, here: Iterable[int] = ()) -> None:
        """``here`` are numbers of blocks that an earlier attempt has brought; others than the file's are ignored."""
        self.size = size
        self.count = -(-size // BLOCK)
        self.verified = False
        self._state = bytearray(self.count)
        self._left = self.count
        self._spans: set[Span] = set()
        self._wants: dict[int, int] = {}
        for number in here:
            if 0 <= number < self.count and self._state[number] != _HERE:
                self._state[number] = _HERE
                self._left -= 1

    def again(self, here: Iterable[int]) -> Blocks:
        """The same file anew, with these blocks here and the same readers."""
        fresh = Blocks(self.size, here)
        fresh._wants = self._wants
        return fresh

    @property
    def whole(self) -> bool:
        """Whether every byte is here."""
        return not self._left

    @property
    def here(self) -> int:
        """Bytes that are here in whole blocks."""
        missing = self._left * BLOCK
        if self.count and self._state[-1] != _HERE:
            missing -= self.count * BLOCK - self.size
        return self.size - missing

    @property
    def open(self) -> int:
        """Spans under way."""
        return len(self._spans)

    def want(self, reader: int, offset: int | None) -> None:
        """The reader needs the byte at ``offset`` next; None: nothing any more."""
        if offset is None:
            self._wants.pop(reader, None)
        else:
            self._wants[reader] = offset

    def next(self) -> Span | None:
        """A span to fetch, now under way; None when nothing is missing that is not under way."""
        best = None
        for offset in self._wants.values():
            block = min(offset // BLOCK, self.count)
            found = self._state.find(_MISSING, block)
            if found >= 0 and (best is None or found - block < best[0]):
                best = found - block, found
        first = self._state.find(_MISSING) if best is None else best[1]
        if first < 0:
            return None
        end = min(first - first % (PIECE // BLOCK) + PIECE // BLOCK, self.count)
        stop = first
        while stop < end and self._state[stop] == _MISSING:
            self._state[stop] = _UNDER_WAY
            stop += 1
        span = Span(first * BLOCK, min(stop * BLOCK, self.size), first * BLOCK)
        self._spans.add(span)
        return span

    def advance(self, span: Span, at: int) -> Iterator[int]:
        """The span's bytes before ``at`` are here; yields the numbers of the blocks that are complete now."""
        if not span.at <= at <= span.stop:
            raise ValueError(f"{span} can't go on to {at}")
        before, span.at = span.at, at
        last = self.count if at == self.size else at // BLOCK
        for number in range(before // BLOCK, last):
            if self._state[number] != _HERE:
                self._state[number] = _HERE
                self._left -= 1
                yield number

    def end(self, span: Span) -> None:
        """The span's fetch is over, whether it has brought everything or not."""
        self._spans.discard(span)
        for number in range(span.start // BLOCK, -(-span.stop // BLOCK)):
            if self._state[number] == _UNDER_WAY:
                self._state[number] = _MISSING

    def ready(self, offset: int, *, held_back: bool = True) -> int:
        """Up to where bytes from ``offset`` on may be read: ``offset`` itself when none may yet.

        ``held_back`` False is for whoever verifies.
        """
        limit = self.size
        if held_back and not self.verified:
            limit = max(0, self.count - 1) * BLOCK
        at = offset
        for number in range(offset // BLOCK, min(self.count, offset // BLOCK + LOOK)):
            if self._state[number] == _HERE:
                at = min((number + 1) * BLOCK, self.size)
                continue
            if self._state[number] == _UNDER_WAY:
                at = max([at, *(s.at for s in self._spans if s.start <= number * BLOCK < s.stop)])
            break
        return max(offset, min(at, limit))
