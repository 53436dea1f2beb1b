"""A sender who drips is given up; one who is slow because nobody takes his bytes is not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

import registry.body as body
from helios.errors import DeadlineExceeded
from registry.body import GRACE_S, SLOWEST, BodySource, Pace, feed, steady


@given(st.lists(st.tuples(st.floats(0, 200), st.integers(0, 1 << 20)), max_size=50))
def test_only_who_is_below_the_rate_after_the_grace_is_given_up(pieces: list[tuple[float, int]]) -> None:
    pace, waited, got = Pace("a"), 0.0, 0
    for seconds, count in pieces:
        waited, got = waited + seconds, got + count
        if waited > GRACE_S and got < waited * SLOWEST:
            with pytest.raises(DeadlineExceeded, match="too few"):
                pace.note(seconds, count)
            return
        pace.note(seconds, count)


async def dripping() -> AsyncIterator[bytes]:
    while True:
        await asyncio.sleep(0.01)
        yield b"x"


def test_bodies_that_drip_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "GRACE_S", 0.2)

    async def main() -> None:
        source = BodySource(1 << 30, "the file")
        await asyncio.wait_for(feed(source, dripping()), 10)
        with pytest.raises(DeadlineExceeded, match="the file"):
            source.readinto(memoryview(bytearray(100)))
        with pytest.raises(DeadlineExceeded, match="the body"):
            async for _ in steady(dripping()):
                pass

    asyncio.run(main())


def test_waiting_for_the_store_is_not_the_senders_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "GRACE_S", 0.05)

    async def prompt() -> AsyncIterator[bytes]:
        for _ in range(3):
            yield b"x" * body.LIMIT

    async def main() -> None:
        source = BodySource(3 * body.LIMIT, "the file")
        feeding = asyncio.ensure_future(feed(source, prompt()))
        taken = 0
        while taken < 3 * body.LIMIT:
            await asyncio.sleep(0.1)
            taken += source.readinto(memoryview(bytearray(body.LIMIT)))
        await feeding
        assert source.readinto(memoryview(bytearray(1))) == 0

    asyncio.run(main())
