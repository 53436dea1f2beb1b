"""Questions to an upstream: shared, given up after a while, and not begun when nobody waits any more."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Iterator
from contextlib import closing

import pytest

from helios.errors import RepoNotFound, UpstreamUnavailable
from registry.mirror.questions import THREADS, Questions


@pytest.fixture
def questions() -> Iterator[Questions]:
    with closing(Questions("http://upstream")) as found:
        yield found


def test_who_asks_the_same_at_a_time_hears_the_same(questions: Questions) -> None:
    answer, asked = threading.Event(), []

    def work() -> str:
        asked.append(1)
        answer.wait(20)
        return "yes"

    async def main() -> list[str]:
        askers = [asyncio.create_task(questions.ask(("a",), work, 20)) for _ in range(5)]
        while not asked:
            await asyncio.sleep(0.01)
        askers[0].cancel()
        await asyncio.wait(askers[:1])
        answer.set()
        return await asyncio.gather(*askers[1:])

    assert asyncio.run(main()) == ["yes"] * 4
    assert len(asked) == 1
    assert asyncio.run(questions.ask(("a",), work, 20)) == "yes"
    assert len(asked) == 2, "an answer is for those who waited for it"


def test_errors_are_for_all_who_asked(questions: Questions) -> None:
    def work() -> None:
        raise RepoNotFound("there is none")

    async def main() -> list[object]:
        return await asyncio.gather(*(questions.ask(("a",), work, 20) for _ in range(3)), return_exceptions=True)

    assert [type(error) for error in asyncio.run(main())] == [RepoNotFound] * 3


def test_an_error_that_comes_too_late_is_nobodys_and_no_error_of_the_registry(questions: Questions) -> None:
    """An upstream that says no after everybody has gone: asyncio would log it, at ERROR, when it is forgotten."""
    answer, ended = threading.Event(), threading.Event()

    def work() -> None:
        answer.wait(20)
        ended.set()
        raise RepoNotFound("there is none, after all")

    async def main() -> None:
        with pytest.raises(UpstreamUnavailable):
            await questions.ask(("a",), work, 0.1)
        leaver = asyncio.create_task(questions.ask(("a",), work, 20))
        await asyncio.sleep(0)
        leaver.cancel()
        await asyncio.wait([leaver])
        answer.set()
        assert await asyncio.to_thread(ended.wait, 20)
        with pytest.raises(RepoNotFound):
            await questions.ask(("a",), work, 20)
        gc.collect()

    asyncio.run(main())
    gc.collect()


def test_what_has_begun_goes_on_and_what_has_not_is_forgotten_when_nobody_waits(questions: Questions) -> None:
    answer, begun, ended = threading.Event(), threading.Semaphore(0), threading.Semaphore(0)

    def busy() -> None:
        begun.release()
        answer.wait(20)
        ended.release()

    def never() -> None:
        raise AssertionError("nobody waited")

    async def main() -> None:
        under_way = [asyncio.create_task(questions.ask(("busy", str(n)), busy, 0.2)) for n in range(THREADS)]
        for _ in range(THREADS):
            assert await asyncio.to_thread(begun.acquire, timeout=20)
        with pytest.raises(UpstreamUnavailable, match=r"no answer within 0\.2 s"):
            await questions.ask(("queued",), never, 0.2)
        given_up = await asyncio.gather(*under_way, return_exceptions=True)
        assert [type(error) for error in given_up] == [UpstreamUnavailable] * THREADS
        answer.set()
        for _ in range(THREADS):
            assert await asyncio.to_thread(ended.acquire, timeout=20)
        assert await questions.ask(("queued",), lambda: "now", 20) == "now"

    asyncio.run(main())
