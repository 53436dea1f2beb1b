"""Clients that ask on and on and know each answer beforehand, byte for byte; and clients that leave."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from tests.support.chaos import answers
from tests.support.chaos.fleet import MODEL

ANSWER_S: Final = 90.0
"""A request that takes longer is lost: nothing in a run hangs for so long."""
THINK_S: Final = 0.02
"""Longest pause of a client between two requests."""
LENGTH: Final = re.compile(rb"\r\ncontent-length: (\d+)", re.IGNORECASE)
WORKER: Final = re.compile(rb"\r\nx-worker: (\S+)", re.IGNORECASE)
CODE: Final = re.compile(rb'"code":\s*"(\w+)"')
ERROR_EVENT: Final = re.compile(rb'[0-9a-f]+\r\ndata: \{"error":[^\n]*"code":"(\w+)"[^\n]*\n\n\r\n')
PATHS: Final = {"chat": "/v1/chat/completions", "stream": "/v1/chat/completions", "embedding": "/v1/embeddings"}


class End(Enum):
    """How a request ended for its client."""

    RIGHT = "right"
    CUT = "cut"
    """Less than the answer came after its head, and the client notices."""
    ERROR = "error"
    """A whole answer with an error."""
    BROKEN = "broken"
    """The connection ended without a byte."""
    WRONG = "wrong"
    """Other bytes than the worker sent, or a part that looks like the whole."""
    LATE = "late"
    LEFT = "left"
    """The client went away, and what it had got until then was right."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One request and what became of it; times are ``time.monotonic``'s."""

    identity: str
    kind: str
    began: float
    ended: float
    end: End
    status: int = 0
    code: str = ""
    worker: str = ""
    detail: str = ""

    @property
    def repeatable(self) -> bool:
        return self.kind == "embedding"


@dataclass(frozen=True, slots=True)
class Question:
    identity: str
    kind: str
    seed: int
    count: int
    pace_s: float
    key: str = ""
    """Who asks; empty: nobody in particular."""

    @property
    def wire(self) -> bytes:
        asked: dict[str, Any] = {"model": MODEL, "pace_s": self.pace_s, "max_tokens": self.count}
        if self.kind == "embedding":
            asked |= {"input": str(self.seed)}
        else:
            messages = [{"role": "user", "content": f"tell me of {self.seed}"}]
            asked |= {"seed": self.seed, "stream": self.kind == "stream", "messages": messages}
        body = json.dumps(asked).encode()
        who = f"Authorization: Bearer {self.key}\r\n" if self.key else ""
        return (
            f"POST {PATHS[self.kind]} HTTP/1.1\r\nHost: h\r\nX-Request-Id: {self.identity}\r\n{who}"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        ).encode() + body

    @property
    def answer(self) -> bytes:
        """What follows the head."""
        if self.kind == "stream":
            return b"".join(answers.stream(self.seed, self.count))
        return answers.whole(self.seed, self.count)


class Client:
    """One connection after the other, one request at a time."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._address = address
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def ask(self, question: Question) -> Asked:
        began = time.monotonic()
        found: tuple[Any, ...]
        try:
            async with asyncio.timeout(ANSWER_S):
                found = await self._ask(question)
        except TimeoutError:
            found = (End.LATE,)
        except OSError as error:
            found = (End.BROKEN, 0, "", "", type(error).__name__)
        except asyncio.IncompleteReadError as error:
            found = (End.CUT if error.partial else End.BROKEN, 0, "", "", "inside the head, or an error")
        if found[0] is not End.RIGHT:
            self.close()
        return Asked(question.identity, question.kind, began, time.monotonic(), *found)

    async def leave(self, question: Question, rng: random.Random) -> Asked:
        """Ask for a stream, and go away before its head or after some of it; by RST half of the time."""
        began, after, got, head = time.monotonic(), rng.choice((0, 1, 1, 1, 300)), b"", b""
        end = End.LEFT
        try:
            async with asyncio.timeout(ANSWER_S):
                reader, writer = await self._connected()
                writer.write(question.wire)
                await writer.drain()
                while after and len(got) < after:
                    head = head or await reader.readuntil(b"\r\n\r\n")
                    if not (piece := await reader.read(65536)):
                        break
                    got += piece
                if not question.answer.startswith(got) or (head and b" 200 " not in head[:16]):
                    end = End.WRONG
                if rng.random() < 0.5:
                    linger = struct.pack("ii", 1, 0)
                    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        except (TimeoutError, OSError, asyncio.IncompleteReadError) as error:
            end, got = End.BROKEN, repr(error).encode()
        self.close()
        return Asked(question.identity, "leaves", began, time.monotonic(), end, detail=got[-80:].decode("latin-1"))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.transport.abort()
        self._reader = self._writer = None

    async def _connected(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._reader is None or self._writer is None or self._reader.at_eof() or self._writer.is_closing():
            self.close()
            self._reader, self._writer = await asyncio.open_connection(*self._address)
        return self._reader, self._writer

    async def _ask(self, question: Question) -> tuple[Any, ...]:
        reader, writer = await self._connected()
        writer.write(question.wire)
        head = await reader.readuntil(b"\r\n\r\n")
        status, named = int(head[9:12]), WORKER.search(head)
        worker = named[1].decode() if named else ""
        if b"\r\nconnection: close" in head.lower():
            self._reader = None  # another one is made for the next request
        if status != 200:
            length = LENGTH.search(head)
            body = await reader.readexactly(int(length[1]) if length else 0)
            code = CODE.search(body)
            return End.ERROR, status, code[1].decode() if code else "", worker, body.decode(errors="replace")
        return self._compared(question, await self._body(reader, len(question.answer)), worker)

    async def _body(self, reader: asyncio.StreamReader, size: int) -> bytes:
        got = b""
        while len(got) < size:
            try:
                piece = await reader.read(65536)
            except ConnectionResetError:
                break
            if not piece:
                break
            got += piece
        return got

    def _compared(self, question: Question, got: bytes, worker: str) -> tuple[Any, ...]:
        wanted = question.answer
        if got == wanted:
            return End.RIGHT, 200, "", worker
        if wanted.startswith(got):
            return End.CUT, 200, "", worker, f"{len(got)} of {len(wanted)} bytes"
        whole = 0
        if question.kind == "stream":
            for piece in answers.stream(question.seed, question.count):
                if not got.startswith(piece, whole):
                    break
                whole += len(piece)
            if error := ERROR_EVENT.fullmatch(got, whole):  # behind whole events, and nothing behind it
                return End.CUT, 200, error[1].decode(), worker, f"{whole} of {len(wanted)} bytes"
        return End.WRONG, 200, "", worker, f"{len(got)} bytes, after {whole} of {len(wanted)}: {got[whole:][:80]!r}"


class Load:
    """``clients`` that ask until ``stop``, in a thread of their own. The seed decides what they ask."""

    def __init__(
        self, address: tuple[str, int], clients: int, seed: int, prefix: str = "r", keys: Sequence[str] = ("",)
    ) -> None:
        """``keys``: the clients', in turn."""
        self._address, self._clients, self._seed, self._prefix = address, clients, seed, prefix
        self._keys = keys
        self._over = threading.Event()
        self.asked: list[Asked] = []
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._thread.start()

    def stop(self) -> list[Asked]:
        self._over.set()
        self._thread.join(ANSWER_S + 10)
        if self._thread.is_alive():
            raise RuntimeError("the clients did not end")
        return self.asked

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for number in range(self._clients):
                tasks.create_task(self._client(number))

    async def _client(self, number: int) -> None:
        rng, client = random.Random(f"{self._seed} {number}"), Client(self._address)
        for turn in itertools.count():
            if self._over.is_set():
                break
            kind = rng.choice(("chat", "stream", "stream", "embedding"))
            count = rng.choice((1, 4, 16, 64)) if kind != "embedding" else 8
            pace_s = rng.choice((0, 0.002, 0.01)) if kind != "embedding" else 0
            identity = f"{self._prefix}-{self._seed}-{number}-{turn}"
            key = self._keys[number % len(self._keys)]
            self.asked.append(await client.ask(Question(identity, kind, rng.randrange(1 << 31), count, pace_s, key)))
            if rng.random() < 0.1:
                client.close()  # some come anew
            await asyncio.sleep(rng.random() * THINK_S)
        client.close()


def leave(
    address: tuple[str, int], count: int, at_once: int, seed: int, prefix: str = "l", keys: Sequence[str] = ("",)
) -> list[Asked]:  # fmt: skip
    """``count`` clients, ``at_once`` at a time, that go away inside a stream of many seconds; ``keys``: theirs, in
    turn."""
    rng, numbers, asked = random.Random(seed), iter(range(count)), list[Asked]()

    async def some() -> None:
        for number in numbers:
            key = keys[number % len(keys)]
            question = Question(f"{prefix}-{seed}-{number}", "stream", rng.randrange(1 << 31), 2000, 0.02, key)
            asked.append(await Client(address).leave(question, rng))

    async def all_of_them() -> None:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(at_once):
                tasks.create_task(some())

    asyncio.run(all_of_them())
    return asked


def tally(asked: list[Asked]) -> Counter[str]:
    """How many ended in which way."""
    return Counter(one.end.value for one in asked)
