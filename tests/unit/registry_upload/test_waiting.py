"""What waits for a commit: sessions of uploaded blobs, spools of xorbs."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path

import pytest

from helios.errors import DeadlineExceeded, EntryNotFound, InvalidInput, Unavailable
from helios.names import RepoId
from registry.body import steady
from registry.hub.upload import pending as pending_module
from registry.hub.upload import spools as spools_module
from registry.hub.upload.pending import Pending
from registry.hub.upload.spools import Spools
from registry.ingest import Source
from registry.receiver import Receiver
from tests.unit.registry.conftest import Registry

ONE, TWO = RepoId.parse("org/one"), RepoId.parse("org/two")


def test_uploaded_blobs_stay_until_they_were_idle_too_long(registry: Registry) -> None:
    clock = [0.0]

    async def main() -> None:
        pending = Pending(registry.sessions, idle_s=100, clock=lambda: clock[0])
        async with pending.of(ONE) as uploading:
            entry = registry.put(b"abc", session=uploading.session)
            uploading.add(entry.sha256)
        stored = registry.objects()
        clock[0] = 90
        pending.drop_idle()
        async with pending.of(ONE) as uploading:
            assert uploading.uploaded(entry.sha256)
        async with pending.of(TWO) as other:
            assert not other.uploaded(entry.sha256)
        assert len(pending) == 1, "nothing waits for the second"
        clock[0] = 180
        pending.drop_idle()
        registry.sessions.clean()
        assert registry.objects() == stored
        async with pending.of(ONE):
            clock[0] = 1000
            pending.drop_idle()
            assert len(pending) == 1, "one that is in use is not idle"
        clock[0] = 1090
        pending.drop_idle()
        clock[0] = 1101
        pending.drop_idle()
        assert len(pending) == 0
        await pending.aclose()

    asyncio.run(main())
    registry.sessions.clean()
    assert registry.objects() == set()


def test_a_session_ends_when_all_is_committed(registry: Registry) -> None:
    async def main() -> None:
        pending = Pending(registry.sessions)
        async with pending.of(ONE) as uploading:
            entry = registry.put(b"abc", session=uploading.session)
            uploading.add(entry.sha256)
        async with pending.of(ONE) as uploading, pending.of(ONE) as beside:
            assert beside.session is uploading.session
            taken = [entry.sha256]
            also = partial(uploading.take, taken)
            registry.catalog.publisher.publish(ONE, "main", {"a": entry}, author="", message="", also=also)
            assert not uploading.uploaded(entry.sha256)
            uploading.committed(taken)
        assert len(pending) == 0
        await pending.aclose()

    asyncio.run(main())
    registry.sessions.clean()
    assert (
        registry.catalog.contents.blob_reader(ONE, registry.catalog.refs(ONE) and _only_blob(registry)).read(0, 3)
        == b"abc"
    )


def _only_blob(registry: Registry) -> str:
    commit = registry.catalog.refs(ONE)["main"]
    return registry.catalog.contents.manifest(ONE, commit).files["a"].sha256


def test_limits(registry: Registry, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pending_module, "MAX_REPOS", 1)
    monkeypatch.setattr(pending_module, "MAX_BLOBS", 1)
    monkeypatch.setattr(spools_module, "MAX_SPOOLS", 1)

    async def main() -> None:
        pending = Pending(registry.sessions)
        async with pending.of(ONE) as uploading:
            uploading.add("a" * 64)
            with pytest.raises(Unavailable, match="wait for their commits"):
                uploading.add("b" * 64)
            with pytest.raises(Unavailable, match="under way"):
                async with pending.of(TWO):
                    pass
        await pending.aclose()

    asyncio.run(main())
    spools = Spools(tmp_path / "spools")
    spools.of(ONE, None)
    with pytest.raises(Unavailable, match="under way"):
        spools.of(TWO, None)


def test_a_session_that_can_not_be_opened_is_no_ones(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_repo: RepoId, **_options: object) -> None:
        raise Unavailable("the disk is full")

    async def main() -> None:
        pending = Pending(registry.sessions)
        with monkeypatch.context() as patch:
            patch.setattr(registry.sessions, "open", full)
            with pytest.raises(Unavailable, match="full"):
                async with pending.of(ONE):
                    pass
        assert len(pending) == 0
        async with pending.of(ONE) as uploading:
            registry.put(b"x", session=uploading.session)
        await pending.aclose()

    asyncio.run(main())


def test_a_shutdown_ends_sessions_that_are_in_use(registry: Registry) -> None:
    async def main() -> None:
        pending = Pending(registry.sessions)
        async with pending.of(ONE) as uploading:
            entry = registry.put(b"abc", session=uploading.session)
            await pending.aclose()
        assert len(pending) == 0
        assert entry.size == 3

    asyncio.run(main())
    registry.sessions.clean()
    assert registry.objects() == set()


def test_a_spool_has_an_address_of_its_own_until_something_of_it_was_committed(tmp_path: Path) -> None:
    clock = [0.0]
    (tmp_path / "spools" / "left").mkdir(parents=True)
    spools = Spools(tmp_path / "spools", idle_s=100, clock=lambda: clock[0])
    assert not (tmp_path / "spools").exists()
    first = spools.of(ONE, None)
    assert spools.of(ONE, None) is first
    assert spools.of(ONE, "acme") is not first
    assert spools.of(TWO, None) is not first
    spools.committed(ONE)
    second = spools.of(ONE, None)
    assert second is not first
    with spools.using(first.name) as spool:
        assert spool is first, "whoever has its address goes on"
        clock[0] = 99
    clock[0] = 150
    assert {path.name for path in spools.drop_idle()} >= {second.name}
    with spools.using(first.name):
        clock[0] = 1000
        assert spools.drop_idle() == []
    clock[0] = 1101
    assert spools.drop_idle() == [first.directory]
    with pytest.raises(EntryNotFound, match="start it again"), spools.using(first.name):
        pass


def test_nobody_is_sent_to_an_old_spool(tmp_path: Path) -> None:
    """What is committed at other processes is not heard of here, and a spool must not grow for ever."""
    clock = [0.0]
    spools = Spools(tmp_path / "spools", idle_s=100, clock=lambda: clock[0])
    first = spools.of(ONE, None)
    clock[0] = 99
    with spools.using(first.name):
        assert spools.of(ONE, None) is first
    clock[0] = 101
    assert spools.of(ONE, None) is not first
    with spools.using(first.name) as spool:
        assert spool is first


async def parts(*data: bytes, then: asyncio.Event | None = None):
    for part in data:
        yield part
    if then is not None:
        await then.wait()


def drain(source: Source) -> bytes:
    out, buffer = b"", memoryview(bytearray(10))
    while count := source.readinto(buffer):
        out += buffer[:count]
    return out


def test_a_receiver_takes_exactly_what_was_announced() -> None:
    async def main() -> None:
        receiver = Receiver()
        assert await receiver.receive(5, "x", parts(b"ab", b"cde"), drain) == b"abcde"
        for body in (parts(b"ab"), parts(b"abcdef")):
            with pytest.raises(InvalidInput, match="x: the body"):
                await receiver.receive(5, "x", body, drain)
        with pytest.raises(ZeroDivisionError):
            await receiver.receive(5, "x", parts(b"abcde"), lambda _source: 1 // 0)
        assert await receiver.run(lambda: 7) == 7
        await receiver.aclose()

    asyncio.run(main())


def test_a_shutdown_ends_what_is_being_received() -> None:
    async def main() -> None:
        receiver, never = Receiver(), asyncio.Event()
        receiving = asyncio.ensure_future(receiver.receive(5, "x", parts(b"ab", then=never), drain))
        await asyncio.sleep(0.05)
        receiver.interrupt()
        with pytest.raises(Unavailable, match="stopping"):
            await asyncio.wait_for(receiving, 10)
        for call in (receiver.receive(1, "x", parts(b"a"), drain), receiver.run(lambda: 1)):
            with pytest.raises(Unavailable, match="stopping"):
                await call
        await receiver.aclose()

    asyncio.run(main())


def test_a_sender_that_leaves_ends_its_ingest() -> None:
    async def main() -> None:
        receiver, ended = Receiver(), asyncio.Event()
        loop = asyncio.get_running_loop()

        def call(source: Source) -> bytes:
            try:
                return drain(source)
            finally:
                loop.call_soon_threadsafe(ended.set)

        receiving = asyncio.ensure_future(receiver.receive(5, "x", parts(b"ab", then=asyncio.Event()), call))
        await asyncio.sleep(0.05)
        receiving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await receiving
        await asyncio.wait_for(ended.wait(), 10)
        await receiver.aclose()

    asyncio.run(main())


def test_a_body_that_stalls_is_given_up() -> None:
    async def main() -> None:
        body = steady(parts(b"a", b"b", then=asyncio.Event()), 0.05)
        assert [await anext(body), await anext(body)] == [b"a", b"b"]
        with pytest.raises(DeadlineExceeded, match="no byte of the body came"):
            await anext(body)
        assert [part async for part in steady(parts(b"a"), 0.05)] == [b"a"]

    asyncio.run(main())
