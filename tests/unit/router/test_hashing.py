"""Rendezvous hashing: every worker owns as much as its share."""

from __future__ import annotations

from collections import Counter

import pytest

from router.scheduling.hashing import owner
from router.scheduling.keys import key_of
from router.worker import Worker
from router.workers import Workers, parse_worker


def made(*options: str) -> list[Worker]:
    return Workers([parse_worker(f"m=http://h:{n}{text}") for n, text in enumerate(options, 1)], lambda: 0.0).of("m")


@pytest.mark.parametrize("count", [2, 8, 50])
def test_each_owns_its_part(count: int) -> None:
    workers = made(*[""] * count)
    owned = Counter(owner(key_of("k", str(n)), workers, 1.25, 4) for n in range(count * 1000))
    assert all(850 < owned[index] < 1150 for index in range(count))


def test_each_owns_as_much_as_its_weight_says() -> None:
    workers = made("", ",weight=2", ",weight=5")
    owned = Counter(owner(key_of("k", str(n)), workers, 100.0, 1000) for n in range(8000))
    assert [round(owned[index] / 1000, 0) for index in range(3)] == [1, 2, 5]


def test_a_worker_that_goes_moves_only_its_own_keys() -> None:
    workers = made(*[""] * 8)
    keys = [key_of("k", str(n)) for n in range(4000)]
    before = [workers[owner(key, workers, 1.25, 4)] for key in keys]
    left = workers[:3] + workers[4:]
    after = [left[owner(key, left, 1.25, 4)] for key in keys]
    assert all(new is old for new, old in zip(after, before, strict=True) if old is not workers[3])
    moved = Counter(new.url for new, old in zip(after, before, strict=True) if old is workers[3])
    assert len(moved) == 7
    assert max(moved.values()) < 2 * min(moved.values())


@pytest.mark.parametrize("share", [1.0, 1.001])
@pytest.mark.parametrize(
    ("held", "others", "kept"),
    [
        (3, 0, True),  # more than twice its share of the requests, but fewer than four
        (4, 0, False),  # both
        (4, 20, True),  # four, but less than twice its share
        (7, 7, True),  # one fewer than two quarters of 15, rounded up
        (8, 7, False),  # as many as two quarters of 16
    ],
)
def test_an_owner_is_passed_over_from_its_bound_on_and_not_before(
    held: int, others: int, kept: bool, share: float
) -> None:
    """Shares that are not all the same are reckoned with in another way, and come to the same."""
    workers, key = made("", "", "", ""), key_of("x")
    mine = owner(key, workers, 2.0, 4)
    workers[mine - 1].share = share
    for number, count in ((mine, held), *(((mine + 1 + n % 3) % 4, 1) for n in range(others))):
        for _ in range(count):
            workers[number].load.begin(1)
    assert (owner(key, workers, 2.0, 4) == mine) == kept
