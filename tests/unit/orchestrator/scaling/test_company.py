"""Whether requests come in company: what is learnt of it, and what follows for a replica that is kept."""

from __future__ import annotations

import random
from collections.abc import Callable

import msgspec
import pytest

from orchestrator.scaling.company import LONG_AGO_S, Habits
from orchestrator.scaling.forecast import Forecast
from orchestrator.scaling.outlook import Company, Expected, replicas_for
from orchestrator.scaling.settings import ForecastSettings, ScalingSettings

LOOK_S, DAY, RATE = 30.0, 86_400.0, 1 / 600
Times = Callable[[random.Random, float], list[float]]


def alone(chance: random.Random, until: float) -> list[float]:
    """Requests that know nothing of one another."""
    found, at = [], chance.expovariate(RATE)
    while at < until:
        found.append(at)
        at += chance.expovariate(RATE)
    return found


def in_sessions(chance: random.Random, until: float) -> list[float]:
    """As many, by users with eight each, half a minute between them."""
    found, at = [], chance.expovariate(RATE / 8)
    while at < until:
        moment = at
        for _ in range(8):
            found.append(moment)
            moment += chance.expovariate(1 / 30)
        at += chance.expovariate(RATE / 8)
    return sorted(found)


def learnt(times: Times, days: float) -> Habits:
    habits, now = Habits(), 0.0
    came = times(random.Random(3), days * DAY)
    seen = 0
    while now < days * DAY:
        now += LOOK_S
        before, seen = seen, seen + sum(1 for at in came[seen:] if at <= now)
        habits.observe(LOOK_S, seen - before, lambda: RATE)
    return habits


def test_requests_that_know_nothing_of_one_another_are_taken_as_such() -> None:
    company = learnt(alone, 7).company
    assert company.alone == pytest.approx(1.0, abs=0.15)
    assert company.along < RATE


def test_users_who_come_with_several_requests_end_a_silence_more_seldom_and_more_come_right_after() -> None:
    company = learnt(in_sessions, 7).company
    assert company.alone < 0.3
    assert 0.01 < company.along < 0.04, "one in half a minute"


def test_little_seen_means_little_and_what_nobody_saw_nothing() -> None:
    assert learnt(in_sessions, 0.05).company.alone > 0.5
    habits = Habits(quiet_s=500.0, after_s=10.0)
    habits.missed()
    assert (habits.quiet_s, habits.after_s, habits.ends_due) == (0.0, LONG_AGO_S, 0.0)


def test_a_replica_is_kept_for_those_who_would_find_none_not_for_each_of_their_requests() -> None:
    settings = ScalingSettings(forecast=ForecastSettings(mode="act", worth_s=500))
    steady = Expected(0.1, RATE * 2)
    assert replicas_for(steady, settings, 60.0, 0) == 1
    assert replicas_for(msgspec.structs.replace(steady, company=Company(0.2, 0.02)), settings, 60.0, 0) == 0
    # but with more of them while it starts it is worth it sooner
    assert replicas_for(msgspec.structs.replace(steady, company=Company(0.5, 0.05)), settings, 60.0, 0) == 1


def test_a_forecast_that_was_put_down_before_there_was_this_is_taken_up() -> None:
    forecast = Forecast(ForecastSettings())
    forecast.observe(1000.0, 0, 0)
    record = msgspec.json.decode(forecast.encode())
    del record["habits"]
    again = Forecast.decode(msgspec.json.encode(record), ForecastSettings())
    assert msgspec.json.decode(again.encode())["looked_at"] == 1000.0
