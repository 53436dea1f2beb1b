"""Blocking calls: bounded, with deadlines, and left behind when they do not come back."""

import asyncio
import threading
import time

import pytest

from csi.calls import Calls
from helios.errors import DeadlineExceeded, NotFound, Unavailable


def test_what_a_call_returns_or_raises_is_passed_on():
    async def main():
        calls = Calls()
        assert await calls.run("adding", lambda: 1 + 1, 5) == 2
        with pytest.raises(NotFound):
            await calls.run("failing", lambda: (_ for _ in ()).throw(NotFound("x")), 5)

        def late():
            raise TimeoutError("its own")

        with pytest.raises(TimeoutError, match="its own"):
            await calls.run("timing out by itself", late, 5)
        assert not calls.exhausted

    asyncio.run(main())


def test_a_call_that_hangs_is_left_behind_with_its_place_until_it_comes_back():
    async def main():
        calls, gate = Calls(2), threading.Event()
        for _ in range(2):
            with pytest.raises(DeadlineExceeded, match="hanging took longer than"):
                await calls.run("hanging", gate.wait, 0.05)
        assert calls.exhausted
        with pytest.raises(Unavailable, match="2 calls to filesystems"):
            await calls.run("another", lambda: 1, 0.05)
        gate.set()
        assert await calls.run("another", lambda: 1, 5) == 1
        while calls._late:
            await asyncio.sleep(0.01)
        assert not calls.exhausted

    asyncio.run(main())


def test_a_process_ends_though_a_call_hangs():
    begin = time.monotonic()
    gate = threading.Event()

    async def main():
        with pytest.raises(DeadlineExceeded):
            await Calls().run("hanging", gate.wait, 0.01)

    asyncio.run(main())
    assert time.monotonic() - begin < 5
    gate.set()


def test_a_waiter_who_is_cancelled_gives_the_place_back_when_the_call_returns():
    async def main():
        calls, gate = Calls(1), threading.Event()
        task = asyncio.create_task(calls.run("slow", gate.wait, 30))
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        gate.set()
        assert await calls.run("next", lambda: "done", 5) == "done"

    asyncio.run(main())
