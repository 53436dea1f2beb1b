"""Which chunks to fetch next. No I/O in here: the caller says what happened and what time it is.

Order:
1. chunks that a READ waits for, first come, first served;
2. chunks ahead of a reader: of a file that is not filled into memory (readahead.py), then of one that is, the reader
   that read last first;
3. the rest of that file, from its start;
4. other files to be filled, by their rank.

1 is *demand*: it asks for what is needed and a little more where that is cheap. 2 to 4 are *background*: neighbouring
chunks are joined into ranges of several MiB, and the bytes in flight are bounded by a budget (budget.py), so that on a
slow link a READ never waits behind more than a moment's worth of background.

A chunk is in at most one open job, however many readers wait for it (single flight).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from heliosfs.fetch.chunks import HAVE, HELD, IN_FLIGHT, MISSING, POOLED, Chunks, Job, Rank
from heliosfs.fetch.readahead import ReadAhead
from heliosfs.store.recipe import Recipe

DEMAND_SLACK: Final = 1 << 20
"""A demand job takes missing neighbours along while it stays within this many bytes: small chunks come in company."""

DEMAND_RANGE: Final = 8 << 20
"""Most bytes of one demand job: a READ of more is split over several, which run side by side."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What may be started now: ``budget`` bounds the bytes in flight, ``range_bytes`` the size of a background job.

    ``memory``: bytes that read-ahead of files that are not filled may take. ``filling``: whether the disk takes
    anything; where not, no file is filled.
    """

    demand: bool
    background: bool
    budget: int
    range_bytes: int
    memory: int = 0
    filling: bool = True


class Planner:
    """Chunk states of all files being read or filled, and what to fetch next."""

    def __init__(self) -> None:
        self._files: dict[str, Chunks] = {}
        self._order: list[str] | None = None
        self._demand: deque[tuple[str, int]] = deque()
        self._holding: set[str] = set()
        self.in_flight = 0
        """Bytes of open jobs that have not arrived."""
        self.background_jobs = 0
        """Open jobs that fill."""
        self.ahead_jobs = 0
        self.demand_jobs = 0
        self.readahead = ReadAhead(self._files)

    # --- files and readers ---

    def add(self, key: str, recipe: Recipe, have: bytes | bytearray | None = None) -> None:
        """Take a file in; ``have`` has one byte a chunk, other than 0 where the chunk is here."""
        states = bytearray(len(recipe))
        local = 0
        for index, flag in enumerate(have or b""):
            if flag:
                states[index] = HAVE
                start, end = recipe.span(index)
                local += end - start
        self._files[key] = Chunks(recipe.ends, states, states.count(MISSING), local)

    def remove(self, key: str) -> None:
        """Drop a file; its open jobs may still end."""
        self.readahead.gone(key)
        del self._files[key]
        self._holding.discard(key)
        self._order = None

    def state(self, key: str, index: int) -> int:
        return self._files[key].states[index]

    def has(self, key: str, offset: int, count: int) -> bool:
        """Whether ``count`` bytes from ``offset`` are here. Threads may ask: it only looks, at one byte a chunk."""
        file = self._files.get(key)
        if file is None:
            return False
        first, last = bisect_right(file.ends, offset), bisect_left(file.ends, offset + count)
        return file.states.count(HAVE, first, last + 1) == last + 1 - first

    def complete(self, key: str) -> bool:
        """Whether every chunk is here."""
        file = self._files[key]
        return file.local == file.size

    def local_bytes(self, key: str) -> int:
        """Bytes of the chunks that are here."""
        return self._files[key].local

    def missing_bytes(self, key: str) -> int:
        """Bytes of the chunks that are not here."""
        return self._files[key].size - self._files[key].local

    def stuck(self, key: str) -> bool:
        """Whether every chunk that is not here is held back."""
        file = self._files[key]
        return bool(file.held) and file.states.count(HAVE) + len(file.held) == len(file.states)

    def held_for(self, key: str, now: float) -> float:
        """Seconds until the first held chunk may be tried again; 0 where none is held."""
        held = self._files[key].held
        return max(0.0, min(held.values()) - now) if held else 0.0

    def fill(self, key: str, rank: Rank | None) -> None:
        """Fetch the whole file in the background, in the order of ranks; None: only what READs ask for."""
        self._files[key].rank = rank
        self._order = None

    def read_at(self, key: str, reader: int, offset: int, end: int) -> None:
        """A reader asked for the bytes from ``offset`` to ``end``: what follows comes first in the background."""
        file = self._files[key]
        file.read_up_to(reader, file.at(end - 1) + 1)
        self.readahead.read(key, reader, offset, end)

    def filled(self, key: str) -> bool:
        """Whether the file is to be fetched whole."""
        return self._files[key].rank is not None

    def reader_left(self, key: str, reader: int) -> None:
        self._files[key].readers.pop(reader, None)
        self.readahead.left(key, reader)

    def want(self, key: str, chunks: Iterable[int]) -> None:
        """A READ waits for these chunks; those that are here or already asked for change nothing."""
        file = self._files[key]
        for index in chunks:
            state = file.states[index]
            if state == HAVE:
                continue
            if state in (HELD, POOLED):  # somebody asks again: that is reason enough to try again; or it went early
                file.set(index, MISSING)
            if state == HELD or index not in file.wanted:  # what was held is in no queue, whoever waited for it before
                file.wanted.add(index)
                self._demand.append((key, index))

    def unwant(self, key: str, chunks: Iterable[int]) -> None:
        """Nobody waits for these chunks any more. A job that is fetching one goes on."""
        if key in self._files:
            self._files[key].wanted.difference_update(chunks)

    def lost(self, key: str, chunks: Iterable[int]) -> None:
        """Chunks that were here are not after all. One that a job is fetching, though it came late from another, stays
        that job's."""
        file = self._files[key]
        for index in chunks:
            if file.states[index] == HAVE:
                coming = any(job.next <= index < job.stop for job in file.jobs)
                file.set(index, IN_FLIGHT if coming else MISSING)

    def waited(self, job: Job) -> bool:
        """Whether a READ waits for something that the job has still to bring."""
        file = self._files.get(job.key)
        return file is not None and any(job.next <= index < job.stop for index in file.wanted)

    def lacks(self, key: str, chunks: range) -> bool:
        """Whether any of the chunks is not here, in a file that is still open."""
        file = self._files.get(key)
        return file is not None and file.states.count(HAVE, chunks.start, chunks.stop) < len(chunks)

    # --- jobs ---

    def next(self, now: float, limits: Limits) -> Job | None:
        """The next job to start, or None; the caller starts it or calls ``ended`` with it."""
        self._release_due(now)
        job = self._next_demand() if limits.demand else None
        if job is None and limits.background:
            job = self._next_ahead(limits)
            if job is None and limits.filling:
                job = self._next_background(limits)
        return job

    def arrived(self, job: Job, index: int, kept: bool = True, pooled: bool = False) -> bool:
        """A chunk of the job is here, verified. With ``kept`` it stays; else it was only handed to who waited, and is
        ``pooled`` if it also stays in memory for a while.

        Chunks of one job arrive in order. Returns whether this is news: a job that was given up may still deliver.
        """
        file = self._files.get(job.key)
        if job.open and file is not None and index >= job.next:
            self._account(job, file.bytes_of(job.next, index + 1))
            job.next = index + 1
        if file is None or file.states[index] == HAVE:
            return False
        if kept:
            file.set(index, HAVE)
        elif file.states[index] == IN_FLIGHT and job.open:
            file.set(index, POOLED if pooled and self.readahead.expects(job.key, index) else MISSING)
        file.wanted.discard(index)
        return True

    def ended(self, job: Job, hold: int | None = None, until: float = 0.0) -> None:
        """The job is over. Chunks that did not arrive are missing again; ``hold`` is left alone until a time.

        Chunks that a READ still waits for are asked for again, a held one when its time has come.
        """
        if not job.open:
            return
        job.open = False
        self._account(job, job.left)
        self._count(job, -1)
        file = self._files.get(job.key)
        if file is None or job not in file.jobs:  # closed meanwhile, and perhaps opened again
            return
        file.jobs.remove(job)
        back = [index for index in range(job.next, job.stop) if file.states[index] == IN_FLIGHT]
        for index in back:
            file.set(index, MISSING)
        if hold is not None and file.states[hold] == MISSING:
            file.set(hold, HELD)
            file.held[hold] = until
            self._holding.add(job.key)
        self._demand.extendleft((job.key, i) for i in reversed(back) if i in file.wanted and i != hold)

    def next_release(self) -> float | None:
        """When the first held chunk may be tried again."""
        return min((until for key in self._holding for until in self._files[key].held.values()), default=None)

    def backlog(self, limit: int) -> int:
        """Chunks of files to be filled that no job has, counted up to about ``limit``."""
        total = 0
        for file in self._files.values():
            if file.rank is not None:
                total += file.todo - len(file.held)
                if total >= limit:
                    break
        return total

    # --- inside ---

    def _next_demand(self) -> Job | None:
        while self._demand:
            key, first = self._demand.popleft()
            file = self._files.get(key)
            if file is None or first not in file.wanted or file.states[first] != MISSING:
                continue
            stop = first + 1
            while stop < len(file.states) and file.states[stop] == MISSING:
                limit = DEMAND_RANGE if stop in file.wanted else DEMAND_SLACK
                if file.bytes_of(first, stop + 1) > limit:
                    break
                stop += 1
            return self._start(key, file, first, stop, demand=True)
        return None

    def _next_ahead(self, limits: Limits) -> Job | None:
        if limits.filling:  # what waited for the disk in memory goes there
            for key, file in self._files.items():
                if file.rank is not None and file.pooled:
                    self.readahead.forget(key)
        found = self.readahead.next(limits.memory, limits.range_bytes, filling=limits.filling)
        if found is None:
            return None
        key, first, stop = found
        file = self._files[key]
        return (
            self._start(key, file, first, stop, ahead=True)
            if self._may_go(file.bytes_of(first, stop), limits)
            else None
        )

    def _next_background(self, limits: Limits) -> Job | None:
        for key, file in self._by_rank():
            first = file.next_missing()
            if first < 0:
                continue
            stop = first + 1
            while (
                stop < len(file.states)
                and file.states[stop] == MISSING
                and file.bytes_of(first, stop + 1) <= limits.range_bytes
            ):
                stop += 1
            return self._start(key, file, first, stop) if self._may_go(file.bytes_of(first, stop), limits) else None
        return None

    def _may_go(self, count: int, limits: Limits) -> bool:
        """Whether a background job of so many bytes may be started.

        One that does not fit waits until it does: cutting it to what is left of the budget would end in many small
        ones. The very first always goes, or nothing would ever move.
        """
        if self.background_jobs or self.ahead_jobs:
            return self.in_flight + count <= limits.budget
        return not self.demand_jobs or self.in_flight < limits.budget

    def _by_rank(self) -> Iterator[tuple[str, Chunks]]:
        if self._order is None:
            ranked = [(file.rank, key) for key, file in self._files.items() if file.rank is not None]
            self._order = [key for _, key in sorted(ranked)]
        for key in self._order:
            if self._files[key].todo:
                yield key, self._files[key]

    def _start(
        self, key: str, file: Chunks, first: int, stop: int, *, demand: bool = False, ahead: bool = False
    ) -> Job:
        for index in range(first, stop):
            file.set(index, IN_FLIGHT)
        job = Job(key, first, stop, demand, file.bytes_of(first, stop), ahead)
        file.jobs.append(job)
        self.in_flight += job.left
        self.readahead.coming += job.left if ahead else 0
        self._count(job, 1)
        return job

    def _count(self, job: Job, change: int) -> None:
        if job.demand:
            self.demand_jobs += change
        elif job.ahead:
            self.ahead_jobs += change
        else:
            self.background_jobs += change

    def _account(self, job: Job, arrived: int) -> None:
        job.left -= arrived
        self.in_flight -= arrived
        if job.ahead:
            self.readahead.coming -= arrived

    def _release_due(self, now: float) -> None:
        for key in list(self._holding):
            file = self._files[key]
            for index in [i for i, until in file.held.items() if until <= now]:
                file.set(index, MISSING)
                if index in file.wanted:
                    self._demand.append((key, index))
            if not file.held:
                self._holding.discard(key)
