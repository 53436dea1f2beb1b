"""Answers of others are read whole, however they come, and no further than they may be long."""

from __future__ import annotations

import asyncio
import contextlib
import re
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from helios.http.bodies import at_most, within

ROOT = Path(__file__).parents[3]
PIECES = (b"abc", b"", b"defgh", b"i")
FIRST_PIECE = re.compile(r".*\.content\.read\([^)].*")


@pytest.mark.parametrize(
    ("read", "limit", "expected"),
    [
        (at_most, 100, b"abcdefghi"), (at_most, 9, b"abcdefghi"), (at_most, 4, b"abcd"), (at_most, 3, b"abc"),
        (within, 9, b"abcdefghi"), (within, 8, None),
    ],
)  # fmt: skip
def test_what_comes_in_pieces_is_read_to_its_end_or_to_the_limit(read: Any, limit: int, expected: bytes | None) -> None:
    """A real server that sends a piece, waits, and sends the next."""

    async def run() -> bytes | None:
        ended = asyncio.Event()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 9\r\n\r\n")
            with contextlib.suppress(ConnectionError):  # who has read enough leaves
                for piece in PIECES:
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0.02)
            writer.close()
            ended.set()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()[:2]
        async with server:
            async with aiohttp.ClientSession() as session, session.get(f"http://{host}:{port}/") as answer:
                found: bytes | None = await read(answer.content, limit)
            await ended.wait()
        return found

    assert asyncio.run(run()) == expected


def test_nobody_takes_the_first_piece_for_the_whole() -> None:
    """``content.read(n)`` of aiohttp gives what has come so far."""
    found = []
    for package in ("helios", "heliosfs", "registry", "router", "csi", "orchestrator"):
        for path in sorted((ROOT / package).rglob("*.py")):
            found += [f"{path.relative_to(ROOT)}: {line}" for line in FIRST_PIECE.findall(path.read_text())]
    assert found == []
