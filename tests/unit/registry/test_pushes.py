"""Pushes without HTTP: idle ones go, a shutdown interrupts, limits hold."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from helios.errors import NotFound, Unavailable
from helios.names import RepoId
from registry import push_log as module
from registry.push_log import Announced
from registry.pushes import Pushes
from registry.threads import Threads
from tests.unit.registry.conftest import Registry

ONE = RepoId.parse("org/one")
FILES = [Announced("a", 3, False)]


async def body(*parts: bytes, then: asyncio.Event | None = None) -> AsyncIterator[bytes]:
    for part in parts:
        yield part
    if then is not None:
        await then.wait()


def test_an_idle_push_is_dropped_with_what_it_stored(registry: Registry, upkeep: Threads) -> None:
    clock = [0.0]

    async def main() -> None:
        pushes = Pushes(registry.catalog, registry.sessions, idle_s=3600, now=lambda: clock[0])
        idle = await pushes.start(ONE, "main", "", "", FILES)
        await pushes.put_body(idle, "a", body(b"abc"))
        clock[0] += 3000
        fresh = await pushes.start(ONE, "main", "", "", FILES)
        await pushes.put_body(fresh, "a", body(b"xyz"))
        stored = registry.objects()
        clock[0] += 1000
        cleaner = asyncio.ensure_future(pushes.keep_clean(upkeep, interval_s=0.01))
        async with asyncio.timeout(20):
            while registry.objects() == stored:
                await asyncio.sleep(0.01)
        with pytest.raises(NotFound):
            await pushes.state(idle)
        assert (await pushes.commit(fresh)).logical_bytes == 3
        cleaner.cancel()
        await asyncio.wait([cleaner])
        await pushes.aclose()

    asyncio.run(main())
    assert len([key for key in registry.objects() if "/blobs/" in key]) == 1


def test_a_push_that_is_being_sent_is_not_idle(registry: Registry, upkeep: Threads) -> None:
    clock = [0.0]

    async def main() -> None:
        pushes = Pushes(registry.catalog, registry.sessions, idle_s=10, now=lambda: clock[0])
        cleaner = asyncio.ensure_future(pushes.keep_clean(upkeep, interval_s=0.01))
        push = await pushes.start(ONE, "main", "", "", FILES)
        rest = asyncio.Event()

        async def slow() -> AsyncIterator[bytes]:
            yield b"a"
            await rest.wait()
            yield b"bc"

        sending = asyncio.ensure_future(pushes.put_body(push, "a", slow()))
        await asyncio.sleep(0.05)
        clock[0] += 100
        await asyncio.sleep(0.1)
        rest.set()
        assert (await sending).size == 3
        await pushes.commit(push)
        cleaner.cancel()
        await asyncio.wait([cleaner])
        await pushes.aclose()

    asyncio.run(main())


def test_a_shutdown_interrupts_and_leaves_what_others_can_go_on_with(registry: Registry) -> None:
    async def main() -> None:
        pushes = Pushes(registry.catalog, registry.sessions)
        push = await pushes.start(ONE, "main", "", "", [*FILES, Announced("b", 1000, False)])
        await pushes.put_body(push, "a", body(b"abc"))
        sending = asyncio.ensure_future(pushes.put_body(push, "b", body(b"x", then=asyncio.Event())))
        await asyncio.sleep(0.05)
        pushes.interrupt()
        with pytest.raises(Unavailable, match="stopping"):
            await asyncio.wait_for(sending, 10)
        with pytest.raises(Unavailable, match="stopping"):
            await pushes.start(ONE, "main", "", "", FILES)
        await pushes.aclose()
        if not registry.database.kind.shared:
            assert registry.objects() == set()
            assert registry.catalog.repos() == []
            return
        other = Pushes(registry.catalog, registry.sessions)
        await other.put_body(push, "b", body(b"x" * 1000))
        assert (await other.commit(push)).logical_bytes == 1003
        await other.aclose()

    asyncio.run(main())


def test_a_cancelled_sender_ends_its_ingest(registry: Registry) -> None:
    async def main() -> None:
        pushes = Pushes(registry.catalog, registry.sessions)
        push = await pushes.start(ONE, "main", "", "", FILES)
        sending = asyncio.ensure_future(pushes.put_body(push, "a", body(b"a", then=asyncio.Event())))
        await asyncio.sleep(0.05)
        sending.cancel()
        async with asyncio.timeout(10):
            await asyncio.wait([sending])
            await pushes.put_body(push, "a", body(b"abc"))
            await pushes.commit(push)
        await pushes.aclose()

    asyncio.run(main())


def test_too_many_pushes_are_refused(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PUSHES", 2)

    async def main() -> None:
        pushes = Pushes(registry.catalog, registry.sessions)
        first = await pushes.start(ONE, "main", "", "", FILES)
        await pushes.start(ONE, "main", "", "", FILES)
        with pytest.raises(Unavailable, match="2 pushes are under way"):
            await pushes.start(ONE, "main", "", "", FILES)
        await pushes.abort(first)
        await pushes.start(ONE, "main", "", "", FILES)
        await pushes.aclose()

    asyncio.run(main())
