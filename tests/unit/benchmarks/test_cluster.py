"""The simulated cluster: what it counts, by hand; and that the others scale as is written of them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.autoscaling import FORECAST, HPA, KUBEAI, REACTIVE, row, scaler
from benchmarks.cluster.bound import fewest, reactive
from benchmarks.cluster.nodes import Nodes, start_s
from benchmarks.cluster.oracle import least
from benchmarks.cluster.scalers import Hpa, KubeAi
from benchmarks.cluster.site import Model, Site
from benchmarks.cluster.traffic import DAY, KINDS, NOISE_S, WEEK, ModelSpec, Stream, planned, traffic

SPEC = ModelSpec("org/m", gpus=2, size=16e9, service_s=10.0, slots=2)
CACHED_S, FETCHED_S = start_s(SPEC, True), start_s(SPEC, False)


def stream(*requests: tuple[float, float]) -> Stream:
    at, takes = zip(*requests, strict=True) if requests else ((), ())
    return Stream(SPEC, np.array(at, dtype=float), np.array(takes, dtype=float))


class Fixed:
    """Scales when it is told of a request, and at times that are given."""

    interval_s = 1.0

    def __init__(self, wakes: int, **at: int) -> None:
        self._wakes, self._at = wakes, {float(when[1:]): number for when, number in at.items()}

    def look(self, now: float, site: Site) -> None:
        if now in self._at:
            site.scale(now, site.models[0], self._at[now])

    def held(self, now: float, site: Site, model: Model) -> None:
        site.scale(now, model, self._wakes)


def test_a_request_that_wakes_a_model_waits_for_the_start() -> None:
    site = Site([stream((100.0, 5.0), (110.0, 5.0), (500.0, 5.0))], 1, 0.0, 1000.0)
    site.run(Fixed(1))
    assert site.waits == pytest.approx([FETCHED_S, FETCHED_S - 10])
    assert (site.requests, site.hit, site.missed, site.starts) == (3, 2, 2, 1)
    assert site.replica_s == pytest.approx(900.0)
    assert site.gpu_s == pytest.approx(1800.0)


def test_a_request_that_waits_for_a_slot_was_not_hit_by_a_start() -> None:
    site = Site([stream((300.0, 50.0), (300.0, 50.0), (301.0, 10.0))], 1, 0.0, 1000.0)
    site.run(Fixed(1, t0=1))
    assert site.waits == pytest.approx([49.0])
    assert (site.hit, site.missed) == (0, 1)


def test_a_replica_drains_before_it_goes_and_is_paid_until_then() -> None:
    site = Site([stream((300.0, 100.0))], 1, 0.0, 1000.0)
    site.run(Fixed(1, t0=1, t310=0))
    assert site.waits == []
    assert site.replica_s == pytest.approx(400.0)
    assert site.nodes.all[0].free == 8


def test_replicas_wait_for_gpus_and_start_where_the_model_is() -> None:
    site = Site([stream((1.0, 5.0))], 1, 0.0, 2000.0)
    site.run(Fixed(1, t10=6, t1000=1))
    assert site.starts == 4
    assert site.replica_s == pytest.approx(4 * 1000 - 1 - 3 * 10 + 1000)
    again = Nodes(1)
    assert again.place(SPEC) == (again.all[0], False)
    assert again.place(SPEC) == (again.all[0], True)
    assert again.fetched == SPEC.size


def test_prefetch_brings_a_model_to_nodes_that_have_room() -> None:
    nodes = Nodes(3)
    nodes.all[0].free = 0
    nodes.prefetch(SPEC, 2)
    nodes.prefetch(SPEC, 2)
    assert nodes.fetched == 2 * SPEC.size
    placed = nodes.place(SPEC)
    assert placed is not None
    assert placed[1]


def test_the_oracle_starts_before_and_keeps_over_short_pauses() -> None:
    busy = stream((1000.0, 100.0), (1100.0 + CACHED_S / 2, 100.0), (5000.0, 50.0))
    assert least(busy, 0.0, 9000.0) == pytest.approx(2 * CACHED_S + 200 + CACHED_S / 2 + 50)
    crowd = stream(*[(1000.0, 100.0)] * 3)
    assert least(crowd, 0.0, 9000.0) == pytest.approx(2 * (100 + CACHED_S))
    assert least(stream(), 0.0, 9000.0) == 0


def test_the_bound_is_what_can_be_reckoned_by_hand_where_the_rate_stays_the_same() -> None:
    """Then a rule can only keep the replica or not, and each hour that it is kept spares as much as any other."""
    hold_s, length_s = 300.0, DAY / 2
    rate = (math.sqrt(1 + 4 * CACHED_S / 500) - 1) / (2 * CACHED_S)  # 500 s of a replica spare one request
    models = [(SPEC, np.full(math.ceil(length_s / NOISE_S), rate))]
    cost = reactive(models, 0.0, length_s, hold_s)
    cycle_s = 1 / rate + CACHED_S + (math.exp(rate * hold_s) - 1) / rate
    assert cost.hit == pytest.approx(length_s / cycle_s * (1 + rate * CACHED_S), rel=0.05)
    assert cost.replica_s == pytest.approx(length_s * (1 - 1 / rate / cycle_s), rel=0.05)
    for part in (0.0, 0.25, 0.5):
        more_s = part * (length_s - cost.replica_s)
        least_hit = fewest(models, 0.0, length_s, hold_s, more_s)
        assert least_hit.reactive == cost.hit
        assert least_hit.fewest == pytest.approx((1 - part) * cost.hit, rel=0.05)


def test_what_was_planned_is_what_comes_but_for_chance() -> None:
    streams, plan = (make("diurnal", 3, 1, models=5, rate=0.5) for make in (traffic, planned))
    for one, (spec, rates) in zip(streams, plan, strict=True):
        assert one.model == spec
        due = rates.sum() * NOISE_S
        assert abs(len(one.at) - due) < 5 * math.sqrt(due)


def looks(scaler: Hpa | KubeAi, loads: list[int]) -> list[int]:
    """Replicas after each look, at so many requests under way (the target is 1.5 a replica)."""
    site = Site([stream()], 50, 0.0, 1e9)
    numbers = []
    for number, load in enumerate(loads):
        site.models[0].flying = load
        scaler.look(number * scaler.interval_s, site)
        numbers.append(site.models[0].wanted)
    return numbers


def test_kubernetes_autoscaler_doubles_waits_five_minutes_and_keeps_one() -> None:
    numbers = looks(Hpa(), [0, 30, 30, 30, 30, *[0] * 30])
    assert numbers[:5] == [1, 5, 10, 20, 20]
    assert numbers[5:24] == [20] * 19
    assert numbers[-1] == 1
    assert looks(Hpa(), [0, 15, 15, 15, 16, 16])[-1] == 10  # 10.67 is within a tenth


def test_kubeai_goes_by_the_mean_of_ten_minutes_and_three_votes() -> None:
    numbers = looks(KubeAi(), [15] * 60 + [0] * 70)
    assert numbers[0] == 1
    assert numbers[29] == 5
    assert numbers[59] == 10
    assert numbers[61] == 10
    assert numbers[-1] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_traffic_is_the_same_for_a_seed_and_as_much_as_is_said(kind: str) -> None:
    one, same, other = (traffic(kind, seed, 1, models=10, rate=0.5) for seed in (1, 1, 2))
    assert all((a.at == b.at).all() and (a.takes == b.takes).all() for a, b in zip(one, same, strict=True))
    assert any(len(a.at) != len(b.at) for a, b in zip(one, other, strict=True))
    for each in one:
        assert (np.diff(each.at) >= 0).all()
        assert (each.takes > 0).all()
        assert not len(each.at) or 0 <= each.at[0] <= each.at[-1] <= WEEK
    count = sum(len(each.at) for each in one)
    assert count > 0.8 * 0.5 * WEEK
    assert kind == "flash" or count < 1.2 * 0.5 * WEEK


def test_everybody_is_served_whoever_scales() -> None:
    """And Helios does not keep all replicas up, as an autoscaler that can't go to zero does."""
    streams = traffic("diurnal", 3, 4, models=8, rate=0.2)
    rows = {}
    for name in (HPA, KUBEAI, REACTIVE, FORECAST):
        site = Site(streams, 4, 3 * WEEK, 3 * WEEK + DAY / 4)
        site.run(scaler(name, streams, 500.0))
        rows[name] = row(site)
        assert all(site.end - came < 200 for model in site.models for came, _ in model.held)  # it starts just now
    assert rows[REACTIVE]["replica_hours"] < rows[HPA]["replica_hours"]
    assert rows[FORECAST]["hit"] <= rows[REACTIVE]["hit"]
