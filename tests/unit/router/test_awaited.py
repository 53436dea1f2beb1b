"""Models that are waited for, as a process sees them that relays and has to ask another one."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from helios.errors import InvalidInput
from router.discovery import remote
from router.discovery.progress import Phase, Progress
from router.discovery.remote import Awaited
from tests.unit.router.test_availability import HERE, MODEL, Site, running


def test_a_model_is_asked_for_once_a_second_and_answered_at_once():
    now, asked = 0.0, []
    awaited = Awaited(asked.append, lambda: now)
    for _ in range(100):
        assert awaited.want(MODEL).phase is Phase.ASKED
    assert asked == [MODEL]
    awaited.told(Progress(MODEL, Phase.FETCHING, 1, 2))
    assert awaited.want(MODEL).done == 1
    now = 1.0
    awaited.want(MODEL)
    assert asked == [MODEL] * 2
    awaited.told(Progress(MODEL, Phase.SERVED))
    assert awaited.want(MODEL).phase is Phase.ASKED
    awaited.told(Progress("org/other", Phase.WAKING))
    assert awaited.want("org/other").phase is Phase.ASKED, "nobody here had asked for it"
    with pytest.raises(InvalidInput):
        awaited.want("no/such/name")


def test_names_that_clients_make_up_are_bounded(monkeypatch):
    monkeypatch.setattr(remote, "MOST", 10)
    awaited = Awaited(lambda model: None, lambda: 0.0)
    for number in range(50):
        awaited.want(f"made/up{number}")
    assert len(awaited._known) == 10


def test_both_ends_together():
    async def scenario():
        site = Site(running(40), HERE)
        frames: list[bytes] = []

        def tell(progress: Progress) -> None:
            frames.append(msgspec.msgpack.encode(progress))
            awaited.told(msgspec.msgpack.decode(frames[-1], type=Progress))

        site.availability.changed = tell
        awaited = Awaited(lambda model: tell(site.availability.want(model)), lambda: site.now)
        seen = []
        while not seen or seen[-1].phase is not Phase.WAKING:
            seen.append(awaited.want(MODEL))
            await asyncio.sleep(0)
        assert list(dict.fromkeys(one.phase for one in seen)) == [Phase.ASKED, Phase.FETCHING, Phase.WAKING]
        site.served.add(MODEL)
        site.availability.look()
        while site.availability.awaited:
            await asyncio.sleep(0)
        assert len(awaited._known) == 0
        await site.availability.close()

    asyncio.run(scenario())
