"""Read-ahead through memory, for files that are not filled: no tier has room for them. No I/O in here.

Such a file's chunks are kept nowhere, so a reader that goes forward would wait a round trip for each. It gets the next
ones ahead of it instead, as much as it has read in a row (so the window doubles each round trip, as the kernel's does)
up to its share of the memory for it; they come in ranges of at least a quarter of that. What is on its way or here
never exceeds that memory, so nothing is pushed out before it is read; a chunk goes as soon as its readers are past it.
Who opened a file and does not go on must not keep others from theirs: after ``IDLE`` bytes that others read, what was
fetched for it goes too.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from heliosfs.fetch.chunks import AHEAD, MISSING, Chunks

BEHIND: Final = 2 << 20
"""The kernel's requests overtake one another: so many bytes behind a reader something may still be asked for."""

SKIP: Final = 4 << 20
"""A reader that leaves out at most so many bytes goes forward; not every one of its READs is told."""

LEAST_SHARE: Final = 8 << 20
"""What a reader gets at least, in bytes, while there is memory: among many, some get it and not each a useless bit."""

IDLE: Final = 256 << 20

MAX_READERS: Final = 16
"""Readers that count, the latest ones."""


@dataclass(slots=True)
class _Reader:
    """``start``: where it began to go forward; ``offset`` and ``end`` of its last READ; ``stamp``: see ``IDLE``."""

    start: int
    offset: int
    end: int
    stamp: int


class ReadAhead:
    """Readers of the planner's files, and what they get ahead."""

    def __init__(self, files: Mapping[str, Chunks]) -> None:
        self._files = files
        self._readers: OrderedDict[tuple[str, int], _Reader] = OrderedDict()
        self._all_read = 0
        self.coming = 0
        """Bytes of its jobs that have not arrived."""
        self.past: list[tuple[str, int]] = []
        """Chunks, by file, that are not needed in memory any more; the caller takes them out."""

    @property
    def used(self) -> int:
        """Bytes that are here or on their way."""
        return self.coming + sum(file.pooled for file in self._files.values())

    def read(self, key: str, number: int, offset: int, end: int) -> None:
        """A reader asked for the bytes from ``offset`` to ``end``."""
        self._all_read += end - offset
        reader = self._readers.get((key, number))
        if reader is not None and reader.offset - BEHIND <= offset <= reader.end + SKIP:
            reader.offset, reader.end, jumped = offset, max(reader.end, end), False
        else:
            jumped = reader is not None
            reader = self._readers[key, number] = _Reader(offset, offset, end, 0)
        reader.stamp = self._all_read
        self._readers.move_to_end((key, number))
        self._look(key, None if jumped else reader.end - BEHIND)
        while len(self._readers) > MAX_READERS or self._all_read - next(iter(self._readers.values())).stamp > IDLE:
            (other, _), _ = self._readers.popitem(last=False)
            self._look(other)

    def left(self, key: str, number: int) -> None:
        """A reader has closed the file."""
        if self._readers.pop((key, number), None) is not None:
            self._look(key)

    def expects(self, key: str, index: int) -> bool:
        """Whether a reader is about to come to the chunk, or is at it."""
        file = self._files[key]
        start, end = file.start_of(index), file.ends[index]
        return any(
            end > reader.end - BEHIND and start < reader.end + AHEAD
            for (other, _), reader in self._readers.items()
            if other == key
        )

    def forget(self, key: str) -> None:
        """What is in memory of the file is not needed: it is filled now."""
        self._drop(key, len(self._files[key].states), always=True)

    def gone(self, key: str) -> None:
        """The file is whole or closed."""
        self.forget(key)
        for reader in [reader for reader in self._readers if reader[0] == key]:
            del self._readers[reader]

    def next(self, memory: int, range_bytes: int, *, filling: bool) -> tuple[str, int, int] | None:
        """Chunks to be fetched now, as (file, first, stop), where ``memory`` bytes may be used for all of this.

        ``filling``: what is being filled needs none of it.
        """
        mine = [
            (key, reader)
            for (key, _), reader in reversed(self._readers.items())
            if not (filling and self._files[key].rank is not None)
        ]
        if not mine:
            return None
        share = min(AHEAD, memory, max(memory // len(mine), LEAST_SHARE))
        room = memory - self.used
        for key, reader in mine:
            found = self._stretch(self._files[key], reader, share, room, range_bytes)
            if found is not None:
                return key, *found
        return None

    def _stretch(
        self, file: Chunks, reader: _Reader, share: int, room: int, range_bytes: int
    ) -> tuple[int, int] | None:
        window = min(reader.offset - reader.start, share)
        here = file.at(reader.end)
        until = file.at(reader.end + window - 1) + 1 if window > 0 else here
        first = file.states.find(MISSING, here, until)
        if first < 0:
            return None
        stop, full = first, False
        while stop < min(until, len(file.states)) and file.states[stop] == MISSING:
            count = file.bytes_of(first, stop + 1)
            full = stop > first and count > range_bytes
            if full or count > room:
                break
            stop += 1
        if stop == first:
            return None
        worth = full or 4 * file.bytes_of(first, stop) >= window
        # less only where more will never come in one range, or the reader comes to it next
        if worth or first == here or stop == len(file.states) or file.states[stop] != MISSING:
            return first, stop
        return None

    def _look(self, key: str, before: int | None = None) -> None:
        """Let chunks go that no reader is about to come to, of those that begin before an offset."""
        file = self._files[key]
        if file.pooled:
            self._drop(key, len(file.states) if before is None else file.at(max(0, before)), always=False)

    def _drop(self, key: str, stop: int, *, always: bool) -> None:
        file = self._files[key]
        for index in file.pooled_chunks(stop):
            if always or not self.expects(key, index):
                file.set(index, MISSING)
                self.past.append((key, index))
