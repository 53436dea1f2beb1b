"""The forecast: what it learns, what it leaves out, and that it can be put down and taken up."""

from __future__ import annotations

import math
import random
from datetime import UTC, datetime

import msgspec
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from orchestrator.scaling.forecast import Forecast
from orchestrator.scaling.outlook import replicas_for
from orchestrator.scaling.settings import ForecastSettings, ScalingSettings

MONDAY = datetime(2026, 1, 5, tzinfo=UTC).timestamp()
HOUR, DAY = 3600.0, 86_400.0
LOOK_S = 300.0


def office(at: float) -> float:
    """Requests a second: 0.2 from 9 to 17 on weekdays, else 0.004."""
    day, second = divmod(at - MONDAY, DAY)
    return 0.2 if day % 7 < 5 and 9 * HOUR <= second < 17 * HOUR else 0.004


def poisson(chance: random.Random, mean: float) -> int:
    """Requests of a time in which so many come on average."""
    at, count = chance.expovariate(1.0), 0
    while at < mean:
        at, count = at + chance.expovariate(1.0), count + 1
    return count


def fed(forecast: Forecast, days: float, *, start: float = MONDAY, rate=office, seed: int = 1) -> float:
    """A look in five minutes; a request takes 20 s. Returns when it ended."""
    chance = random.Random(seed)
    now = start
    for _ in range(int(days * DAY / LOOK_S)):
        mean = rate(now) * LOOK_S
        now += LOOK_S
        came = poisson(chance, mean)
        forecast.observe(now, came, round(came / LOOK_S * 20))
    return now


def test_before_a_day_was_seen_it_is_not_trusted() -> None:
    forecast = Forecast(ForecastSettings())
    now = fed(forecast, 0.9)
    outlook = forecast.outlook(now, 120)
    assert not outlook.trusted
    assert "of 24 hours seen" in outlook.why
    assert forecast.outlook(fed(forecast, 0.2, start=now), 120).trusted


def test_it_knows_the_morning_before_it_comes() -> None:
    forecast = Forecast(ForecastSettings())
    monday = fed(forecast, 14)
    now = fed(forecast, 8.8 / 24, start=monday)
    assert forecast.rate(now + 120, now) < 0.15
    outlook = forecast.outlook(now, 45 * 60)
    assert outlook.trusted
    assert 0.1 < outlook.soon.rate < 0.25  # now it is 0.004
    assert 3.0 < outlook.soon.work < 9.0  # 4 in flight, and a margin
    assert forecast.outlook(now, 120).later.rate > 0.05  # prefetched half an hour ahead
    settings = ScalingSettings(in_flight_per_replica=2, forecast=ForecastSettings(mode="act"))
    assert 2 <= replicas_for(outlook.soon, settings, 60.0, 0) <= 5


def test_it_knows_the_days_of_a_week() -> None:
    forecast = Forecast(ForecastSettings())
    now = fed(forecast, 14 + 5)
    saturday_noon = now + 12 * HOUR
    assert forecast.rate(saturday_noon, now) < 0.02
    assert 0.15 < forecast.rate(saturday_noon + 2 * DAY, now) < 0.25


def test_after_a_few_days_it_goes_by_those() -> None:
    forecast = Forecast(ForecastSettings())
    now = fed(forecast, 2 + 8.5 / 24)
    assert 0.1 < forecast.rate(now + HOUR, now) < 0.3


def test_a_model_that_gets_more_from_week_to_week_is_expected_to_have_more() -> None:
    forecast = Forecast(ForecastSettings())
    now = fed(forecast, 21.5, rate=lambda at: office(at) * (1 + (at - MONDAY) / (14 * DAY)))
    assert forecast.rate(now, now) == pytest.approx(0.2 * (1 + 21.5 / 14), rel=0.25)


def test_a_quiet_day_is_noticed_while_it_lasts() -> None:
    forecast = Forecast(ForecastSettings())
    now = fed(forecast, 14 + 8 / 24)
    now = fed(forecast, 4 / 24, start=now, rate=lambda at: 0.01)
    assert forecast.rate(now + 120, now) < 0.08


def test_what_nobody_saw_stands_for_nothing() -> None:
    whole, gappy = Forecast(ForecastSettings()), Forecast(ForecastSettings())
    now = fed(whole, 14 + 11 / 24)
    fed(gappy, 8 + 10 / 24)
    later = MONDAY + 14 * DAY
    gappy.observe(later, 100_000, 0)  # what came in five days says nothing of when
    for number in range(20):
        gappy.observe(later + LOOK_S * number, None, None)
    assert fed(gappy, 11 / 24, start=later + HOUR * 0) == now
    assert gappy.rate(now, now) == pytest.approx(whole.rate(now, now), rel=0.3)


def test_it_is_not_trusted_when_it_is_no_use() -> None:
    forecast = Forecast(ForecastSettings())
    days = random.Random(5)
    levels = [days.choice([0.01, 2.0]) for _ in range(400)]  # six hours each, and no habit in it
    now = fed(forecast, 12, rate=lambda at: levels[int((at - MONDAY) / (6 * HOUR))])
    outlook = forecast.outlook(now, 120)
    assert not outlook.trusted
    assert "worse" in outlook.why


def test_habits_go_by_the_clock_on_the_wall() -> None:
    """Berlin's clocks are set forward on 2026-03-29: nine o'clock is an hour earlier then."""
    start = datetime(2026, 3, 9, tzinfo=UTC).timestamp()
    local, utc = (Forecast(ForecastSettings(timezone=zone)) for zone in ("Europe/Berlin", "UTC"))
    for forecast in (local, utc):
        fed(forecast, 20, start=start, rate=lambda at: office(at - start + MONDAY + HOUR))
    monday = start + 21 * DAY
    quarter_past_seven = monday + 7.25 * HOUR  # 9:15 in Berlin, by summer time
    assert local.rate(quarter_past_seven, quarter_past_seven) > 0.1
    assert utc.rate(quarter_past_seven, quarter_past_seven) < 0.05


looks = st.lists(
    st.tuples(
        st.sampled_from([0.0, 15.0, 60.0, 290.0, 900.0, 4000.0, -50.0]),
        st.one_of(st.none(), st.integers(0, 50)),
        st.one_of(st.none(), st.integers(0, 50)),
    ),
    max_size=60,
)


@given(looks, st.integers(0, 2_000_000))
@hypothesis_settings(max_examples=40)
def test_put_down_and_taken_up_it_is_the_same(course: list[tuple], offset: int) -> None:
    settings = ForecastSettings(history_s=DAY)
    one = other = Forecast(settings)
    now = MONDAY + offset
    for after_s, arrivals, flying in course:
        now += after_s
        one.observe(now, arrivals, flying)
        data = other.encode()
        other = Forecast.decode(data, settings)
        if other is not one:
            other.observe(now, arrivals, flying)
        assert len(data) < 6000
        outlook = one.outlook(now, 120)
        assert outlook.soon.work <= outlook.later.work
        assert math.isfinite(outlook.later.work)
        assert outlook.soon.rate >= 0
        one = Forecast.decode(one.encode(), settings) if after_s == 900.0 else one
        assert other.encode() == one.encode()


@pytest.mark.parametrize("data", [b"", b"{}", b"null", "damaged"])
def test_what_can_not_be_read_knows_nothing(data: bytes | str) -> None:
    forecast = Forecast.decode(data, ForecastSettings())
    forecast.observe(MONDAY, 1, 1)
    assert forecast.outlook(MONDAY, 60).soon.rate == 0


def test_of_another_version_or_size_it_knows_nothing() -> None:
    forecast = Forecast(ForecastSettings())
    now = fed(forecast, 3)
    record = msgspec.json.decode(forecast.encode())
    for change in ({"version": 2}, {"season": "AAAA"}):
        assert Forecast.decode(msgspec.json.encode(record | change), ForecastSettings()).rate(now, now) == 0
