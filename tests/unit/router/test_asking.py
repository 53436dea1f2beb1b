"""Checks and readings follow the set of workers: real servers, whose set changes while they are asked."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from helios.config import WorkerSettings
from router.checks import Checks
from router.scraper import METRICS_MAX, Scraper
from router.worker_keys import WorkerKeys
from router.workers import Worker, Workers

TLS = ssl.create_default_context()
READING = "vllm:num_requests_running 1\nvllm:num_requests_waiting 7\nvllm:kv_cache_usage_perc 0.5\n"


class Server:
    """Stands for workers: one port, a base path for each."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.text = READING
        self.url, self.well = "", True

    async def answer(self, request: web.Request) -> web.Response:
        self.asked[request.path] += 1
        if request.path.endswith("/health"):
            return web.Response(status=200 if self.well else 503)
        return web.Response(text=self.text) if request.path.endswith("/metrics") else web.Response(status=404)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        app = web.Application()
        app.router.add_get("/{path:.*}", self.answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield
        finally:
            await runner.cleanup()

    def settings(self, *names: str) -> list[WorkerSettings]:
        return [WorkerSettings(model="m", url=f"{self.url}/{name}") for name in names]


async def until(condition: Callable[[], object], what: str) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)
    assert condition(), what


def test_a_worker_that_joins_is_checked_and_one_that_left_no_more() -> None:
    async def scenario() -> None:
        server = Server()
        async with server.running():
            workers = Workers((), time.monotonic)
            workers.apply("file", server.settings("a"))
            decided = list[tuple[str, bool]]()

            def note(worker: Worker) -> None:
                decided.append((worker.url, worker.up))

            async with Checks(workers, 0.05, 5, TLS, WorkerKeys(), note).running():
                (a,) = workers.all
                await until(lambda: a.up, "the first to be up")
                lease = workers.lease(a)
                workers.apply("file", server.settings("b"))
                (b,) = workers.all
                await until(lambda: b.up, "the one that joined to be up")
                before = server.asked["/a/health"]
                await until(lambda: server.asked["/b/health"] > 4, "more checks")
                assert server.asked["/a/health"] <= before + 1
                workers.apply("file", server.settings("a", "b"))
                await until(lambda: server.asked["/a/health"] > before + 2, "it to be checked again")
                lease.end()
            assert a in workers.all
            assert decided == [(a.url, True), (b.url, True)]

    asyncio.run(scenario())


def test_a_worker_is_known_for_what_it_got_since_it_came_up() -> None:
    async def scenario() -> None:
        server = Server()
        async with server.running():
            workers = Workers((), time.monotonic)
            workers.apply("file", server.settings("a"))
            (a,) = workers.all
            async with Checks(workers, 0.05, 5, TLS, WorkerKeys(), lambda _: None).running():
                await until(lambda: a.up, "it to be up")
                home, before = a.home, server.asked["/a/health"]
                await until(lambda: server.asked["/a/health"] > before + 2, "more checks")
                assert a.home == home
                server.well = False
                await until(lambda: not a.up, "it to be down")
                assert a.home == home
                server.well = True
                await until(lambda: a.up, "it to be up again")
                assert a.home != home

    asyncio.run(scenario())


def test_readings_come_grow_old_and_end_with_the_worker(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        server = Server()
        async with server.running():
            workers = Workers((), time.monotonic)
            workers.apply("file", server.settings("a", "b"))
            a, b = workers.all
            a.health.succeeded()
            read = list[Worker]()
            async with Scraper(workers, 0.05, time.monotonic, TLS, WorkerKeys(), read.append).running():
                await until(lambda: a.metrics and b.metrics, "readings")
                assert {a, b} == set(read)
                assert a.metrics is not None
                assert (a.metrics.waiting, a.metrics.kv_usage) == (7, 0.5)
                workers.apply("file", server.settings("a"))
                asked = server.asked["/b/metrics"]
                server.text = "x" * (METRICS_MAX + 1)
                await until(lambda: caplog.records, "a warning")
                last = a.metrics
                await asyncio.sleep(0.1)
                assert a.metrics is last  # what can't be read changes nothing
                assert server.asked["/b/metrics"] <= asked + 1
                now = time.monotonic()
                assert a.fresh_metrics(now, 60) is last
                assert a.fresh_metrics(now + 61, 60) is None
                server.text = READING
                await until(lambda: a.metrics is not last, "a new reading")

    asyncio.run(scenario())
    assert [record.message for record in caplog.records] == ["a worker's metrics can't be read"]
