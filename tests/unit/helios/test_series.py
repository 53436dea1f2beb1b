"""The metrics of every request say what prometheus-client's own say."""

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from helios.metrics import LATENCY_S
from helios.series import Counts, Times

SECONDS = st.one_of(st.floats(0, 1000), st.sampled_from(LATENCY_S))
NAMES = st.sampled_from(["a", 'b"\n', ""])


def lines(registry: CollectorRegistry) -> list[str]:
    return generate_latest(registry).decode().splitlines()


@given(st.lists(st.tuples(NAMES, SECONDS), max_size=20))
def test_a_histogram_says_the_same(observed: list[tuple[str, float]]) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    times = Times("seconds", "What it took", "model", LATENCY_S, ours)
    histogram = Histogram("seconds", "What it took", ["model"], buckets=LATENCY_S, registry=theirs)
    for model, seconds in observed:
        times.another(model).observe(seconds)
        histogram.labels(model).observe(seconds)
    assert lines(ours) == [line for line in lines(theirs) if "_created" not in line]


@given(st.lists(st.tuples(NAMES, NAMES, st.floats(0, 1e9)), max_size=20))
def test_a_counter_says_the_same(counted: list[tuple[str, str, float]]) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    counts = Counts("helios_x", "Things", ["model", "result"], ours)
    counter = Counter("helios_x_total", "Things", ["model", "result"], registry=theirs)
    for model, result, amount in counted:
        counts.labels(model, result).inc(amount)
        counter.labels(model, result).inc(amount)
    # When each was made differs, but each says it.
    assert [line.rpartition(" ")[0] if "_created{" in line else line for line in lines(ours)] == [
        line.rpartition(" ")[0] if "_created{" in line else line for line in lines(theirs)
    ]


def test_what_is_folded_is_shown_as_before() -> None:
    registry = CollectorRegistry()
    times = Times("seconds", "What it took", "model", LATENCY_S, registry)
    counts = Counts("helios_x", "Things", ["model"], registry)
    parts, numbers = [times.another("m") for _ in range(3)], [counts.another("m") for _ in range(3)]
    for part, number, seconds in zip(parts, numbers, (0.25, 2.0, 400.0), strict=True):
        part.observe(seconds)
        number.inc(seconds)
    before = lines(registry)
    assert 'seconds_count{model="m"} 3.0' in before
    assert 'helios_x_total{model="m"} 402.25' in before
    times.fold(parts[1], parts[0], "m")
    counts.fold(numbers[1], numbers[0], "m")
    assert lines(registry) == before
