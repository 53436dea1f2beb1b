"""What the front keeps: the core alone, with a clock of its own."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given, settings

from heliosfs.store.front.popular import ENOUGH, HALF_LIFE_S, MAX_ABSENT, Popular


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def filled(clock: Clock, **sizes: int) -> Popular:
    popular = Popular(sum(sizes.values()), clock)
    for key, size in sizes.items():
        popular.put(key, size, held=False)
    return popular


def test_what_is_used_least_goes_first_and_what_must_stay_never() -> None:
    clock = Clock()
    popular = filled(clock, a=100, b=100, c=100)
    popular.use("a", 1.0)
    popular.hold("b", True)
    assert popular.lacking(150, 1 << 40, 0) == 150
    assert popular.choose(150) == ["c", "a"]
    popular.spare("c")
    popular.spare("a")
    assert popular.choose(250) is None, "not even if all went that may"
    popular.hold("b", False)
    assert popular.choose(250) == ["b", "c", "a"] or popular.choose(250) == ["c", "b", "a"]


def test_a_scan_pushes_nothing_out_that_is_used_more() -> None:
    clock = Clock()
    popular = filled(clock, hot=1000)
    for _ in range(5):
        popular.use("hot", 1.0)
    for number in range(100):
        popular.use(f"scan {number}", 1.0)
        assert popular.choose(1000, popular.worth(f"scan {number}", 1000)) is None
    for _ in range(9):
        popular.use("new", 1.0)
    assert popular.choose(1000, popular.worth("new", 1000)) == ["hot"]


def test_old_uses_fade() -> None:
    clock = Clock()
    popular = filled(clock, old=1000)
    for _ in range(8):
        popular.use("old", 1.0)
    clock.now += 5 * HALF_LIFE_S
    popular.use("new", 1.0)
    assert popular.choose(1000, popular.worth("new", 1000)) == ["old"]


def test_small_objects_cost_more_to_fetch_again() -> None:
    popular = filled(Clock(), large=100 << 20, small=1000)
    assert popular.choose(500) == ["large"]


def test_what_was_read_is_counted_by_shares() -> None:
    clock = Clock()
    popular = Popular(None, clock)
    for _ in range(100):
        popular.use("head", 0.01)
    assert 0.9 < popular.recent("head") < ENOUGH
    popular.use("head", 1.0)
    assert popular.recent("head") > ENOUGH
    clock.now += HALF_LIFE_S
    assert popular.recent("head") < ENOUGH
    popular.put("head", 10, held=False)
    popular.drop("head")
    assert popular.recent("head") == 0.0, "that it was here once is no reason to bring it back"
    assert popular.worth("head", 10) > popular.worth("never", 10)


def test_opens_close_together_are_one_use() -> None:
    clock = Clock()
    popular = filled(clock, a=100, b=100)
    for _ in range(10):
        popular.opened("a")
    popular.use("b", 1.0)
    popular.use("b", 1.0)
    assert popular.choose(100) == ["a"]


def test_what_is_not_here_is_forgotten_some_day() -> None:
    popular = Popular(None, Clock())
    for number in range(MAX_ABSENT + 10):
        popular.use(str(number), 1.0)
    assert popular.recent("0") == 0.0
    assert popular.recent(str(MAX_ABSENT)) > 0.9


def test_free_room_on_the_disk_counts_as_well() -> None:
    popular = filled(Clock(), a=100)
    popular.limit = None
    assert popular.lacking(50, 120, 60) == 0 - 120 + 60 + 50 or popular.lacking(50, 120, 60) == 0
    assert popular.lacking(50, 100, 60) == 10
    assert popular.over(20, 60) == ["a"], "others have filled the disk"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("pudhf"), st.integers(0, 9), st.integers(1, 50)), max_size=120))
def test_the_sums_are_those_of_what_is_here(steps: list[tuple[str, int, int]]) -> None:
    clock = Clock()
    popular = Popular(200, clock)
    for what, number, size in steps:
        key = str(number)
        clock.now += size
        if what == "p":
            lacking = popular.lacking(size, 1 << 40, 0)
            victims = [] if key in popular.entries else popular.choose(lacking)
            for victim in victims or ():
                assert not popular.entries[victim].held
                popular.drop(victim)
            if victims is not None:
                popular.put(key, size, held=False)
        elif what == "u":
            popular.use(key, size / 50)
        elif what == "d":
            popular.drop(key)
        elif key in popular.entries:
            popular.hold(key, what == "h")
        assert popular.used == sum(entry.size for entry in popular.entries.values()) <= 200
        assert popular.held == sum(entry.size for entry in popular.entries.values() if entry.held)
    for key in popular.entries:
        popular.hold(key, False)
    everything = popular.choose(popular.used) if popular.used else []
    assert everything is not None
    assert set(everything) == popular.entries.keys(), "nothing is ever out of reach"
