"""Questions to the owner of the index: nobody waits longer than promised, whatever becomes of the owner."""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from prometheus_client import generate_latest

from helios.config import KvEventsSettings, WorkerSettings
from helios.metrics import RouterMetrics
from router.kv import asking
from router.kv.asking import Lookups
from router.kv.dialogue import Answer, Question, encode, listen, questions
from router.kv.owner import Owner
from router.kv.wire import pack
from router.relay.intake import Budget, Intake
from router.routes import ROUTES
from router.worker_keys import WorkerKeys
from router.workers import Workers
from tests.support.kv_events import BLOCK, decode, stored
from tests.support.kv_events import encode as encoded
from tests.support.loops import WAIT_S, run, until

__all__ = ["run"]

GENERATE = "/inference/v1/generate"
TOKENS = list(range(BLOCK * 3 + 1))


def workers(*urls: str) -> Workers:
    return Workers([WorkerSettings(model="m", url=url) for url in urls or ("http://a:1", "http://b:1")], time.monotonic)


def intake(body: bytes, path: str = GENERATE) -> Intake:
    route = next(route for route in ROUTES if route.path == path)
    whole = Intake(route, (), 1 << 25, Budget(1 << 25))
    whole.feed(body)
    whole.finish()
    return whole


BODY = b'{"model": "m", "token_ids": [%s]}' % b",".join(b"%d" % token for token in TOKENS)


class Scripted:
    """An owner that does what the test says: ``answer`` makes frames of a question."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.asked: list[Question] = []
        self.answer: Callable[[Question], bytes] = lambda question: b""
        self._writers: list[asyncio.StreamWriter] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        cutter = questions()
        try:
            while data := await reader.read(1 << 16):
                for question in cutter.feed(data):
                    self.asked.append(question)
                    writer.write(self.answer(question))
        except ConnectionError:
            pass
        finally:
            writer.close()

    def drop(self) -> None:
        for writer in self._writers:
            writer.close()


@asynccontextmanager
async def asked_by(
    metrics: RouterMetrics, wait_s: float, clock: Callable[[], float] = time.monotonic
) -> AsyncIterator[tuple[Scripted, Lookups]]:
    with listen() as sock:
        owner = Scripted(sock)
        server = await asyncio.start_unix_server(owner.serve, sock=sock.dup())
        lookups = Lookups(sock.getsockname(), wait_s, workers(), metrics, clock)
        try:
            async with lookups.running():
                await until(lambda: lookups._link is not None)
                try:
                    yield owner, lookups
                finally:
                    owner.drop()
        finally:
            server.close()
        await until(lambda: all(writer.transport.is_closing() for writer in owner._writers))
        await asyncio.sleep(0.02)


class Told:
    """What a request was told, and how often."""

    def __init__(self) -> None:
        self.answers: list[Answer | None] = []

    def __call__(self, answer: Answer | None) -> None:
        self.answers.append(answer)


def counted(metrics: RouterMetrics, result: str) -> int:
    for line in generate_latest(metrics.registry).decode().splitlines():
        if line.startswith(f'helios_router_kv_lookups_total{{result="{result}"}}'):
            return int(float(line.rpartition(" ")[2]))
    raise KeyError(result)


def test_each_is_told_its_own_answer_once(run: Callable[[Any], None]) -> None:
    async def main() -> None:
        metrics = RouterMetrics()
        async with asked_by(metrics, WAIT_S) as (owner, lookups):
            owner.answer = lambda q: encode(Answer(q.number, 13, {"http://a:1": len(owner.asked)}))
            told = [Told() for _ in range(50)]
            for one in told:
                assert lookups.ask(GENERATE, "m", intake(BODY), one)
                assert one.answers == []  # never at once
            await until(lambda: all(one.answers for one in told))
            assert sorted(dict(one.answers[0].cached)["http://a:1"] for one in told if one.answers[0]) == [
                *range(1, 51)
            ]
            assert owner.asked[0].tokens == pack(TOKENS)
            assert all(len(one.answers) == 1 for one in told)
            owner.answer = lambda q: encode(Answer(q.number))
            assert lookups.ask(GENERATE, "m", intake(BODY), told[0])
            await until(lambda: told[0].answers[1:] == [None])
        assert (counted(metrics, "known"), counted(metrics, "unknown"), counted(metrics, "late")) == (50, 1, 0)

    run(main())


def test_nothing_is_asked_where_nothing_would_come_of_it() -> None:
    async def main() -> None:
        async with asked_by(RouterMetrics(), 1.0) as (owner, lookups):
            told = Told()
            chat = intake(b'{"model": "m", "messages": []}', "/v1/chat/completions")
            assert lookups.ask("/v1/chat/completions", "m", chat, told)
            assert not lookups.ask("/v1/embeddings", "m", intake(b'{"model": "m", "input": "x"}'), told)
            assert not lookups.ask(GENERATE, "m", intake(b'{"model": "m"}'), told)
            assert not lookups.ask(GENERATE, "other", intake(BODY), told)  # it has one worker at most
            long = intake(b'{"model": "m", "token_ids": [%s1]}' % (b"1," * (asking.BODY_MAX // 2)))
            assert not lookups.ask(GENERATE, "m", long, told)
            await until(lambda: len(owner.asked) == 1)

    asyncio.run(main())


def test_who_is_silent_is_waited_for_once_in_a_while(run: Callable[[Any], None]) -> None:
    now = [1000.0]

    async def main() -> None:
        metrics = RouterMetrics()
        async with asked_by(metrics, 0.01, lambda: now[0]) as (owner, lookups):
            told = Told()
            assert lookups.ask(GENERATE, "m", intake(BODY), told)
            await until(lambda: told.answers == [None])
            assert not lookups.ask(GENERATE, "m", intake(BODY), told)
            owner.answer = lambda q: encode(Answer(q.number, 13))
            now[0] += asking.PROBE_S
            assert lookups.ask(GENERATE, "m", intake(BODY), told)
            assert not lookups.ask(GENERATE, "m", intake(BODY), told)
            await until(lambda: lookups._probe_at is None)
            assert lookups.ask(GENERATE, "m", intake(BODY), told)
            await until(lambda: len(told.answers) == 3)
        assert counted(metrics, "unasked") == 2

    run(main())


@pytest.mark.parametrize("how", ["drop", "garbage", "endless"])
def test_a_lost_owner_is_waited_for_by_nobody_and_found_again(
    run: Callable[[Any], None], how: str, expected_log_errors: Callable[[str], None]
) -> None:
    if how != "drop":
        expected_log_errors("sent what is no answer")

    async def main() -> None:
        async with asked_by(RouterMetrics(), WAIT_S) as (owner, lookups):
            told = Told()
            owner.answer = lambda q: {"drop": b"", "garbage": b"\0\0\0\1\xc1", "endless": b"\xff" * 8}[how]
            assert lookups.ask(GENERATE, "m", intake(BODY), told)
            await until(lambda: owner.asked)
            if how == "drop":
                owner.drop()
            await until(lambda: told.answers == [None])
            assert not lookups.ask(GENERATE, "m", intake(BODY), told)
            await until(lambda: lookups._link is not None)
            owner.answer = lambda q: encode(Answer(q.number, 13))
            assert lookups.ask(GENERATE, "m", intake(BODY), told)
            await until(lambda: told.answers[1:] == [Answer(2, 13, {})])

    run(main())


def test_the_owner_says_what_workers_have_and_of_whom_it_does_not_know(
    run: Callable[[Any], None], expected_log_errors: Callable[[str], None]
) -> None:
    expected_log_errors("what is no question")

    async def main() -> None:
        settings, metrics = KvEventsSettings(), RouterMetrics()
        owner = Owner(settings, workers(), metrics, ssl.create_default_context(), WorkerKeys())
        with listen() as sock:
            lookups = Lookups(sock.getsockname(), WAIT_S, workers(), metrics)
            async with owner.running(sock.dup()), lookups.running():
                await until(lambda: lookups._link is not None)
                for event in decode(encoded([stored([1, 2], None, TOKENS[: 2 * BLOCK])])):
                    assert event is not None
                    list(event.act(owner.index.rank("http://b:1", 0)))
                told = Told()
                assert lookups.ask(GENERATE, "m", intake(BODY), told)
                await until(lambda: told.answers)
                assert told.answers == [Answer(1, len(TOKENS), {"http://b:1": 2 * BLOCK})]
                assert owner.described()["blocks"] == 2
                with socket.socket(socket.AF_UNIX) as other:  # what is no question ends that connection alone
                    other.setblocking(False)
                    other.connect(sock.getsockname())
                    await asyncio.get_running_loop().sock_sendall(other, b"\xff" * 8)
                    assert await asyncio.get_running_loop().sock_recv(other, 1) == b""
                assert lookups.ask(GENERATE, "m", intake(BODY), told)
                await until(lambda: len(told.answers) == 2)

    run(main())
