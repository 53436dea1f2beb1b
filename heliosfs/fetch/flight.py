"""Attempts of jobs, and leaving behind those that do not get on.

A job is fetched by one *flight* at a time: one transfer from one source. A flight that is silent or slow while another
source is ready is *overtaken*: for the planner its job has ended, so that what is missing is asked for elsewhere. Where
a READ waits the flight still races: the first verified chunk counts, whoever brings it. Else it is cut off at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import trio

from heliosfs.fetch.blob import Blob
from heliosfs.fetch.chunks import Job
from heliosfs.fetch.lanes import Lane, Lanes
from heliosfs.fetch.pace import UNKNOWN_RATE, Pace, patience_s
from heliosfs.fetch.planner import Planner
from heliosfs.fetch.transfer import Transfer
from heliosfs.tiers.policy import Reservation

TICK_S: Final = 0.1
"""Flights are looked at this often, in seconds."""

RACERS: Final = 4
"""Most overtaken flights that still race; each holds a buffer and a connection."""

SAME_SOURCE: Final = 3.0
"""Where no other source is ready, a flight that a READ waits for is overtaken by another connection of its own source
when it was silent for so many times longer..."""

ALIVE_S: Final = 0.5
"""...and others of that source got on a moment ago, in seconds; or else one such flight shows whether it is alive."""

QUEUE_S: Final = 0.5
"""When a READ waits and this much is on its way in the background, in seconds of the link, the youngest
are cut off: the link is slower than was thought."""


@dataclass(slots=True, eq=False)
class Flight:
    """One attempt of a job at one source. ``over``: its thread ended, or was given up."""

    job: Job
    blob: Blob
    lane: Lane
    scope: trio.CancelScope
    loan: Reservation | None
    pace: Pace
    transfer: Transfer | None = None
    over: bool = False
    overtaken: bool = False
    abandoned: bool = False
    """Its thread may hang at the disk."""


@dataclass(slots=True, eq=False)
class Flights:
    """All flights under way. Its methods run on the trio loop and do not wait."""

    planner: Planner
    lanes: Lanes
    clock: Callable[[], float]
    _flights: list[Flight] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self._flights)

    def begin(self, flight: Flight) -> None:
        flight.lane.link.begin(self.clock())
        self._flights.append(flight)

    def end(self, flight: Flight) -> None:
        flight.over = True
        self._measure(flight)
        self._flights.remove(flight)
        flight.lane.link.end(self.clock())

    def arrived(self, flight: Flight) -> None:
        """A chunk of the flight arrived."""
        if not flight.over:
            self._measure(flight)

    def give_up(self, blob: Blob) -> None:
        """The disk of the blob hangs: no flight of it is waited for."""
        for flight in self._flights:
            if flight.blob is blob:
                flight.overtaken = flight.abandoned = True
                self.planner.ended(flight.job)
                flight.scope.cancel()

    def look(self, *, starved: bool) -> None:
        """Overtake what does not get on; ``starved``: there is no buffer for another job."""
        now = self.clock()
        for flight in self._flights:
            self._measure(flight)
        for lane in {flight.lane for flight in self._flights}:
            lane.width.look(now, lane.link.rate, lane.used >= lane.width.count)
        racing = [flight for flight in self._flights if not flight.overtaken]
        for flight in sorted(racing, key=lambda flight: not self.planner.waited(flight.job)):  # READs first
            why = self._why(flight, now)
            if why is not None:
                self._overtake(flight, why, now)
        self._make_way()
        self._end_races(starved)

    def _measure(self, flight: Flight) -> None:
        if flight.transfer is None:
            return
        now, lane = self.clock(), flight.lane
        new = flight.pace.look(now, flight.transfer.watch.received, flight.transfer.busy)
        if new:
            lane.link.received(now, new, lane.source.latency_s)

    def _why(self, flight: Flight, now: float) -> str | None:
        """Why the flight is to be overtaken, or None. ``stuck`` says nothing of its source as a whole."""
        lane, pace = flight.lane, flight.pace
        waited = self.planner.waited(flight.job)
        patience = patience_s(waited, lane.source.latency_s, self.lanes.deadline_s)
        other = self._instead(flight, now)
        if other is None:
            mine = [each for each in self._flights if each.lane is lane]
            worth = any(now - each.pace.since < ALIVE_S for each in mine) or not any(each.overtaken for each in mine)
            stuck = waited and worth and lane.free > 0 and pace.silent(now, SAME_SOURCE * patience)
            return "stuck" if stuck else None
        if pace.silent(now, patience):
            return "silent"
        share = sum(each.lane is lane for each in self._flights)
        return "slow" if pace.slow((other.link.rate or UNKNOWN_RATE) / share) else None

    def _instead(self, flight: Flight, now: float) -> Lane | None:
        """A source that is ready to take over. One that failed to bring the chunk before is asked again if that may
        have passed, though not for ever: from a READ's deadline on the flight is waited for, and then it is told."""
        blob, index = flight.blob, flight.job.next
        late = any(now - waiter.since >= self.lanes.deadline_s for waiter in blob.waiters.get(index, ()))
        return self.lanes.instead_of(flight.lane, blob.tried.of(index) if late else blob.tried.for_good(index))

    def _overtake(self, flight: Flight, why: str, now: float) -> None:
        waited = self.planner.waited(flight.job)
        tried, index = flight.blob.tried, flight.job.next
        if self._instead(flight, now) in tried.of(index):
            tried.again(index)
        flight.overtaken = True
        self.planner.ended(flight.job)
        self.lanes.overtaken(flight.lane, why, behind=why != "stuck")
        if not waited:
            self._cut(flight)

    def _make_way(self) -> None:
        """Cut off background that a job a READ waits for would wait behind for too long."""
        for lane in {flight.lane for flight in self._flights if self.planner.waited(flight.job)}:
            rate = lane.link.rate if lane.link.settled else 0.0
            mine = [f for f in self._flights if f.lane is lane and not f.overtaken and not self.planner.waited(f.job)]
            while rate and len(mine) > 1 and sum(flight.job.left for flight in mine) > QUEUE_S * rate:
                youngest = mine.pop()
                youngest.overtaken = True
                self.planner.ended(youngest.job)
                self._cut(youngest)

    def _end_races(self, starved: bool) -> None:
        """Cut off overtaken flights whose chunks are here, and the oldest ones where they are too many."""
        racers = [flight for flight in self._flights if flight.overtaken]
        for flight in racers[: len(racers) if starved else max(0, len(racers) - RACERS)]:
            self._cut(flight)
        for flight in racers:
            job = flight.job
            if not self.planner.lacks(job.key, range(job.next, job.stop)):
                self._cut(flight)

    @staticmethod
    def _cut(flight: Flight) -> None:
        if flight.transfer is not None:
            flight.transfer.give_up()
            flight.transfer.watch.cut()
