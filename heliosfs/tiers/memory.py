"""What stays in the memory pool: decided by kind and use, in bytes. No I/O and no bytes in here (see pool.py).

What loaders read first and again and again, small files, headers and recipes, is *guarded*: it has up to ``GUARDED`` of
the room, and other chunks never push it out, however many gigabytes of weights pass. Chunks have the rest, and what the
guarded leave of theirs. A chunk comes in as *new*; used again a while later it is *hot*, and hot ones may take up to
``HOT`` of the chunks' room: one pass over a file, which uses each chunk many times in a row and never again, pushes out
nothing that is hot (segmented LRU; Karedla, Love and Wherry, 1994, with the correlated references of LRU-K). Within a
segment the least recently used goes first.

What a reader is about to come to is *read ahead*: it has up to ``AHEAD`` of the chunks' room, whatever else comes does
not push it out, and it goes when it is dropped, once it was read.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from enum import Enum
from typing import Final

GUARDED: Final = 0.75
"""Most of the room that small files, headers and recipes take together."""

HOT: Final = 0.8
"""Most of the chunks' room that hot ones take."""

AHEAD: Final = 0.5
"""Most of the chunks' room for what is read ahead."""

APART_S: Final = 10.0
"""Uses of a chunk within so many seconds are one: a reader takes a chunk in many pieces."""


class Kind(Enum):
    """What an entry is."""

    SMALL = "small"
    HEADER = "header"
    RECIPE = "recipe"
    CHUNK = "chunk"
    READAHEAD = "readahead"


@dataclass(slots=True)
class _Held:
    cost: int
    kind: Kind
    counted: float


class MemoryPolicy:
    """Entries by key with their cost in bytes; ``used`` never exceeds ``limit``. Times are in seconds of one clock."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._guarded: OrderedDict[bytes, _Held] = OrderedDict()
        self._new: OrderedDict[bytes, _Held] = OrderedDict()
        self._hot: OrderedDict[bytes, _Held] = OrderedDict()
        self._hot_bytes = 0
        self._ahead: OrderedDict[bytes, _Held] = OrderedDict()
        self.bytes_of: dict[Kind, int] = dict.fromkeys(Kind, 0)
        """Bytes by kind."""

    def __len__(self) -> int:
        return len(self._guarded) + len(self._new) + len(self._hot) + len(self._ahead)

    def __contains__(self, key: bytes) -> bool:
        return key in self._guarded or key in self._new or key in self._hot or key in self._ahead

    @property
    def used(self) -> int:
        """Bytes of all entries."""
        return sum(self.bytes_of.values())

    def put(self, key: bytes, cost: int, kind: Kind, now: float) -> list[bytes] | None:
        """Take an entry in; returns those that go for it (it may be among them). None: it was there, or does not fit.

        A chunk that turns out to be a part of a small file becomes guarded, or goes where that has no room for it.
        """
        passing = kind in (Kind.CHUNK, Kind.READAHEAD)
        if key in self._guarded or (passing and key in self):
            self.use(key, now)
            return None
        self.drop(key)
        if cost > self._room(kind):
            return None
        segment = self._ahead if kind is Kind.READAHEAD else self._new if passing else self._guarded
        segment[key] = _Held(cost, kind, now)
        self.bytes_of[kind] += cost
        gone = []
        while self._guarded_bytes > int(self.limit * GUARDED):
            gone.append(self._evict(next(iter(self._guarded))))
        while self.bytes_of[Kind.READAHEAD] > self.readahead_room:
            gone.append(self._evict(next(iter(self._ahead))))
        while self.used > self.limit:
            gone.append(self._evict(self._victim(key)))
        return gone

    def use(self, key: bytes, now: float) -> Kind | None:
        """An entry was used; returns its kind, or None where there is none."""
        for segment in (self._guarded, self._hot, self._ahead):
            if key in segment:
                segment.move_to_end(key)
                return segment[key].kind
        held = self._new.get(key)
        if held is None:
            return None
        if now - held.counted < APART_S:
            self._new.move_to_end(key)
            return held.kind
        self._hot[key] = self._new.pop(key)
        self._hot_bytes += held.cost
        while len(self._hot) > 1 and self._hot_bytes > HOT * self._chunk_room:
            old, cooled = self._hot.popitem(last=False)
            self._hot_bytes -= cooled.cost
            cooled.counted = now
            self._new[old] = cooled
        return held.kind

    def drop(self, key: bytes) -> bool:
        """Forget an entry; says whether there was one."""
        if key not in self:
            return False
        self._evict(key)
        return True

    def kind(self, key: bytes) -> Kind | None:
        """What an entry is; None where there is none. This is no use of it."""
        for segment in (self._guarded, self._new, self._hot, self._ahead):
            if key in segment:
                return segment[key].kind
        return None

    @property
    def readahead_room(self) -> int:
        """Most bytes for what is read ahead."""
        return int(self._chunk_room * AHEAD)

    def _room(self, kind: Kind) -> int:
        if kind is Kind.READAHEAD:
            return self.readahead_room
        return self._chunk_room if kind is Kind.CHUNK else int(self.limit * GUARDED)

    @property
    def _guarded_bytes(self) -> int:
        return self.used - self.bytes_of[Kind.CHUNK] - self.bytes_of[Kind.READAHEAD]

    @property
    def _chunk_room(self) -> int:
        return self.limit - self._guarded_bytes

    def _victim(self, comer: bytes) -> bytes:
        """The chunk that goes next, for one that just came."""
        new = next((key for key in self._new if key != comer), None)
        if self._hot and (new is None or self._hot_bytes > HOT * self._chunk_room):
            return next(iter(self._hot))
        return comer if new is None else new

    def _evict(self, key: bytes) -> bytes:
        held = self._guarded.pop(key, None) or self._new.pop(key, None) or self._ahead.pop(key, None)
        if held is None:
            held = self._hot.pop(key)
            self._hot_bytes -= held.cost
        self.bytes_of[held.kind] -= held.cost
        return key
