"""Who is slow holds up who sends to it: what was read, counted after the other side took no more."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Any, cast

import pytest

from router.relay.spool import Spool
from router.relay.upstream import PIECE, Connection, Pool, Upstream
from tests.support.relaying import EVENT, EVENTS, LAST, Scene


def test_the_worker_is_not_read_while_the_client_takes_nothing() -> None:
    scene = Scene().started()
    connection = scene.connected()
    connection.comes(EVENTS + EVENT)
    for _ in range(2):
        scene.exchange.pause()
        assert connection.paused
        scene.exchange.resume()
        assert not connection.paused
    connection.comes(LAST)
    scene.settled()


@pytest.mark.parametrize("idle", [False, True])
def test_a_client_that_takes_nothing_before_its_worker_is_there_holds_that_up_too(idle: bool) -> None:
    """Its answer before this one in the pipeline fills what the connection may hold."""
    scene = Scene()
    scene.exchange.pause()
    scene.started(idle=idle)
    connection = scene.pool.made[0] if idle else scene.connected()
    assert connection.paused
    scene.exchange.resume()
    assert not connection.paused
    connection.comes(EVENTS + LAST)
    scene.settled()


def test_who_takes_over_from_a_worker_that_broke_is_held_up_like_that() -> None:
    scene = Scene().started(idle=True)
    scene.exchange.pause()
    scene.pool.made[0].breaks(stale=True)
    connection = scene.connected()
    assert connection.paused
    scene.exchange.gone()
    scene.settled()


def test_a_client_is_not_read_while_its_upload_goes_to_the_disk() -> None:
    async def upload() -> None:
        scene = Scene(path=b"/v1/audio/transcriptions", kind=b"multipart/form-data; boundary=b")
        flow = scene.client.flow
        scene.exchange.begin()
        scene.exchange.feed(b"--b\r\n" + b'Content-Disposition: form-data; name="file"; filename="a"\r\n\r\n')
        assert not flow.paused
        for _ in range(3):
            scene.exchange.feed(b"x" * (1 << 20 | 1))
            assert flow.paused
            held = scene.relay.budget.used
            await _until(lambda: not flow.paused)
            assert scene.relay.budget.used < held
        scene.exchange.gone()
        scene.settled()

    asyncio.run(upload())


class Sink:
    """A worker's connection that takes nothing: whatever is written fills it, as a transport says at once."""

    def __init__(self, connection: Connection, room: int) -> None:
        """``room``: bytes after which it is full."""
        self.written: list[bytes] = []
        self._connection, self._room = connection, room

    def write(self, data: bytes) -> None:
        self.written.append(data)
        if len(data) > self._room:
            self._connection.pause_writing()

    def is_closing(self) -> bool:
        return False

    def abort(self) -> None:
        raise AssertionError("the upload was given up")


class Counted(Spool):
    """Counts what is read of it."""

    __slots__ = ("reads",)

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def read(self, offset: int, count: int, done: Callable[[bytes, OSError | None], None]) -> None:
        self.reads += 1
        super().read(offset, count, done)


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("head", [b"head", b"head" * 20_000], ids=["", "a head that fills the connection"])
def test_an_upload_is_not_read_from_the_disk_while_the_worker_takes_nothing(head: bytes) -> None:
    pieces = [bytes([number]) * PIECE for number in range(4)]

    async def upload() -> None:
        spool = Counted()
        for piece in pieces:
            written = asyncio.get_running_loop().create_future()
            spool.append(piece, written.set_result)
            assert await written is None
        connection = Connection(cast(Pool, None), cast(Upstream, None))
        sink = Sink(connection, 64 << 10)
        connection.connection_made(cast(asyncio.Transport, sink))
        connection.ask(cast(Any, None), head, b"rest", spool, True)
        for sent in range(len(head) <= 64 << 10, len(pieces) + 1):
            await _until(lambda sent=sent: len(sink.written) > sent)  # type: ignore[misc]
            await asyncio.sleep(0.02)
            assert (spool.reads, len(sink.written)) == (sent, 1 + sent)
            connection.resume_writing()
        assert b"".join(sink.written) == head + b"".join(pieces) + b"rest"
        spool.close()

    asyncio.run(upload())


@pytest.mark.parametrize("whole", [True, False])
def test_an_upload_goes_on_when_its_answer_has_begun_and_then_the_file_is_let_go(whole: bool) -> None:
    """With an answer the body is given up: it won't be sent to anybody else."""
    pieces = [bytes([number]) * PIECE for number in range(3)]

    async def upload() -> None:
        spool = Counted()
        written = asyncio.get_running_loop().create_future()
        spool.append(b"".join(pieces), written.set_result)
        await written
        files = len(os.listdir("/proc/self/fd"))
        connection = Connection(Pool(1.0), cast(Upstream, None))
        sink = Sink(connection, 64 << 10)
        connection.connection_made(cast(asyncio.Transport, sink))
        connection.ask(cast(Any, None), b"head", b"rest", spool, True)
        await _until(lambda: len(sink.written) > 1)
        spool.close()
        if whole:
            await _until(lambda: connection.resume_writing() or sink.written[-1] == b"rest")  # type: ignore[func-returns-value]
            assert b"".join(sink.written) == b"head" + b"".join(pieces) + b"rest"
        else:
            connection.connection_lost(None)
        assert len(os.listdir("/proc/self/fd")) == files - 1

    asyncio.run(upload())
