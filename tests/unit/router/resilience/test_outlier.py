"""Outliers: who is much worse than the others, how many may be out, and for how long."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios.config import OutlierSettings, RouterSettings
from helios.metrics import RouterMetrics
from router.resilience.guard import Attempt, Guard, admitted
from router.resilience.latency import LONGEST_S, SHORTEST_S, Latencies
from router.resilience.outcome import Outcome
from router.resilience.outlier import Standing, worst
from router.resilience.resilience import Resilience
from router.workers import Workers, parse_worker

SETTINGS = OutlierSettings(min_requests=10, slow_factor=4, slow_margin_s=1, failure_margin=0.2)


def places(*medians: float | None, failures: tuple[float, ...] = ()) -> list[tuple[int, str]]:
    shares = [*failures, *[0.0] * len(medians)]
    peers = [Standing(m, f, 1.0) for m, f in zip(medians, shares, strict=False)]
    return worst(peers, 1.0, SETTINGS)


@pytest.mark.parametrize(
    ("medians", "found"),
    [
        ((0.5, 0.5, 2.5), [2]),
        ((0.5, 0.5, 1.9), []),  # not four times
        ((0.01, 0.01, 0.5), []),  # no second more
        ((0.5, 9.0), [1]),
        ((9.0, 9.0, 9.0, 9.0), []),  # all of them: that is load
        ((0.5, 0.6, 0.5, 9.0, 20.0), [4, 3]),
        ((5.0,), []),
        ((None, None, 9.0), []),
    ],
)
def test_slow_ones(medians: tuple[float | None, ...], found: list[int]) -> None:
    assert places(*medians) == [(place, "slow") for place in found]


def test_failing_ones_come_before_slow_ones() -> None:
    assert places(0.5, 0.5, 9.0, 0.5, failures=(0, 0, 0, 0.3)) == [(3, "failing"), (2, "slow")]
    assert places(0.5, 0.5, 0.5, failures=(0.5, 0.5, 0.5)) == []


def test_only_who_was_counted_now_is_found() -> None:
    peers = [Standing(0.5, 0, 1.0), Standing(9.0, 0, 0.5), None]
    assert worst(peers, 1.0, SETTINGS) == []


@given(st.lists(st.floats(0.001, 100), min_size=1, max_size=8))
def test_a_worker_is_compared_with_the_others(medians: list[float]) -> None:
    found = {place for place, _ in places(*medians)}
    for place, median in enumerate(medians):
        others = medians[:place] + medians[place + 1 :]
        usual = statistics.median(others) if others else math.inf
        assert (place in found) == (median >= max(4 * usual, usual + 1))


@given(st.lists(st.floats(0.0, 20000), min_size=1, max_size=60), st.floats(0.01, 1))
def test_quantiles_are_right_to_a_bucket(times: list[float], share: float) -> None:
    latencies = Latencies()
    for one in times:
        latencies.add(one)
    exact = min(max(sorted(times)[math.ceil(share * len(times) - 1e-9) - 1], SHORTEST_S), LONGEST_S)
    assert exact * 0.999 <= latencies.quantile(share) <= exact * 2**0.25 * 1.001
    other = Latencies()
    other.absorb(latencies)
    assert (latencies.count, other.count) == (0, len(times))
    other.halve()
    assert other.count <= len(times) / 2


class Scene:
    """Workers of one model, and what they did."""

    def __init__(self, *texts: str, **fields: float) -> None:
        self.now = 100.0
        settings = RouterSettings(outliers=OutlierSettings(**fields))  # type: ignore[arg-type]
        self.resilience = Resilience(settings, RouterMetrics(), lambda: self.now, lambda: 0.0)
        self.workers = Workers([parse_worker(text) for text in texts], lambda: self.now, guard=self.resilience.guard)
        self.guards = [worker.guard for worker in self.workers.all]

    def answers(self, guard: Guard, first_byte_s: float, ok: bool = True, times: int = 10) -> None:
        for _ in range(times):
            attempt = Attempt(guard, self.now, engine=True)
            attempt.heard(self.now + first_byte_s, 200)
            attempt.outcome = Outcome.OK if ok else Outcome.FAILED
            attempt.end()

    def compare(self) -> None:
        self.now += 10
        for model in self.workers.models:
            self.resilience.compare(model, self.workers)

    @property
    def out(self) -> list[int]:
        return [place for place, guard in enumerate(self.guards) if guard.ejected]


def test_a_slow_worker_is_left_out_for_a_time_and_for_longer_when_it_stays_slow() -> None:
    scene = Scene("m=http://a:1", "m=http://b:1", "m=http://c:1", eject_s=30, max_eject_s=50)
    for expected in (30, 50, 50):
        for guard, seconds in zip(scene.guards, (0.2, 0.2, 5), strict=True):
            scene.answers(guard, seconds)
        scene.compare()
        assert scene.out == [2]
        assert [w.url for w in scene.workers.candidates("m", ())] == ["http://a:1", "http://b:1"]
        scene.now += expected - 1
        assert scene.out == [2]
        scene.now += 1
        assert len(scene.workers.candidates("m", ())) == 3
    for _ in range(3):  # it does as well as the others: that is forgotten
        for guard in scene.guards:
            scene.answers(guard, 0.2)
        scene.compare()
    assert scene.guards[2].ejection.count == 0


def test_never_more_than_a_share_is_left_out() -> None:
    scene = Scene(*(f"m=http://h:{port}" for port in range(1, 6)), max_share=0.4)
    for guard, seconds in zip(scene.guards, (0.1, 0.1, 0.1, 6, 7), strict=True):
        scene.answers(guard, seconds)
    scene.compare()
    assert scene.out == [3, 4]
    for guard, seconds in zip(scene.guards, (0.1, 0.1, 9, 6, 7), strict=True):
        scene.answers(guard, seconds)
    scene.compare()
    assert scene.out == [3, 4]


def test_a_share_that_is_less_than_one_worker_leaves_out_none() -> None:
    for texts in (("m=http://a:1",), ("m=http://a:1", "m=http://b:1", "n=http://b:1")):
        scene = Scene(*texts)  # b is all that n has
        for guard, seconds in zip(scene.guards, (0.1, 9), strict=False):
            scene.answers(guard, seconds)
        scene.compare()
        assert scene.out == []


def test_a_failing_worker_is_left_out_before_its_breaker_opens() -> None:
    scene = Scene("m=http://a:1", "m=http://b:1", "m=http://c:1")
    for guard in scene.guards:
        scene.answers(guard, 0.1, times=20)
    for _ in range(4):
        scene.answers(scene.guards[0], 0.1, ok=False, times=3)
        scene.answers(scene.guards[0], 0.1, times=5)
    scene.compare()
    assert scene.out == [0]
    assert admitted([scene.workers.of("m")[0]])  # the least bad there is
