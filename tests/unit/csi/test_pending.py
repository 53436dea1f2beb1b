"""Who may work on what at the same time."""

import asyncio

import pytest

from csi.errors import Pending
from csi.pending import Locks, Targets


def test_a_second_operation_on_a_target_is_told_what_is_pending():
    targets = Targets()
    with targets.operation("/a", "publishing"):
        with pytest.raises(Pending, match="publishing /a is not done yet"), targets.operation("/a", "unpublishing"):
            pass
        with targets.operation("/b", "publishing"):
            pass
    with pytest.raises(ZeroDivisionError), targets.operation("/a", "publishing"):
        raise ZeroDivisionError
    with targets.operation("/a", "publishing"):
        pass


def test_operations_on_a_volume_take_turns_and_wait_no_longer_than_they_have():
    async def main():
        locks, order = Locks(), []

        async def work(name):
            async with locks.holding("v", 5):
                order.append(f"{name} begins")
                await asyncio.sleep(0.01)
                order.append(f"{name} ends")

        async with locks.holding("v", 5):
            with pytest.raises(Pending, match="the volume v"):
                async with locks.holding("v", 0.02):
                    raise AssertionError("two hold it")
            async with locks.holding("w", 0.02):
                assert locks.busy("w")
            waiting = [asyncio.create_task(work(name)) for name in "ab"]
            gone = asyncio.create_task(work("c"))
            await asyncio.sleep(0.01)
            gone.cancel()
        await asyncio.gather(*waiting)
        assert order == ["a begins", "a ends", "b begins", "b ends"]
        assert not locks.busy("v")
        assert not locks.busy("w")

    asyncio.run(main())
