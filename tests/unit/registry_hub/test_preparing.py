"""How long clients are told to wait for a file that they take over Xet alone."""

from __future__ import annotations

from itertools import pairwise

import pytest

from registry.hub.preparing import LONGEST_S, Waits

FILE = ("model/org/one", "ab" * 32)
QUESTIONS = 6
"""huggingface_hub's, in all."""


def asked(size: int, clock: list[float]) -> list[float]:
    """The waits of a client that gives up in the end."""
    waits, told = Waits(lambda: clock[0]), []
    for _ in range(QUESTIONS - 1):
        told.append(waits.wait_s(FILE, size, None))
        clock[0] += told[-1]
    return told


@pytest.mark.parametrize("size", [1, 3_000_000, 51_500_000_000, 2_000_000_000_000])
def test_six_questions_reach_past_a_layout_that_takes_long(size: int) -> None:
    told = asked(size, [5.0])
    assert sum(told) >= max(60, min(size / 350e6, 600))
    assert all(first <= second <= LONGEST_S for first, second in pairwise(told))


def test_another_client_is_told_of_what_the_first_has_waited() -> None:
    clock = [0.0]
    waits = Waits(lambda: clock[0])
    assert waits.wait_s(FILE, 3_000_000, None) < 5
    clock[0] = 50.0
    assert waits.wait_s(FILE, 3_000_000, None) == 50
    assert waits.wait_s(("model/org/one", "cd" * 32), 3_000_000, None) < 5, "a file of its own"
    clock[0] = 700.0
    assert waits.wait_s(FILE, 3_000_000, None) < 5, "nobody has waited since"


def test_a_download_comes_first() -> None:
    waits = Waits(lambda: 0.0)
    assert waits.wait_s(FILE, 3_000_000, 20.0) == pytest.approx(24, abs=0.1)
    assert waits.wait_s(FILE, 3_000_000, 1e9) == LONGEST_S
