"""Which chunks to fetch next. No I/O in here: the caller says what happened and what time it is.

Order:
1. chunks that a READ waits for, first come, first served;
2. chunks ahead of a reader, the reader that read last first;
3. the rest of that file, from its start;
4. other files to be filled, by their rank.

1 is *demand*: it asks for what is needed and a little more where that is cheap. 2 to 4 are *background*: neighbouring
chunks are joined into ranges of several MiB, and the bytes in flight are bounded by a budget (budget.py), so that on a
slow link a READ never waits behind more than a moment's worth of background.

A chunk is in at most one open job, however many readers wait for it (single flight). The chunk states of a file are one
byte each, so "the next missing chunk" is a search in C.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from heliosfs.store.recipe import Recipe

MISSING: Final = 0
IN_FLIGHT: Final = 1
HAVE: Final = 2
HELD: Final = 3
"""Missing, and left alone for a while because fetching it failed."""

DEMAND_SLACK: Final = 1 << 20
"""A demand job takes missing neighbours along while it stays within this many bytes: small chunks come in company."""

DEMAND_RANGE: Final = 8 << 20
"""Most bytes of one demand job: a READ of more is split over several, which run side by side."""

AHEAD: Final = 64 << 20
"""Every reader gets this many bytes ahead of it before any gets more."""

READERS: Final = 8
"""Readers of one file that count, the latest ones."""

Rank = tuple[int, int]
"""Order among files to be filled: a class (0 is the first), then a number within it, the lower the earlier."""


@dataclass(slots=True, eq=False)
class Job:
    """Consecutive chunks to be fetched in order; ``next`` is the first that has not arrived, ``left`` bytes to come."""

    key: str
    first: int
    stop: int
    demand: bool
    left: int
    next: int = field(init=False)
    open: bool = True

    def __post_init__(self) -> None:
        self.next = self.first


@dataclass(frozen=True, slots=True)
class Limits:
    """What may be started now: ``budget`` bounds the bytes in flight, ``range_bytes`` the size of a background job."""

    demand: bool
    background: bool
    budget: int
    range_bytes: int


@dataclass(slots=True)
class _File:
    ends: array[int]
    states: bytearray
    todo: int  # chunks that are neither HAVE nor IN_FLIGHT
    local: int  # bytes of the chunks that are HAVE
    wanted: set[int] = field(default_factory=set)
    held: dict[int, float] = field(default_factory=dict)
    readers: OrderedDict[int, int] = field(default_factory=OrderedDict)
    rank: Rank | None = None
    jobs: list[Job] = field(default_factory=list)

    @property
    def size(self) -> int:
        return self.ends[-1] if self.ends else 0

    def bytes_of(self, first: int, stop: int) -> int:
        return self.ends[stop - 1] - (self.ends[first - 1] if first else 0)


class Planner:
    """Chunk states of all files being read or filled, and what to fetch next."""

    def __init__(self) -> None:
        self._files: dict[str, _File] = {}
        self._order: list[str] | None = None
        self._demand: deque[tuple[str, int]] = deque()
        self._holding: set[str] = set()
        self.in_flight = 0
        """Bytes of open jobs that have not arrived."""
        self.background_jobs = 0
        self.demand_jobs = 0

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
        self._files[key] = _File(recipe.ends, states, states.count(MISSING), local)

    def remove(self, key: str) -> None:
        """Drop a file; its open jobs may still end."""
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

    def read_at(self, key: str, reader: int, after: int) -> None:
        """A reader has read up to chunk ``after`` (not including it): what follows comes first in the background."""
        readers = self._files[key].readers
        readers[reader] = after
        readers.move_to_end(reader)
        if len(readers) > READERS:
            readers.popitem(last=False)

    def reader_left(self, key: str, reader: int) -> None:
        self._files[key].readers.pop(reader, None)

    def want(self, key: str, chunks: Iterable[int]) -> None:
        """A READ waits for these chunks; those that are here or already asked for change nothing."""
        file = self._files[key]
        for index in chunks:
            state = file.states[index]
            if state == HAVE:
                continue
            if state == HELD:  # somebody asks again: that is reason enough to try again
                self._set(file, index, MISSING)
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
                self._set(file, index, IN_FLIGHT if coming else MISSING)

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
            job = self._next_background(limits)
        return job

    def arrived(self, job: Job, index: int, kept: bool = True) -> bool:
        """A chunk of the job is here, verified. With ``kept`` it stays; else it was only handed to who waited.

        Chunks of one job arrive in order. Returns whether this is news: a job that was given up may still deliver.
        """
        file = self._files.get(job.key)
        if job.open and file is not None and index >= job.next:
            self._account(job, file.bytes_of(job.next, index + 1))
            job.next = index + 1
        if file is None or file.states[index] == HAVE:
            return False
        if kept:
            self._set(file, index, HAVE)
        elif file.states[index] == IN_FLIGHT and job.open:
            self._set(file, index, MISSING)
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
        if job.demand:
            self.demand_jobs -= 1
        else:
            self.background_jobs -= 1
        file = self._files.get(job.key)
        if file is None or job not in file.jobs:  # closed meanwhile, and perhaps opened again
            return
        file.jobs.remove(job)
        back = [index for index in range(job.next, job.stop) if file.states[index] == IN_FLIGHT]
        for index in back:
            self._set(file, index, MISSING)
        if hold is not None and file.states[hold] == MISSING:
            self._set(file, hold, HELD)
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

    def _next_background(self, limits: Limits) -> Job | None:
        for key, file in self._by_rank():
            first = _find(file)
            if first < 0:
                continue
            stop = first + 1
            while (
                stop < len(file.states)
                and file.states[stop] == MISSING
                and file.bytes_of(first, stop + 1) <= limits.range_bytes
            ):
                stop += 1
            # A job that does not fit waits until it does: cutting it to what is left of the budget would end in many
            # small ones. The very first always goes, or nothing would ever move.
            if self.background_jobs and self.in_flight + file.bytes_of(first, stop) > limits.budget:
                return None
            if not self.background_jobs and self.demand_jobs and self.in_flight >= limits.budget:
                return None
            return self._start(key, file, first, stop, demand=False)
        return None

    def _by_rank(self) -> Iterator[tuple[str, _File]]:
        if self._order is None:
            ranked = [(file.rank, key) for key, file in self._files.items() if file.rank is not None]
            self._order = [key for _, key in sorted(ranked)]
        for key in self._order:
            if self._files[key].todo:
                yield key, self._files[key]

    def _start(self, key: str, file: _File, first: int, stop: int, *, demand: bool) -> Job:
        for index in range(first, stop):
            self._set(file, index, IN_FLIGHT)
        job = Job(key, first, stop, demand, file.bytes_of(first, stop))
        file.jobs.append(job)
        self.in_flight += job.left
        if demand:
            self.demand_jobs += 1
        else:
            self.background_jobs += 1
        return job

    def _account(self, job: Job, arrived: int) -> None:
        job.left -= arrived
        self.in_flight -= arrived

    def _set(self, file: _File, index: int, state: int) -> None:
        before = file.states[index]
        file.todo += (state in (MISSING, HELD)) - (before in (MISSING, HELD))
        if before == HELD:
            del file.held[index]
        file.local += file.bytes_of(index, index + 1) * ((state == HAVE) - (before == HAVE))
        file.states[index] = state

    def _release_due(self, now: float) -> None:
        for key in list(self._holding):
            file = self._files[key]
            for index in [i for i, until in file.held.items() if until <= now]:
                self._set(file, index, MISSING)
                if index in file.wanted:
                    self._demand.append((key, index))
            if not file.held:
                self._holding.discard(key)


def _find(file: _File) -> int:
    """The file's next missing chunk in the background's order, or -1."""
    positions = list(reversed(file.readers.values()))
    for position in positions:
        if position < len(file.states):
            start = file.ends[position - 1] if position else 0
            found = file.states.find(MISSING, position, bisect_left(file.ends, start + AHEAD) + 1)
            if found >= 0:
                return found
    if positions:
        found = file.states.find(MISSING, positions[0])
        if found >= 0:
            return found
    return file.states.find(MISSING)
