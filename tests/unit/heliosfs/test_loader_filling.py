"""Whether a file that a mount is fetching is waited for: by how fast it comes, and never for ever."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliosfs.loader.filling import JUDGED_S, QUIET_S, SHORTLY_S, Filling

LOOK_S = 0.02
SIZE = 1000.0


def followed(rate, seconds, size=SIZE, start=0.0):
    """The answers while a file comes at a rate of bytes a second."""
    filling, looks = Filling(), int(seconds / LOOK_S)
    return [filling.worth_waiting(n * LOOK_S, "a", min(size, start + rate * n * LOOK_S), size) for n in range(looks)]


def test_a_file_that_is_here_in_a_moment_is_waited_for():
    assert all(followed(rate=SIZE, seconds=1.0))


def test_one_that_takes_longer_is_read_once_that_is_known_and_waited_for_near_its_end():
    answers = followed(rate=SIZE / 20, seconds=19)
    at = int(JUDGED_S / LOOK_S) + 2
    assert all(answers[: at - 4])
    assert not any(answers[at : int(16 / LOOK_S)])
    assert all(answers[int((20 - SHORTLY_S) / LOOK_S) + 2 :])


def test_one_that_comes_no_further_is_read():
    filling = Filling()
    assert filling.worth_waiting(0.0, "a", 0, SIZE)
    assert filling.worth_waiting(0.9, "a", 900, SIZE)
    assert filling.worth_waiting(1.2, "a", 900, SIZE)
    assert not filling.worth_waiting(0.9 + QUIET_S + 0.1, "a", 900, SIZE)


def test_the_file_behind_the_one_that_comes_is_not_read_out_of_turn():
    filling = Filling()
    for n in range(100):
        assert filling.worth_waiting(n * LOOK_S, "a", 10 * n, SIZE)
        assert filling.worth_waiting(n * LOOK_S, "b", 0, SIZE)


@given(st.lists(st.tuples(st.floats(0.001, 2), st.sampled_from("abc"), st.floats(0, SIZE)), max_size=60))
def test_whatever_came_waiting_ends_when_nothing_comes_any_more(looks):
    filling, now = Filling(), 0.0
    for step, file, local in looks:
        now += step
        filling.worth_waiting(now, file, local, SIZE)
    filling.worth_waiting(now, "a", SIZE / 2, SIZE)
    assert not filling.worth_waiting(now + QUIET_S + 0.1, "a", SIZE / 2, SIZE)


@pytest.mark.parametrize("rate", [10.0, 400.0, 5000.0])
def test_the_answer_follows_the_time_that_is_left(rate):
    answers = followed(rate, seconds=min(10.0, SIZE / rate))
    for n, answer in enumerate(answers):
        left = SIZE / rate - n * LOOK_S
        if n * LOOK_S > JUDGED_S + LOOK_S and abs(left - SHORTLY_S) > 5 * LOOK_S:
            assert answer == (left < SHORTLY_S)
