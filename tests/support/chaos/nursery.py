"""Workers as processes of their own, forked in milliseconds: ``python -m tests.support.chaos.nursery BOARD JOURNAL``.

A line ``start SLOT LIFE`` on standard input forks a worker, which says ``SLOT PID PORT`` when it listens. Who
commands it kills it, stops it, and sets its mode on the board; a dead one stays a zombie until its slot is started
again, so that its pid names nobody else. All of them end with the nursery, and that with its standard input.

A worker is a small HTTP server. For each request that came whole the journal gets a line ``t ID SLOT LIFE``, and for
each answer that it spoils ``s ID SLOT LIFE``, before it does so.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import re
import signal
import socket
import struct
import sys
from pathlib import Path
from typing import Any, Final

from tests.support.chaos import answers
from tests.support.chaos.board import Board, Count, Mode

LOOK_S: Final = 0.05
"""How often a worker looks at its mode for what no request brings about."""
SLOW_S: Final = 0.4
SETTLE_S: Final = 0.02
"""Between bytes sent and a broken connection, so that the other side has read them."""
PR_SET_PDEATHSIG: Final = 1
LENGTH: Final = re.compile(rb"\r\ncontent-length: (\d+)", re.IGNORECASE)
IDENTITY: Final = re.compile(rb"\r\nx-request-id: ([^\r]*)", re.IGNORECASE)
JSON: Final = b"content-type: application/json\r\ncontent-length: %d\r\n"


def bound(port: int) -> socket.socket:
    """A socket on the port, which the nursery keeps bound as well: so nobody else gets it meanwhile."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind(("127.0.0.1", port))
    return sock


class Worker:
    def __init__(self, slot: int, life: int, port: int, board: Board, journal: int) -> None:
        self.slot, self.life, self._port, self.board, self._journal = slot, life, port, board, journal
        self.connections: set[Connection] = set()
        self.tokens = 0

    @property
    def mode(self) -> Mode:
        return self.board.mode(self.slot)

    def note(self, what: bytes, identity: bytes) -> None:
        os.write(self._journal, b"%b %b %d %d\n" % (what, identity, self.slot, self.life))

    async def run(self) -> None:
        sock, server = await self._listen()
        os.write(1, b"%d %d %d\n" % (self.slot, os.getpid(), self._port))
        while True:
            await asyncio.sleep(LOOK_S)
            if self.mode is Mode.REFUSES and server is not None:
                await self._take_in(sock)
                server.close()
                server = None
                for connection in list(self.connections):
                    connection.close_if_idle()
            elif self.mode is not Mode.REFUSES and server is None:
                sock, server = await self._listen()

    async def _listen(self) -> tuple[socket.socket, asyncio.Server | None]:
        sock = bound(self._port)
        sock.listen(1024)
        sock.setblocking(False)
        return sock, await asyncio.get_running_loop().create_server(lambda: Connection(self), sock=sock)

    async def _take_in(self, sock: socket.socket) -> None:
        """Take the connections that wait: closing the socket would break them off."""
        waiting = []
        with contextlib.suppress(BlockingIOError):
            while True:
                waiting.append(sock.accept()[0])
        for one in waiting:
            await asyncio.get_running_loop().connect_accepted_socket(lambda: Connection(self), one)


class Connection(asyncio.Protocol):
    """One connection of the router."""

    def __init__(self, worker: Worker) -> None:
        self._worker, self._buffer, self._counted = worker, b"", False
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._worker.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._worker.connections.discard(self)
        if self._task is not None:
            self._task.cancel()
        if self._counted:
            self._worker.board.add(self._worker.slot, Count.OPEN, -1)

    def close_if_idle(self) -> None:
        if self._counted and self._task is None and not self._buffer:
            self._transport.close()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        self._take()

    def _take(self) -> None:
        """Begin with the next request, if it is whole and the one before is answered."""
        head, found, rest = self._buffer.partition(b"\r\n\r\n")
        length = LENGTH.search(head)
        size = int(length[1]) if length else 0
        if not found or len(rest) < size or self._task is not None:
            return
        self._buffer = b""
        method, path, _ = head.split(b" ", 2)
        if method == b"GET":
            self._show(path)
            return
        if not self._counted:
            self._counted = True
            self._worker.board.add(self._worker.slot, Count.OPEN, 1)
        identity = IDENTITY.search(head)
        self._task = asyncio.ensure_future(self._work(path, identity[1] if identity else b"-", json.loads(rest)))
        self._task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._task = None
        if not task.cancelled():
            task.result()
        if self._worker.mode is Mode.REFUSES:
            self._transport.close()
        elif not self._transport.is_closing():
            self._take()

    def _show(self, path: bytes) -> None:
        if path == b"/v1/models":
            self._answer(b"200 OK", b'{"object":"list","data":[{"id":"chaos","object":"model"}]}')
        elif path == b"/metrics":
            body = b'vllm:generation_tokens_total{model_name="chaos"} %d\n' % self._worker.tokens
            self._answer(b"200 OK", body)
        else:
            self._answer(b"200 OK", b"")

    def _answer(self, status: bytes, body: bytes) -> None:
        worker = b"x-worker: %d.%d\r\n" % (self._worker.slot, self._worker.life)
        self._transport.write(b"HTTP/1.1 " + status + b"\r\n" + worker + JSON % len(body) + b"\r\n" + body)

    async def _work(self, path: bytes, identity: bytes, asked: dict[str, Any]) -> None:
        worker = self._worker
        worker.note(b"t", identity)
        worker.board.add(worker.slot, Count.TAKEN, 1)
        worker.board.add(worker.slot, Count.BUSY, 1)
        try:
            await self._respond(identity, asked)
        finally:
            worker.board.add(worker.slot, Count.BUSY, -1)

    async def _respond(self, identity: bytes, asked: dict[str, Any]) -> None:
        worker, mode = self._worker, self._worker.mode
        if mode is Mode.SLOW:
            await asyncio.sleep(SLOW_S)
        while worker.mode is Mode.HANGS:
            await asyncio.sleep(LOOK_S)
        if mode in (Mode.GARBAGE, Mode.RESETS):
            await self._break(identity, b"\x16\x03\x01 no HTTP\r\n\r\n" if mode is Mode.GARBAGE else b"")
            return
        if mode is Mode.NOT_TAKEN:
            self._answer(b"503 Service Unavailable", b'{"error":{"message":"busy"}}')
            return
        seed, count = int(asked.get("seed", asked.get("input", "0")) or 0), int(asked.get("max_tokens", 8))
        worker.tokens += count
        if not asked.get("stream"):
            await asyncio.sleep(float(asked.get("pace_s", 0)) * count)
            body = answers.whole(seed, count)
            if mode is not Mode.LATE_GARBAGE:
                self._answer(b"200 OK", body)
                return
            worker.note(b"s", identity)
            self._transport.write(self._head(JSON % len(body)) + body[: len(body) // 2])
            await self._break(identity, b"")
            return
        await self._stream(identity, answers.stream(seed, count), float(asked.get("pace_s", 0)), mode)

    async def _stream(self, identity: bytes, chunks: list[bytes], pace_s: float, mode: Mode) -> None:
        self._transport.write(self._head(b"content-type: text/event-stream\r\ntransfer-encoding: chunked\r\n"))
        for number, piece in enumerate(chunks):
            if mode is Mode.LATE_GARBAGE and number >= len(chunks) // 2:
                await self._break(identity, b"zz no chunk\r\n")
                return
            self._transport.write(piece)
            if pace_s:
                await asyncio.sleep(pace_s)
            self._worker.tokens += 1

    def _head(self, fields: bytes) -> bytes:
        return b"HTTP/1.1 200 OK\r\nx-worker: %d.%d\r\n%b\r\n" % (self._worker.slot, self._worker.life, fields)

    async def _break(self, identity: bytes, last: bytes) -> None:
        """Spoil the answer: send what is no answer, or reset the connection."""
        self._worker.note(b"s", identity)
        if last:
            self._transport.write(last)
        await asyncio.sleep(SETTLE_S)
        if not last:
            linger = struct.pack("ii", 1, 0)
            self._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self._transport.abort()


def serve(slot: int, life: int, port: int, board: Path, journal: Path) -> None:
    """A worker's whole life, in its process."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    shown = Board(board)
    shown.begin(slot)
    writing = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    asyncio.run(Worker(slot, life, port, shown, writing).run())


def main() -> None:
    board, journal = Path(sys.argv[1]), Path(sys.argv[2])
    held: dict[int, socket.socket] = {}
    pids: dict[int, int] = {}
    for line in iter(sys.stdin.readline, ""):
        _, slot, life = line.split()
        number = int(slot)
        if (dead := pids.pop(number, None)) is not None:
            os.waitpid(dead, 0)
        if number not in held:
            held[number] = bound(0)
        if (pid := os.fork()) == 0:
            serve(number, int(life), held[number].getsockname()[1], board, journal)
            os._exit(1)
        pids[number] = pid
    for pid in pids.values():
        os.kill(pid, signal.SIGKILL)
    for pid in pids.values():
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
