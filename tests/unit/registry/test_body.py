"""A request's body as a source: bounded, exact, never waiting for ever."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

import pytest

from helios.errors import DeadlineExceeded, InvalidInput, Unavailable
from registry.body import LIMIT, Body, BodySource, feed


def read_all(source: BodySource, step: int) -> bytes:
    out = bytearray()
    buffer = bytearray(step)
    while count := source.readinto(memoryview(buffer)):
        out += buffer[:count]
    return bytes(out)


def test_every_byte_in_order() -> None:
    content = random.Random(3).randbytes(3 * LIMIT + 12345)

    async def main() -> bytes:
        source = BodySource(len(content), "f")
        reader = asyncio.ensure_future(asyncio.to_thread(read_all, source, 1_000_003))
        for start in range(0, len(content), 65_537):
            await source.write(content[start : start + 65_537])
        source.finish()
        return await reader

    assert asyncio.run(main()) == content


def test_a_fast_sender_waits_for_a_slow_reader() -> None:
    async def main() -> None:
        source = BodySource(10 * LIMIT, "f")
        await source.write(b"x" * LIMIT)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await source.write(b"")
        assert await asyncio.to_thread(source.readinto, memoryview(bytearray(LIMIT))) == LIMIT
        async with asyncio.timeout(5):
            await source.write(b"x")

    asyncio.run(main())


def test_lengths_must_agree() -> None:
    async def main() -> None:
        source = BodySource(3, "f.bin")
        await source.write(b"ab")
        with pytest.raises(InvalidInput, match=r"f\.bin: the body has 2 bytes, 3 were announced"):
            source.finish()
        with pytest.raises(InvalidInput, match="longer than the 3 bytes"):
            await source.write(b"cd")

    asyncio.run(main())


def test_a_silent_sender_is_given_up() -> None:
    async def main() -> None:
        source = BodySource(3, "f", stall_s=0.05)
        with pytest.raises(DeadlineExceeded):
            await asyncio.to_thread(source.readinto, memoryview(bytearray(3)))

    asyncio.run(main())


def test_failing_and_abandoning() -> None:
    async def main() -> None:
        source = BodySource(10 * LIMIT, "f")
        source.fail(Unavailable("gone"))
        with pytest.raises(Unavailable, match="gone"):
            await asyncio.to_thread(source.readinto, memoryview(bytearray(3)))
        source.abandon()
        async with asyncio.timeout(5):
            for _ in range(5):
                await source.write(b"x" * LIMIT)

    asyncio.run(main())


@pytest.mark.parametrize("turns", range(8))
def test_a_feeder_that_is_cancelled_ends_whenever_that_comes(turns: int) -> None:
    """Also in the moment in which it takes a part, where Python 3.11's ``asyncio.wait_for`` swallows it."""

    async def body() -> AsyncIterator[bytes]:
        yield b"a"
        await asyncio.Event().wait()

    async def main() -> None:
        feeder = asyncio.ensure_future(feed(BodySource(10, "f"), body()))
        for _ in range(turns):
            await asyncio.sleep(0)
        feeder.cancel()
        done, _ = await asyncio.wait([feeder], timeout=5)
        assert done == {feeder}

    asyncio.run(main())


def test_a_head_is_taken_off_a_body() -> None:
    async def parts(*data: bytes) -> AsyncIterator[bytes]:
        for part in data:
            yield part

    async def main() -> None:
        for cut in ((b"abcdefg",), (b"a", b"", b"bc", b"defg"), (b"abc", b"defg"), (b"abcd", b"efg")):
            body = Body(parts(*cut))
            assert await body.take(1) == b"a"
            assert await body.take(2) == b"bc"
            assert b"".join([part async for part in body.rest()]) == b"defg"
        with pytest.raises(InvalidInput, match="within its head"):
            await Body(parts(b"ab")).take(3)

    asyncio.run(main())
