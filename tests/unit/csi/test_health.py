"""What is live, what is ready, and who is told when."""

import asyncio

from csi.health import Health


class Calls:
    exhausted = False


def test_it_is_ready_once_it_has_recovered_and_live_before():
    health = Health(Calls(), recovering="no mount")
    assert (health.unready, health.unlive) == ("no mount", "")
    health.waits("a mount that hangs")
    assert health.unready == "a mount that hangs"
    health.recovered()
    assert (health.unready, health.unlive) == ("", "")


def test_what_nothing_can_be_done_with_is_neither_live_nor_ready():
    calls = Calls()
    health = Health(calls)
    assert health.unready == ""
    calls.exhausted = True
    assert health.unlive
    assert health.unready == health.unlive


def test_whoever_waits_hears_of_a_change_and_of_no_repetition():
    async def main():
        health = Health(Calls(), recovering="no mount")
        waiting = asyncio.create_task(health.changed(60))
        await asyncio.sleep(0)
        health.waits("no mount")
        await asyncio.sleep(0)
        assert not waiting.done()
        health.recovered()
        await waiting
        await health.changed(0.01)  # what lies behind is no change

    asyncio.run(main())
