"""Which flights are overtaken, when, and what becomes of them: with a clock of the test's own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio

from helios.errors import IntegrityError, Unavailable
from helios.http.response import Watch
from helios.metrics import MountMetrics
from heliosfs.fetch.flight import SAME_SOURCE, Flight, Flights
from heliosfs.fetch.lanes import SLOW_PAUSE_S, Lane, Lanes
from heliosfs.fetch.pace import SILENT_S, WAITED_S, Pace
from heliosfs.fetch.planner import Limits, Planner
from heliosfs.fetch.tried import Tried
from heliosfs.store.recipe import MAX_CHUNK
from tests.unit.heliosfs.test_planner import recipe_of

BOTH = Limits(True, True, 1 << 30, 4 * MAX_CHUNK)


class Sky:
    """Flights over some sources; ``fly`` moves the clock and lets flights bring bytes."""

    def __init__(self, sources: int, chunks: int = 40) -> None:
        self.now = 100.0
        self.planner = Planner()
        self.planner.add("a", recipe_of([MAX_CHUNK] * chunks))
        self.planner.fill("a", (0, 0))
        named = [cast(Any, SimpleNamespace(name=f"s{n}", latency_s=0.0)) for n in range(sources)]
        self.lanes = Lanes(named, (8, 32), 30.0, MountMetrics(), lambda: self.now)
        self.flights = Flights(self.planner, self.lanes, lambda: self.now)
        self.cut: list[Flight] = []
        self.blob = cast(Any, SimpleNamespace(tried=Tried(), waiters={}))

    def begin(self, *, wanted: int | None = None) -> Flight:
        """A flight of the next job, over the source that would be asked."""
        if wanted is not None:
            self.planner.want("a", [wanted])
        job = self.planner.next(self.now, BOTH)
        assert job is not None
        lane = self.lanes.in_order()[0]
        flight = Flight(job, self.blob, lane, trio.CancelScope(), None, Pace(self.now))
        give_up = lambda: self.cut.append(flight) if flight not in self.cut else None  # noqa: E731
        flight.transfer = cast(Any, SimpleNamespace(watch=Watch(), busy=False, give_up=give_up))
        lane.running += 1
        self.flights.begin(flight)
        return flight

    def end(self, flight: Flight) -> None:
        self.flights.end(flight)
        self.planner.ended(flight.job)
        flight.lane.running -= 1

    def fly(self, seconds: float, **rates: tuple[Flight, float]) -> None:
        for _ in range(round(seconds / 0.1)):
            self.now += 0.1
            for flight, rate in rates.values():
                assert flight.transfer is not None
                flight.transfer.watch.received += int(rate * 0.1)
            self.flights.look(starved=False)

    def lane(self, number: int) -> Lane:
        return self.lanes._lanes[number]


def test_a_silent_flight_is_overtaken_sooner_where_a_read_waits() -> None:
    sky = Sky(2)
    demand, background = sky.begin(wanted=20), sky.begin()
    sky.fly(WAITED_S - 0.15)
    assert not demand.overtaken
    sky.fly(0.3)
    assert demand.overtaken
    assert not background.overtaken
    assert sky.cut == [], "it may still win"
    assert sky.lanes.in_order()[0] is sky.lane(1), "its source comes after the others"
    again = sky.begin()
    assert again.job.demand
    assert again.job.first == demand.job.first
    sky.fly(SILENT_S, again=(again, 50e6))
    assert background.overtaken
    assert sky.cut == [background], "nobody waits for it"
    assert not again.overtaken


def test_a_race_ends_when_the_chunks_are_here() -> None:
    sky = Sky(2)
    slow = sky.begin(wanted=3)
    sky.fly(1.0)
    fast = sky.begin()
    sky.planner.arrived(fast.job, 3)
    sky.end(fast)
    sky.fly(0.1)
    assert sky.cut == [slow]


def test_at_work_on_this_machine_is_not_silent() -> None:
    sky = Sky(2)
    flight = sky.begin(wanted=3)
    assert flight.transfer is not None
    flight.transfer.busy = True
    sky.fly(20.0)
    assert not flight.overtaken


def test_a_slow_flight_is_left_for_a_faster_source_only() -> None:
    sky = Sky(2)
    flight = sky.begin(wanted=3)
    sky.lane(1).link.begin(sky.now)
    sky.lane(1).link.received(sky.now + 1, 1_000_000, 0.0)  # another source, no faster
    sky.lane(1).link.end(sky.now + 1)
    sky.fly(8.0, flight=(flight, 300_000))
    assert not flight.overtaken
    sky = Sky(2)
    flight = sky.begin(wanted=3)
    sky.fly(3.0, flight=(flight, 300_000))
    assert flight.overtaken, "nothing is known of the other one: it is worth a try"


def test_two_dead_sources_do_not_hand_a_job_to_and_fro() -> None:
    sky = Sky(2)
    first = sky.begin(wanted=3)
    sky.fly(1.0)
    assert first.overtaken
    second = sky.begin()
    assert second.lane is sky.lane(1)
    sky.fly(SLOW_PAUSE_S - 1.0)
    assert not second.overtaken, "nobody else is ready"
    sky.fly(20.0)
    assert sum(flight.overtaken for flight in sky.flights._flights) <= 2


def test_the_only_source_is_asked_once_more_by_another_connection() -> None:
    sky = Sky(1)
    stuck = sky.begin(wanted=3)
    sky.fly(SAME_SOURCE * WAITED_S - 0.15)
    assert not stuck.overtaken
    sky.fly(0.3)
    assert stuck.overtaken
    again = sky.begin()
    sky.fly(20.0)
    assert not again.overtaken, "it is dead, and once was enough"
    background = sky.begin()
    sky.fly(0.3, background=(background, 1e6))
    assert again.overtaken, "it is alive after all"


@pytest.mark.parametrize("mbps", [1, 1000])
def test_a_read_does_not_wait_behind_too_much_background(mbps: int) -> None:
    """On a slow link, once it is known for one, the youngest are cut off; on a fast one nothing is."""
    sky = Sky(1)
    filling = [sky.begin() for _ in range(4)]
    sky.fly(1.0, **{str(n): (flight, mbps * 1e6 / 4) for n, flight in enumerate(filling)})
    assert sky.cut == []
    reading = sky.begin(wanted=39)
    sky.fly(0.1, reading=(reading, mbps * 1e6))
    assert sky.cut == (filling[:0:-1] if mbps == 1 else [])
    assert not reading.overtaken


def test_on_probation_a_source_gets_one_call_until_it_went_well() -> None:
    sky = Sky(2)
    flight = sky.begin(wanted=3)
    sky.fly(1.0)
    sky.end(flight)
    sky.now += SLOW_PAUSE_S
    probe = sky.begin()
    assert probe.lane is sky.lane(0), "preferred again"
    assert sky.begin().lane is sky.lane(1), "but one call at a time"
    sky.lanes.worked(probe.lane, probe.pace.started)
    assert sky.lanes.in_order()[0] is sky.lane(0)
    sky.lanes.overtaken(sky.lane(0), "silent")
    sky.lanes.worked(sky.lane(0), probe.pace.started)
    assert sky.lanes.in_order()[0] is sky.lane(1), "what began before says nothing of it now"


def test_a_source_that_sent_wrong_bytes_does_not_take_over_one_that_was_away_does() -> None:
    sky = Sky(2)
    flight = sky.begin(wanted=3)
    sky.blob.tried.failed(3, sky.lane(1), IntegrityError("corrupt"))
    sky.fly(1.0)
    assert not flight.overtaken, "nothing better is to be had there"
    sky = Sky(2)
    flight = sky.begin(wanted=3)
    sky.blob.tried.failed(3, sky.lane(1), Unavailable("away"))
    sky.fly(1.0)
    assert flight.overtaken
    assert not sky.blob.tried.of(3), "so that it is asked"


def test_from_a_reads_deadline_on_no_source_is_asked_twice() -> None:
    sky = Sky(2)
    sky.blob.waiters[3] = [SimpleNamespace(since=sky.now - sky.lanes.deadline_s)]
    flight = sky.begin(wanted=3)
    sky.blob.tried.failed(3, sky.lane(1), Unavailable("away"))
    sky.fly(1.0)
    assert not flight.overtaken
