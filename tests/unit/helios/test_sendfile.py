"""Sending files in turns: whole, fair, and never waiting for ever on a client."""

from __future__ import annotations

import asyncio
import gc
import random
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import pytest

from helios.http import sendfile

CONTENT = random.Random(3).randbytes(9_000_001)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[BinaryIO]:
    (tmp_path / "file").write_bytes(CONTENT)
    with open(tmp_path / "file", "rb", buffering=0) as found:
        yield found


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs:
        yield ours, theirs


def receive(sock: socket.socket, count: int) -> bytes:
    out = bytearray()
    while len(out) < count and (part := sock.recv(min(1 << 16, count - len(out)))):
        out += part
    return bytes(out)


def run(
    file: BinaryIO, ours: socket.socket, offset: int, count: int, reader: socket.socket | None
) -> tuple[int, bytes]:
    async def main() -> tuple[int, bytes]:
        with ThreadPoolExecutor(2) as threads:
            sending = asyncio.ensure_future(sendfile.send(threads, ours.fileno(), file.fileno(), offset, count))
            got = await asyncio.to_thread(receive, reader, count) if reader else b""
            return await sending, got

    return asyncio.run(main())


@pytest.mark.parametrize(
    ("offset", "count"), [(0, len(CONTENT)), (1, 1), (4_194_305, 3_000_000), (len(CONTENT) - 1, 1)]
)
def test_the_asked_bytes_arrive(
    file: BinaryIO, pair: tuple[socket.socket, socket.socket], offset: int, count: int
) -> None:
    assert run(file, pair[0], offset, count, pair[1]) == (count, CONTENT[offset : offset + count])


def test_a_client_that_goes_ends_it(file: BinaryIO, pair: tuple[socket.socket, socket.socket]) -> None:
    pair[1].close()
    sent, _ = run(file, pair[0], 0, len(CONTENT), None)
    assert sent < len(CONTENT)


def test_a_client_that_goes_while_it_is_ended_is_no_error(pair: tuple[socket.socket, socket.socket]) -> None:
    """The turn under way is waited for; that the client has gone in it is nothing that asyncio should log."""
    begun, go = threading.Event(), threading.Event()

    def move(_sock: int, _position: int, _most: int) -> int:
        begun.set()
        go.wait(20)
        raise ConnectionResetError

    async def main() -> None:
        with ThreadPoolExecutor(1) as threads:
            sending = asyncio.ensure_future(sendfile.drive(threads, pair[0].fileno(), move, 10))
            assert await asyncio.to_thread(begun.wait, 20)
            sending.cancel()
            asyncio.get_running_loop().call_later(0.05, go.set)
            with pytest.raises(asyncio.CancelledError):
                await sending

    asyncio.run(main())
    gc.collect()


def test_a_client_that_takes_nothing_is_given_up(
    file: BinaryIO, pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sendfile, "STALL_S", 0.2)
    sent, _ = run(file, pair[0], 0, len(CONTENT), None)
    assert 0 < sent < len(CONTENT)


def test_a_file_that_ends_early_is_an_error(file: BinaryIO, pair: tuple[socket.socket, socket.socket]) -> None:
    with pytest.raises(sendfile.FileEnded, match="5 bytes shorter"):
        run(file, pair[0], len(CONTENT) - 10, 15, None)


def test_stalled_clients_hold_no_thread(file: BinaryIO, pair: tuple[socket.socket, socket.socket]) -> None:
    async def main() -> bytes:
        stalled = [socket.socketpair() for _ in range(10)]
        with ThreadPoolExecutor(1) as threads:
            waiting = []
            for ours, _ in stalled:
                ours.setblocking(False)
                call = sendfile.send(threads, ours.fileno(), file.fileno(), 0, len(CONTENT))
                waiting.append(asyncio.ensure_future(call))
            sending = asyncio.ensure_future(sendfile.send(threads, pair[0].fileno(), file.fileno(), 0, len(CONTENT)))
            got = await asyncio.wait_for(asyncio.to_thread(receive, pair[1], len(CONTENT)), 30)
            await sending
            for task in waiting:
                assert not task.done()
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
        for ours, theirs in stalled:
            ours.close()
            theirs.close()
        return got

    assert asyncio.run(main()) == CONTENT
