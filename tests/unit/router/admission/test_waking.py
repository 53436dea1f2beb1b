"""Models that are not up: one call for all who wait, its progress, and its failure."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from router.admission.waking import RETRY_S, Report, WakeFailed, Waking


class FakeWaker:
    """Wakes as the test says."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.cancelled = 0

    async def wake(self, model: str, report: Report) -> None:
        self.calls.append(model)
        report("loading, 10%")
        try:
            await self.ended
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


def run(
    act: Callable[[Waking, FakeWaker, list[float]], Awaitable[None]], longest_s: float = 60
) -> list[tuple[str, str]]:
    results: list[tuple[str, str]] = []

    async def main() -> None:
        clock, waker = [10.0], FakeWaker()
        tasks: list[asyncio.Task[None]] = []

        def spawn(model: str) -> asyncio.Task[None]:
            tasks.append(asyncio.create_task(waking.call(model)))
            return tasks[-1]

        waking = Waking(waker, spawn, lambda: clock[0], longest_s)
        waking.ended = lambda model, result: results.append((model, result))
        try:
            await act(waking, waker, clock)
        finally:
            waking.stop()
            await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(main())
    return results


async def turn() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_one_call_for_all_who_wait_until_it_is_up() -> None:
    async def act(waking: Waking, waker: FakeWaker, clock: list[float]) -> None:
        assert [waking.want("m") for _ in range(100)] == [None] * 100
        await turn()
        assert waker.calls == ["m"]
        assert waking.progress("m") == "loading, 10%"
        assert waking.models() == ["m"]
        waking.up("m")
        await turn()
        assert waker.cancelled == 1
        assert (waking.progress("m"), waking.models()) == ("", [])

    assert run(act) == [("m", "up")]


def test_a_waker_that_only_asks_may_return_at_once() -> None:
    async def act(waking: Waking, waker: FakeWaker, clock: list[float]) -> None:
        waker.ended.set_result(None)
        waking.want("m")
        await turn()
        assert waking.want("m") is None
        assert waker.calls == ["m"]

    assert run(act) == []


def test_after_a_failure_it_is_left_alone_for_a_while() -> None:
    async def act(waking: Waking, waker: FakeWaker, clock: list[float]) -> None:
        waker.ended.set_exception(WakeFailed("no GPU is free"))
        waking.want("m")
        await turn()
        assert waking.want("m") == waking.reason("m") == "no GPU is free"
        clock[0] += RETRY_S
        assert waking.want("m") is None
        await turn()
        assert waker.calls == ["m", "m"]

    assert run(act) == [("m", "failed"), ("m", "failed")]


def test_a_model_that_does_not_come_up_in_time() -> None:
    async def act(waking: Waking, waker: FakeWaker, clock: list[float]) -> None:
        waking.want("m")
        await asyncio.sleep(0.05)
        assert waking.reason("m") == "it was not up after 0.01 s"

    assert run(act, longest_s=0.01) == [("m", "failed")]


def test_a_defect_of_the_waker_ends_its_call_alone(expected_log_errors: Any) -> None:
    expected_log_errors("waking a model failed")

    async def act(waking: Waking, waker: FakeWaker, clock: list[float]) -> None:
        waker.ended.set_exception(RuntimeError("oops"))
        waking.want("m")
        await turn()
        assert "could not ask" in waking.reason("m")

    assert run(act) == [("m", "failed")]
