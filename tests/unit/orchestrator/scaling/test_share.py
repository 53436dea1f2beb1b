"""Who gets what when there is not enough."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.scaling.share import Want, share


def want(name: str, replicas: int, needed: int | None = None, **more: object) -> Want:
    return Want(name=name, replicas=replicas, needed=replicas if needed is None else needed, **more)


def test_enough_is_enough() -> None:
    wants = [want("a", 3, units=2, pool="h200"), want("b", 2, pool="h200"), want("c", 50, pool="a10")]
    assert share(wants, {"h200": 8}) == {"a": 3, "b": 2, "c": 50}


def test_nobody_sleeps_because_others_have_much() -> None:
    assert share([want("a", 8, priority=5), want("b", 8), want("c", 1, priority=-5)], {"": 8}) == {
        "a": 6,
        "b": 1,
        "c": 1,
    }


def test_what_requests_need_goes_before_what_is_expected() -> None:
    assert share([want("a", 6, 1, priority=5), want("b", 5)], {"": 8}) == {"a": 3, "b": 5}


def test_equals_get_the_same_part_and_ties_go_by_name() -> None:
    assert share([want("b", 9), want("a", 9), want("c", 3)], {"": 7}) == {"a": 3, "b": 3, "c": 1}


def test_who_is_smaller_may_fit_where_who_is_larger_does_not() -> None:
    assert share([want("large", 2, units=4, priority=1), want("small", 9)], {"": 7}) == {"large": 1, "small": 3}


def test_minimums_come_first() -> None:
    assert share([want("a", 9, 9, priority=9), want("b", 3, 0, min_replicas=3)], {"": 5}) == {"a": 2, "b": 3}


def test_a_name_is_there_once() -> None:
    with pytest.raises(ValueError, match="twice"):
        share([want("a", 1), want("a", 1)], {})


wants = st.lists(
    st.builds(
        lambda replicas, needed, *rest: (replicas, min(needed, replicas), *rest),
        st.integers(0, 9), st.integers(0, 9), st.integers(0, 2), st.integers(0, 2), st.sampled_from(["x", "y"]),
        st.sampled_from([1, 1, 2, 4]),
    ),
    max_size=12,
)  # fmt: skip


@given(wants, st.integers(0, 60), st.randoms(use_true_random=False))
def test_ceilings_hold_and_what_is_left_fits_nobody(rows: list[tuple], ceiling: int, shuffled: random.Random) -> None:
    asked = [
        Want(
            name=f"m{number}",
            replicas=replicas,
            needed=needed,
            min_replicas=least,
            priority=priority,
            pool=pool,
            units=units,
        )
        for number, (replicas, needed, least, priority, pool, units) in enumerate(rows)
    ]
    granted = share(asked, {"x": ceiling})
    assert set(granted) == {one.name for one in asked}
    assert all(0 <= granted[one.name] <= one.replicas for one in asked)
    assert all(granted[one.name] == one.replicas for one in asked if one.pool == "y")
    limited = [one for one in asked if one.pool == "x"]
    used = sum(granted[one.name] * one.units for one in limited)
    assert used <= ceiling
    assert all(granted[one.name] == one.replicas or one.units > ceiling - used for one in limited)
    for one in limited:  # of two that are alike but for priority, the higher has no less
        for other in limited:
            alike = (one.replicas, one.needed, one.min_replicas, one.units)
            if (
                alike == (other.replicas, other.needed, other.min_replicas, other.units)
                and one.priority > other.priority
            ):
                assert granted[one.name] >= granted[other.name]
    shuffled.shuffle(asked)
    assert share(asked, {"x": ceiling}) == granted
