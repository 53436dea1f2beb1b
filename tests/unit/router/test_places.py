"""Places of connections: each is given back once, and those beyond the limit are bounded too."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from router.relay.places import Place, Places


@given(most=st.integers(0, 4), spare=st.integers(0, 3), steps=st.lists(st.one_of(st.none(), st.integers(0, 20))))
def test_no_more_than_there_are_and_none_is_lost(most: int, spare: int, steps: list[int | None]) -> None:
    places = Places(most, spare)
    held: list[Place] = []
    ended: list[Place] = []
    for step in steps:
        if step is None:
            kept = sum(not place.refused for place in held)
            place = places.take()
            if place is None:
                assert (kept, len(held)) == (most, most + spare)
            else:
                assert place.refused == (kept == most)
                held.append(place)
        elif held:
            ended.append(held.pop(step % len(held)))
            ended[-1].leave()
        for place in ended:
            place.leave()  # said again, it changes nothing
        assert places.taken == sum(not place.refused for place in held) <= most
        assert places.refused == len(held) - places.taken <= spare
