"""The planner: demand first, each chunk in one job, the budget kept, nothing forgotten."""

from __future__ import annotations

from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from heliosfs.fetch.chunks import AHEAD, HAVE, HELD, IN_FLIGHT, MISSING, POOLED, Job
from heliosfs.fetch.planner import DEMAND_RANGE, Limits, Planner
from heliosfs.store.recipe import MAX_CHUNK, Recipe

MIB = 1 << 20
BOTH = Limits(True, True, 64 * MIB, 16 * MIB)
DEMAND = Limits(True, False, 0, 0)


def recipe_of(lengths: list[int], name: str = "a") -> Recipe:
    return Recipe.build(name * 64, ((blake3(b"%d" % i).digest(), length) for i, length in enumerate(lengths)))


def planner_with(lengths: list[int], fill: bool = True) -> Planner:
    planner = Planner()
    planner.add("a", recipe_of(lengths))
    if fill:
        planner.fill("a", (0, 0))
    return planner


def span(job: Job | None) -> tuple[int, int, bool]:
    assert job is not None
    return job.first, job.stop, job.demand


def finish(planner: Planner, job: Job | None) -> None:
    assert job is not None
    for index in range(job.first, job.stop):
        planner.arrived(job, index)
    planner.ended(job)


def test_demand_asks_for_its_own_chunk_and_comes_before_the_background() -> None:
    planner = planner_with([MAX_CHUNK] * 100)
    planner.want("a", [57])
    assert span(planner.next(0, BOTH)) == (57, 58, True)
    assert span(planner.next(0, BOTH)) == (0, 4, False)


def test_background_runs_ahead_of_the_reader_then_fills_the_rest() -> None:
    planner = planner_with([MAX_CHUNK] * 12)
    planner.read_at("a", 1, 4 * MAX_CHUNK, 5 * MAX_CHUNK)
    first = planner.next(0, BOTH)
    assert span(first) == (5, 9, False)
    second = planner.next(0, BOTH)
    assert span(second) == (9, 12, False)
    assert span(planner.next(0, BOTH)) == (0, 4, False)


def test_every_reader_gets_its_share_ahead_before_any_gets_more() -> None:
    chunks = 3 * AHEAD // MAX_CHUNK
    planner = planner_with([MAX_CHUNK] * chunks)
    planner.read_at("a", 1, 0, 2 * AHEAD)
    planner.read_at("a", 2, 0, 1)
    seen = []
    for _ in range(2 * AHEAD // (16 * MIB) + 1):
        job = planner.next(0, BOTH)
        assert job is not None
        seen.append(job.first)
        finish(planner, job)
    ahead = AHEAD // MAX_CHUNK
    assert all(first <= ahead for first in seen[:4])
    assert min(first for first in seen[4:-1]) == 2 * ahead


def test_small_chunks_come_in_company() -> None:
    planner = planner_with([50_000] + [300_000] * 10, fill=False)
    planner.want("a", [0])
    assert span(planner.next(0, DEMAND)) == (0, 4, True)


def test_a_large_read_is_split() -> None:
    planner = planner_with([MAX_CHUNK] * 10, fill=False)
    planner.want("a", range(10))
    jobs = []
    while (job := planner.next(0, DEMAND)) is not None:
        jobs.append(span(job))
    step = DEMAND_RANGE // MAX_CHUNK
    assert jobs == [(i, i + step, True) for i in range(0, 10, step)]


def test_files_are_filled_by_rank() -> None:
    planner = Planner()
    for name, rank in (("a", (3, 1)), ("b", (1, 5)), ("c", (0, -7)), ("d", None)):
        planner.add(name, recipe_of([MAX_CHUNK] * 2, name))
        planner.fill(name, rank)
    keys = []
    while (job := planner.next(0, BOTH)) is not None:
        keys.append(job.key)
    assert keys == ["c", "b", "a"]


def test_a_failed_chunk_is_held_and_the_rest_goes_on() -> None:
    planner = planner_with([MAX_CHUNK] * 6)
    planner.want("a", [2])
    job = planner.next(0, BOTH)
    assert job is not None
    planner.ended(job, hold=2, until=10.0)
    assert planner.state("a", 2) == HELD
    assert planner.next_release() == 10.0
    assert span(planner.next(1, BOTH)) == (0, 2, False)
    assert span(planner.next(1, BOTH)) == (3, 6, False)
    assert planner.next(9.9, BOTH) is None
    assert span(planner.next(10.0, BOTH)) == (2, 3, True), "its READ still waits"


def test_a_new_read_does_not_wait_for_a_held_chunk() -> None:
    planner = planner_with([MAX_CHUNK] * 2, fill=False)
    planner.want("a", [0])
    job = planner.next(0, BOTH)
    assert job is not None
    planner.ended(job, hold=0, until=30.0)
    planner.unwant("a", [0])
    planner.want("a", [0])
    assert span(planner.next(0.1, BOTH)) == (0, 1, True)


def test_what_nobody_waits_for_any_more_is_not_asked_for() -> None:
    planner = planner_with([MAX_CHUNK] * 4, fill=False)
    planner.want("a", [1, 3])
    planner.unwant("a", [1])
    assert span(planner.next(0, DEMAND)) == (3, 4, True)
    assert planner.next(0, DEMAND) is None


def test_what_did_not_arrive_is_asked_for_again() -> None:
    planner = planner_with([MAX_CHUNK] * 4, fill=False)
    for index in (2, 0):
        planner.want("a", [index])
        job = planner.next(0, DEMAND)
        assert job is not None
        planner.ended(job)
        assert span(planner.next(0, DEMAND)) == (index, index + 1, True)


def test_a_given_up_job_may_still_deliver() -> None:
    planner = planner_with([MAX_CHUNK] * 2, fill=False)
    planner.want("a", [0, 1])
    first = planner.next(0, DEMAND)
    assert first is not None
    planner.ended(first)
    second = planner.next(0, DEMAND)
    assert second is not None
    assert planner.arrived(first, 0), "the late one is news"
    assert not planner.arrived(second, 0), "the other then is not"
    assert planner.arrived(second, 1)
    planner.ended(second)
    assert planner.complete("a")
    assert planner.in_flight == 0


def test_an_overtaken_job_is_asked_for_elsewhere_and_may_still_win() -> None:
    """What it did not bring comes first in the queue again; whoever brings a chunk first, it counts once."""
    planner = planner_with([MAX_CHUNK] * 4)
    planner.want("a", [1])
    slow = planner.next(0, BOTH)
    assert slow is not None
    assert planner.waited(slow)
    planner.want("a", [3])
    planner.ended(slow)
    assert planner.lacks("a", range(slow.next, slow.stop)), "so the slow one still races"
    other = planner.next(0, BOTH)
    assert span(other) == (1, 2, True)
    assert planner.arrived(slow, 1), "the slow one wins"
    assert not planner.lacks("a", range(1, 2)), "and the race is over"
    assert other is not None
    assert not planner.waited(other)
    assert not planner.arrived(other, 1)
    planner.ended(other)
    assert planner.in_flight == 0


def test_a_job_of_a_closed_file_is_waited_for_by_nobody() -> None:
    planner = planner_with([MAX_CHUNK])
    planner.want("a", [0])
    job = planner.next(0, BOTH)
    assert job is not None
    planner.remove("a")
    assert not planner.waited(job)
    assert not planner.lacks("a", range(1))


def test_what_was_only_handed_on_is_still_missing() -> None:
    planner = planner_with([MAX_CHUNK], fill=False)
    planner.want("a", [0])
    job = planner.next(0, DEMAND)
    assert job is not None
    assert planner.arrived(job, 0, kept=False)
    planner.ended(job)
    assert planner.state("a", 0) == MISSING
    assert planner.next(0, DEMAND) is None, "nobody waits any more"


def test_a_lost_chunk_is_fetched_again() -> None:
    planner = planner_with([MAX_CHUNK] * 2)
    finish(planner, planner.next(0, BOTH))
    assert planner.complete("a")
    planner.lost("a", [1])
    assert planner.missing_bytes("a") == MAX_CHUNK
    assert span(planner.next(0, BOTH)) == (1, 2, False)


lengths_of = st.lists(st.sampled_from([1000, 200_000, MIB, 3 * MIB, MAX_CHUNK]), min_size=1, max_size=30)


@settings(deadline=None)
@given(st.lists(lengths_of, min_size=1, max_size=3), st.data())
def test_everything_is_fetched_once(files: list[list[int]], draw: st.DataObject) -> None:
    """With no failure, filling fetches every chunk exactly once whatever is read meanwhile."""
    planner = Planner()
    for number, lengths in enumerate(files):
        planner.add(str(number), recipe_of(lengths))
        planner.fill(str(number), (3, number))
    fetched: list[tuple[str, int]] = []
    for _ in range(400):
        if draw.draw(st.booleans()):
            key = draw.draw(st.integers(0, len(files) - 1))
            index = draw.draw(st.integers(0, len(files[key]) - 1))
            planner.want(str(key), [index])
            end = sum(files[key][: index + 1])
            planner.read_at(str(key), draw.draw(st.integers(0, 3)), end - files[key][index], end)
        job = planner.next(0, Limits(True, True, draw.draw(st.integers(0, 40 * MIB)), 8 * MIB))
        if job is None:
            break
        fetched += [(job.key, index) for index in range(job.first, job.stop)]
        finish(planner, job)
    assert sorted(fetched) == sorted((str(n), i) for n, lengths in enumerate(files) for i in range(len(lengths)))


def test_a_held_chunk_that_somebody_waits_for_is_tried_when_another_read_asks() -> None:
    planner = planner_with([MAX_CHUNK], fill=False)
    planner.want("a", [0])
    job = planner.next(0, DEMAND)
    assert job is not None
    planner.ended(job, hold=0, until=30)
    assert planner.next(0, DEMAND) is None
    planner.want("a", [0])
    assert planner.next(0, DEMAND) is not None, "it is in no queue: nobody else would start it"


def test_a_chunk_lost_while_a_job_fetches_it_is_not_fetched_twice() -> None:
    planner = planner_with([MAX_CHUNK], fill=False)
    planner.want("a", [0])
    given_up = planner.next(0, DEMAND)
    assert given_up is not None
    planner.ended(given_up)
    job = planner.next(0, DEMAND)
    assert job is not None
    assert planner.arrived(given_up, 0)
    planner.lost("a", [0])
    planner.want("a", [0])
    assert planner.next(0, DEMAND) is None
    assert planner.arrived(job, 0)


class Traffic(RuleBasedStateMachine):
    """READs come and go, jobs deliver, fail, are given up and deliver late, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.planner = Planner()
        self.lengths: dict[str, list[int]] = {}
        self.open: list[Job] = []
        self.zombies: list[tuple[Job, int]] = []
        self.wanted: set[tuple[str, int]] = set()
        self.now = 0.0

    @initialize(files=st.lists(lengths_of, min_size=1, max_size=3))
    def start(self, files: list[list[int]]) -> None:
        for number, lengths in enumerate(files):
            self.add(str(number), lengths)

    def add(self, key: str, lengths: list[int]) -> None:
        self.lengths[key] = lengths
        self.planner.add(key, recipe_of(lengths))

    def chunk(self, draw: st.DataObject) -> tuple[str, int]:
        key = draw.draw(st.sampled_from(sorted(self.lengths)))
        return key, draw.draw(st.integers(0, len(self.lengths[key]) - 1))

    @rule(draw=st.data())
    def want(self, draw: st.DataObject) -> None:
        for _ in range(draw.draw(st.integers(1, 4))):
            key, index = self.chunk(draw)
            self.planner.want(key, [index])
            end = sum(self.lengths[key][: index + 1])
            self.planner.read_at(key, index % 5, end - self.lengths[key][index], end)
            if self.planner.state(key, index) != HAVE:
                self.wanted.add((key, index))

    @rule(draw=st.data())
    def unwant(self, draw: st.DataObject) -> None:
        key, index = self.chunk(draw)
        self.planner.unwant(key, [index])
        self.wanted.discard((key, index))

    @rule(draw=st.data(), rank=st.one_of(st.none(), st.tuples(st.integers(0, 3), st.integers(0, 9))))
    def fill(self, draw: st.DataObject, rank: tuple[int, int] | None) -> None:
        self.planner.fill(self.chunk(draw)[0], rank)

    @rule(
        demand=st.sampled_from([True, True, True, False]),
        background=st.booleans(),
        budget=st.integers(0, 40 * MIB),
        memory=st.sampled_from([0, MIB, 10 * MIB, 30 * MIB]),
        filling=st.sampled_from([True, True, False]),
    )
    def next(self, demand: bool, background: bool, budget: int, memory: int, filling: bool) -> None:
        before = self.planner.in_flight
        waiting = [(k, i) for k, i in self.wanted if self.planner.state(k, i) == MISSING]
        job = self.planner.next(self.now, Limits(demand, background, budget, 8 * MIB, memory, filling))
        if job is None:
            assert not (demand and waiting), "a READ waits and may be served"
            return
        if job.ahead:
            assert self.planner.readahead.used <= memory
            assert not (filling and self.planner.filled(job.key))
        else:
            assert job.demand or filling
        assert job.demand or not (demand and waiting), "demand comes first"
        assert demand if job.demand else background
        taken = {(j.key, i) for j in self.open for i in range(j.next, j.stop)}
        assert not taken & {(job.key, i) for i in range(job.first, job.stop)}, "single flight"
        background_open = [j for j in self.open if not j.demand]
        if not job.demand:
            assert job.left <= max(8 * MIB, MAX_CHUNK)
            assert before + job.left <= budget or not background_open, "the budget is kept"
        self.open.append(job)

    @precondition(lambda self: self.open)
    @rule(draw=st.data(), kept=st.booleans(), pooled=st.booleans())
    def arrive(self, draw: st.DataObject, kept: bool, pooled: bool) -> None:
        job = draw.draw(st.sampled_from(self.open))
        if job.next < job.stop:
            index = job.next
            self.planner.arrived(job, index, kept, pooled)
            self.wanted.discard((job.key, index))

    @precondition(lambda self: self.open)
    @rule(draw=st.data(), failed=st.booleans(), pause=st.floats(0, 30))
    def end(self, draw: st.DataObject, failed: bool, pause: float) -> None:
        job = draw.draw(st.sampled_from(self.open))
        self.open.remove(job)
        self.zombies += [(job, index) for index in range(job.next, job.stop)]
        if failed and job.next < job.stop:
            self.planner.ended(job, hold=job.next, until=self.now + pause)
        else:
            self.planner.ended(job)

    @precondition(lambda self: self.open)
    @rule(draw=st.data())
    def overtake(self, draw: st.DataObject) -> None:
        """The job has ended for the planner, its transfer goes on: what a READ waits for may be started again at once,
        ahead of everything else, once."""
        job = draw.draw(st.sampled_from(self.open))
        self.open.remove(job)
        missing = range(job.next, job.stop)
        self.zombies += [(job, index) for index in missing]
        lacked = {i for i in missing if self.planner.state(job.key, i) == IN_FLIGHT}
        self.planner.ended(job)
        waiting = sorted(i for i in lacked if (job.key, i) in self.wanted)
        again = self.planner.next(self.now, DEMAND)
        if waiting:
            assert again is not None
            assert (again.key, again.first) == (job.key, waiting[0])
        if again is not None:
            self.open.append(again)

    @precondition(lambda self: self.zombies)
    @rule(draw=st.data(), kept=st.booleans(), pooled=st.booleans())
    def arrive_late(self, draw: st.DataObject, kept: bool, pooled: bool) -> None:
        job, index = draw.draw(st.sampled_from(self.zombies))
        self.planner.arrived(job, index, kept, pooled)
        self.wanted.discard((job.key, index))

    @rule(draw=st.data())
    def leave(self, draw: st.DataObject) -> None:
        self.planner.reader_left(self.chunk(draw)[0], draw.draw(st.integers(0, 4)))

    @rule(passed=st.floats(0, 40))
    def wait(self, passed: float) -> None:
        self.now += passed

    @rule(draw=st.data())
    def lose(self, draw: st.DataObject) -> None:
        key, index = self.chunk(draw)
        self.planner.lost(key, [index])

    @invariant()
    def books_balance(self) -> None:
        assert self.planner.in_flight == sum(job.left for job in self.open)
        assert self.planner.demand_jobs == sum(job.demand for job in self.open)
        assert self.planner.background_jobs == sum(not job.demand and not job.ahead for job in self.open)
        assert self.planner.ahead_jobs == sum(job.ahead for job in self.open)
        assert self.planner.readahead.coming == sum(job.left for job in self.open if job.ahead)
        pooled = {
            (key, i)
            for key, lengths in self.lengths.items()
            for i in range(len(lengths))
            if self.planner.state(key, i) == POOLED
        }
        assert all(self.planner.readahead.expects(key, i) for key, i in pooled), "what is in memory is waited for"
        size = sum(self.lengths[key][i] for key, i in pooled)
        assert self.planner.readahead.used == size + self.planner.readahead.coming
        for job in self.open:
            assert self.planner.waited(job) == any((job.key, i) in self.wanted for i in range(job.next, job.stop))
        for key, lengths in self.lengths.items():
            states = [self.planner.state(key, i) for i in range(len(lengths))]
            here = sum(length for length, state in zip(lengths, states, strict=True) if state == HAVE)
            assert self.planner.local_bytes(key) == here
            assert self.planner.complete(key) == (here == sum(lengths))
            in_jobs = {i for job in self.open if job.key == key for i in range(job.next, job.stop)}
            assert self.planner.lacks(key, range(len(lengths))) == (set(states) != {HAVE})
            assert {i for i, state in enumerate(states) if state == IN_FLIGHT} <= in_jobs

    def teardown(self) -> None:
        """Nothing is forgotten: once all goes well, every READ still waiting is served."""
        for job in list(self.open):
            finish(self.planner, job)
            self.wanted -= {(job.key, i) for i in range(job.first, job.stop)}
        for _ in range(200):
            job = self.planner.next(self.now + 100, DEMAND)
            if job is None:
                break
            finish(self.planner, job)
        assert all(self.planner.state(key, i) == HAVE for key, i in self.wanted)


Traffic.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestTraffic = Traffic.TestCase
