"""Blocks ended from outside: the reason arrives, nothing is swallowed, nothing strays."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from router.drain import Drain
from router.relay.interrupt import Interrupted, Interruptible, Reason


async def never() -> dict[str, Any]:
    await asyncio.Event().wait()
    return {"type": "http.disconnect"}


async def gone() -> dict[str, Any]:
    return {"type": "http.disconnect"}


async def interrupted(receive: Any, drain: Drain, inside: Any = None) -> Reason | None:
    try:
        async with Interruptible(drain) as block:
            block.watch(receive)
            await (inside or asyncio.Event().wait())
    except Interrupted as error:
        return error.reason
    return None


def test_a_client_that_leaves() -> None:
    async def main() -> None:
        drain = Drain(10)
        task = asyncio.current_task()
        assert task is not None
        assert await interrupted(gone, drain) is Reason.CLIENT_GONE
        assert task.cancelling() == 0
        await asyncio.sleep(0)  # no cancellation is left over

    asyncio.run(main())


def test_the_second_step_cuts_and_the_first_does_so_after_the_grace() -> None:
    async def main() -> None:
        for grace_s, steps in ((60, 2), (0.01, 1)):
            drain = Drain(grace_s)
            requests = [asyncio.create_task(interrupted(never, drain)) for _ in range(5)]
            await asyncio.sleep(0)
            for _ in range(steps):
                drain.step()
            assert drain.draining
            assert await asyncio.wait_for(asyncio.gather(*requests), 5) == [Reason.SHUTDOWN] * 5

    asyncio.run(main())


def test_work_that_ends_first_is_not_interrupted() -> None:
    async def main() -> None:
        drain = Drain(60)
        assert await interrupted(never, drain, asyncio.sleep(0)) is None
        drain.step()
        drain.step()
        await asyncio.sleep(0.01)

    asyncio.run(main())


def test_nothing_interrupts_after_disarm() -> None:
    async def main() -> None:
        async with Interruptible(Drain(60)) as block:
            block.watch(gone)
            block.disarm()
            await asyncio.sleep(0.01)

    asyncio.run(main())


def test_cancellation_from_elsewhere_stays_one() -> None:
    async def main() -> None:
        task = asyncio.create_task(interrupted(never, Drain(60)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())


def test_a_deadline_inside_still_works_and_both_at_once_are_told_apart() -> None:
    async def main() -> None:
        drain = Drain(60)

        async def deadline() -> None:
            async with asyncio.timeout(0.01):
                await asyncio.Event().wait()

        with pytest.raises(TimeoutError):
            await interrupted(never, drain, deadline())

        async def at_once() -> None:
            async with asyncio.timeout(None) as timeout:
                timeout.reschedule(asyncio.get_running_loop().time())
                drain.cut()
                await asyncio.Event().wait()

        task = asyncio.create_task(interrupted(never, drain, at_once()))
        assert await task is Reason.SHUTDOWN

    asyncio.run(main())


def test_an_error_raised_while_being_interrupted_is_kept() -> None:
    async def main() -> None:
        async def stubborn() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                raise KeyError("cleanup failed")

        with pytest.raises(KeyError):
            await interrupted(gone, Drain(60), stubborn())
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0

    asyncio.run(main())
