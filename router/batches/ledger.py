"""A batch's record in the hands of its owner: changed step by step, with what was written of its results.

Results wait here until they are flushed: written as a part of the output or the error file, which the record then names
together with the requests that are done. Whatever is not in the record was not done, so an owner that is killed loses
the results of one flush at most. A part that is still short is written anew with what comes next, under another name;
so there are about as many parts as MiB.

A change whose answer got lost may have been made. The next one then finds another record than was known here, takes it
for its own, which owner and epoch say, and is made to that; so a change has to be one that may be made to what it has
made. Several tasks may save; one does at a time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from router.batches import machine
from router.batches.outcome import Result
from router.batches.progress import Progress
from router.batches.records import BatchRecord, Part, Usage
from router.batches.shelf import Held, Lost, Shelf

SHORT: Final = 1 << 20
"""A part below so many bytes is written anew with what comes next."""
FULL: Final = 4 << 20
"""So many bytes of results are flushed at once."""
MOST: Final = 4 * FULL
"""With so many bytes waiting to be written, nothing more should be asked."""
TRIES: Final = 8


class NotOurs(Exception):
    """Another process owns the batch."""


class _Side:
    """The output file, or the error file: its parts, and what the last one holds where it is short."""

    def __init__(self, file: str, parts: list[Part]) -> None:
        self.file, self.parts, self.tail = file, parts, b""

    def grown(self, part: Part, data: bytes, instead: bool) -> _Side:
        """The same with a part more, or with another one instead of the last."""
        side = _Side(self.file, [*(self.parts[:-1] if instead else self.parts), part])
        side.tail = data if len(data) < SHORT else b""
        return side


class _Flush:
    """Results that are being written: the same ones until they are."""

    def __init__(self, name: str, good: bytes, bad: bytes, progress: Progress, usage: Usage) -> None:
        self.name, self.content, self.progress, self.usage = name, {True: good, False: bad}, progress, usage


class Ledger:
    """One batch of this owner's. ``clock`` gives seconds; ``saved_at`` is when the record was last known to be ours."""

    def __init__(self, shelf: Shelf, held: Held, clock: Callable[[], float]) -> None:
        self._shelf, self._held, self._clock = shelf, held, clock
        record = held.record
        self.progress = Progress(record.below, record.ahead, record.completed, record.failed)
        """What is done, flushed or not."""
        self.full = asyncio.Event()
        """There is enough to be flushed."""
        self.changed: Callable[[], None] = lambda: None
        """Told when somebody else has changed the record."""
        self.saved_at = clock()
        self._sides = {
            True: _Side(record.output_file_id, list(record.output)),
            False: _Side(record.error_file_id, list(record.error)),
        }
        self._waiting: dict[bool, list[bytes]] = {True: [], False: []}
        self._size, self._flushes, self._usage = 0, 0, record.usage
        self._pending: _Flush | None = None
        self._lost = False
        """Whether it is another's now, for good."""
        self._saving, self._flushing = asyncio.Lock(), asyncio.Lock()

    @property
    def record(self) -> BatchRecord:
        """As it was saved last, or found."""
        return self._held.record

    @property
    def crowded(self) -> bool:
        """Whether the store has to take something first."""
        return self._size >= MOST

    def add(self, number: int, result: Result) -> None:
        """A request is done."""
        self.progress.finish(number, good=result.good)
        self._waiting[result.good].append(result.line)
        self._usage += result.usage
        self._size += len(result.line)
        if self._size >= FULL:
            self.full.set()

    async def save(self, change: Callable[[BatchRecord], BatchRecord]) -> None:
        """Change the record. Raises NotOurs, Unavailable, NotFound, and what ``change`` raises."""
        async with self._saving:
            if self._lost:
                raise NotOurs
            for _ in range(TRIES):
                before, asked_at = self._held.record, self._clock()
                after = machine.renewed(change(before))
                try:
                    self._held = await self._shelf.save(self._held, after)
                except Lost:
                    held = await self._shelf.batch(before.tenant, before.id)
                    found = held.record
                    if found != after and (found.owner, found.epoch) != (before.owner, before.epoch):
                        self._lost = True
                        raise NotOurs from None
                    self._held = held
                    if found == after:  # it had been made, though nobody said so
                        break
                    self.changed()
                    continue
                break
            else:
                raise NotOurs
            self.saved_at = asked_at  # not later than anybody can have seen it

    async def flush(self) -> None:
        """Write what waits, and say so in the record; where nothing waits, that the owner lives. Raises as ``save``.

        What could not be written is kept, and goes first the next time."""
        async with self._flushing:
            if self._pending is None:
                self._pending = self._take()
            flush = self._pending
            if flush is None:
                await self.save(lambda record: record)
                return
            sides, old = dict(self._sides), []
            for good, content in flush.content.items():
                if content:
                    sides[good], replaced = await self._write(sides[good], f"{flush.name}-{good:d}", content)
                    old += replaced
            await self.save(
                lambda record: machine.advanced(
                    record, flush.progress, sides[True].parts, sides[False].parts, flush.usage
                )
            )
            self._sides, self._pending = sides, None
            for part in old:
                await self._shelf.drop_part(part)

    def _take(self) -> _Flush | None:
        if not self._waiting[True] and not self._waiting[False]:
            return None
        good, bad = b"".join(self._waiting[True]), b"".join(self._waiting[False])
        self._waiting = {True: [], False: []}
        self._size = 0
        self.full.clear()
        self._flushes += 1
        name = f"{self.record.epoch:06d}-{self._flushes:08d}"
        return _Flush(name, good, bad, self.progress.copy(), self._usage)

    async def _write(self, side: _Side, name: str, content: bytes) -> tuple[_Side, list[Part]]:
        data = side.tail + content
        part = await self._shelf.write_part(self.record.tenant, side.file, name, data)
        return side.grown(part, data, bool(side.tail)), side.parts[-1:] if side.tail else []
