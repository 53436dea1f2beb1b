"""Metrics of several processes as one: sums that never go back."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from helios.metrics import RouterMetrics
from router.processes.tally import Tally, snapshot


def values(text: bytes) -> dict[str, float]:
    return {
        line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in text.decode().splitlines() if line[0] != "#"
    }


class Process:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.counter = Counter("requests_total", "Requests", ["model"], registry=self.registry)
        self.seconds = Histogram("seconds", "Time", buckets=(1, 2), registry=self.registry)
        self.waiting = Gauge("waiting", "Waiting", registry=self.registry)
        self.up = Gauge("helios_router_worker_up", "Up", ["worker"], registry=self.registry)


def test_counters_and_histograms_are_summed_gauges_are_of_the_living() -> None:
    one, two, tally = Process(), Process(), Tally()
    one.counter.labels("a").inc(2)
    two.counter.labels("a").inc(3)
    two.counter.labels('b"\n\\').inc()
    one.seconds.observe(0.5)
    two.seconds.observe(1.5)
    one.waiting.set(4)
    two.waiting.set(5)
    one.up.labels("w").set(1)
    two.up.labels("w").set(1)
    tally.counted(1, snapshot(one.registry))
    tally.counted(2, snapshot(two.registry))
    for _ in range(2):
        found = values(tally.render())
        assert found['requests_total{model="a"}'] == 5
        assert found[r'requests_total{model="b\"\n\\"}'] == 1
        assert (found['seconds_bucket{le="1.0"}'], found['seconds_bucket{le="+Inf"}'], found["seconds_sum"]) == (
            1,
            2,
            2,
        )
        assert (found["waiting"], found['helios_router_worker_up{worker="w"}']) == (9, 1)
    tally.died(2)
    found = values(tally.render())
    assert (found['requests_total{model="a"}'], found["seconds_count"]) == (5, 2)
    assert found["waiting"] == 4


def test_pairs_that_each_process_knows_are_not_summed() -> None:
    tally = Tally()
    for process, count in ((1, 3), (2, 2)):
        metrics = RouterMetrics()
        metrics.warm_pairs.set(count)
        tally.counted(process, snapshot(metrics.registry))
    assert values(tally.render())["helios_router_warm_pairs"] == 3


def test_one_process_looks_as_it_would_alone() -> None:
    metrics, tally = RouterMetrics(), Tally()
    metrics.requests.labels("/v1/chat/completions", "m", "200").inc()
    metrics.first_byte.another("m").observe(0.2)
    metrics.rss.set_function(lambda: 1.0)
    tally.counted(1, snapshot(metrics.registry))
    assert tally.render() == metrics.render()


@given(st.lists(st.tuples(st.sampled_from(["count", "ask", "die"]), st.integers(0, 2)), max_size=30))
def test_what_was_shown_never_goes_back(steps: list[tuple[str, int]]) -> None:
    tally, shown = Tally(), 0.0
    processes = {number: Process() for number in range(3)}
    numbers = {slot: slot for slot in processes}
    for n, (step, slot) in enumerate(steps):
        if step == "count":
            processes[slot].counter.labels("a").inc()
        elif step == "ask":
            for other, process in processes.items():
                tally.counted(numbers[other], snapshot(process.registry))
            now = values(tally.render()).get('requests_total{model="a"}', 0.0)
            assert now >= shown
            shown = now
        else:
            tally.died(numbers[slot])
            processes[slot], numbers[slot] = Process(), 100 + n
    assert values(tally.render()).get('requests_total{model="a"}', 0.0) >= shown


def test_the_text_is_prometheus_own() -> None:
    process, tally = Process(), Tally()
    process.counter.labels("a").inc()
    tally.counted(1, snapshot(process.registry))
    assert re.search(rb"# TYPE requests_total counter\nrequests_total\{model=\"a\"\} 1\.0\n", tally.render())
