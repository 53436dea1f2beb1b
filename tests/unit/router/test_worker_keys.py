"""Workers' keys: which one a worker gets, from which file, and that all who ask it send it."""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from aiohttp import web

import helios.watched
from helios.config import KvEventsSettings, RouterSettings, WorkerSettings
from helios.errors import UsageError
from helios.metrics import RouterMetrics
from router import worker_keys
from router.checks import Checks
from router.kv.dialogue import Answer, Question, listen
from router.kv.owner import Owner
from router.scraper import Scraper
from router.worker import Worker
from router.worker_keys import AGAIN_S, WorkerKeys
from router.workers import Workers

TLS = ssl.create_default_context()
SENT = [(b"authorization", b"Bearer client's"), (b"accept", b"a"), (b"x-api-key", b"client's")]


def known(*settings: WorkerSettings, source: str = "file") -> tuple[Workers, Sequence[Worker]]:
    workers = Workers([], time.monotonic)
    assert workers.apply(source, settings) == []
    return workers, list(workers.all)


def test_a_worker_gets_its_own_key_or_that_of_all_and_nothing_of_the_client(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("first\n")
    (tmp_path / "all").write_text("any")
    one = WorkerSettings(model="m", url="http://w:1", key_file=str(tmp_path / "one"))
    _, (first, other) = known(one, WorkerSettings(model="m", url="http://v:1"))
    keys = WorkerKeys(str(tmp_path / "all"))
    assert keys.in_place(SENT, first, ours=False) == [(b"accept", b"a"), (b"authorization", b"Bearer first")]
    assert keys.in_place(SENT, other, ours=True) == [(b"accept", b"a"), (b"authorization", b"Bearer any")]
    assert keys.headers(other) == {"authorization": "Bearer any"}
    none = WorkerKeys()
    assert none.in_place(SENT, other, ours=False) is SENT
    assert none.in_place(SENT, other, ours=True) == [(b"accept", b"a")]
    assert none.headers(other) == {}


def test_a_key_is_read_again_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(helios.watched, "LOOK_AGAIN_S", 0.0)
    (tmp_path / "key").write_text("old")
    _, (worker,) = known(WorkerSettings(model="m", url="http://w:1"))
    keys = WorkerKeys(str(tmp_path / "key"))
    assert keys.of(worker) == b"old"
    (tmp_path / "new").write_text("new-one")
    (tmp_path / "new").replace(tmp_path / "key")
    assert keys.of(worker) == b"new-one"
    (tmp_path / "key").write_text("two\nlines")
    assert keys.of(worker) == b"new-one"


def test_a_key_that_can_not_be_read_is_none_until_it_can_be(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    _, (worker,) = known(WorkerSettings(model="m", url="http://w:1", key_file=str(tmp_path / "key")))
    keys = WorkerKeys(clock=lambda: now)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert keys.in_place(SENT, worker, ours=False) == [(b"accept", b"a")]  # the client's is not for the worker
            assert keys.headers(worker) == {}
            now += AGAIN_S
    assert len(caplog.records) == 1
    (tmp_path / "key").write_text("here")
    assert keys.of(worker) == b"here"


def test_the_files_of_the_configuration_are_read_before_the_start(tmp_path: Path) -> None:
    (tmp_path / "two").write_text("a b")
    for wrong, why in ((tmp_path / "none", "can't be read"), (tmp_path / "two", "holds no token")):
        settings = RouterSettings(workers=[WorkerSettings(model="m", url="http://w:1", key_file=str(wrong))])
        with pytest.raises(UsageError, match=why):
            worker_keys.check(settings)
        with pytest.raises(UsageError, match=why):
            worker_keys.check(RouterSettings(worker_key_file=str(wrong)))


def test_a_key_s_file_may_be_said_by_one_entry_or_source_and_two_contradict_each_other() -> None:
    workers, (worker,) = known(
        WorkerSettings(model="m", url="http://w:1"), WorkerSettings(model="n", url="http://w:1", key_file="/k")
    )
    assert worker.key_file == "/k"
    assert workers.apply("kubernetes", [WorkerSettings(model="m", url="http://w:1")]) == []
    assert worker.key_file == "/k"
    workers.apply("other", [WorkerSettings(model="m", url="http://w:1", key_file="/l")])
    assert "two files of keys: /k and /l" in str(workers.problems["other"])
    workers.apply("file", [WorkerSettings(model="m", url="http://w:1")])
    assert worker.key_file == "/l"


def test_all_who_ask_a_worker_send_its_key(tmp_path: Path) -> None:
    """As behind a proxy that lets nothing pass without it."""
    (tmp_path / "key").write_text("k-1")

    async def answer(request: web.Request) -> web.Response:
        if request.headers.get("authorization") != "Bearer k-1":
            return web.Response(status=401)
        return {
            "/health": web.Response(),
            "/v1/models": web.json_response({"data": [{"id": "m", "object": "model"}]}),
            "/metrics": web.Response(text="vllm:num_requests_running 1\nvllm:num_requests_waiting 7\n"),
            "/tokenize": web.json_response({"tokens": [1, 2]}),
        }[request.path]

    async def main() -> None:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        workers, (worker,) = known(WorkerSettings(model="m", url=url, key_file=str(tmp_path / "key")))
        keys = WorkerKeys()
        owner = Owner(KvEventsSettings(wait_s=10), workers, RouterMetrics(), TLS, keys)
        heard: asyncio.Queue[Answer] = asyncio.Queue()
        asker = cast(Any, SimpleNamespace(answer=heard.put_nowait))
        try:
            async with (
                asyncio.timeout(20),
                Checks(workers, 0.05, 5, TLS, keys, lambda worker: None).running(),
                Scraper(workers, 0.05, time.monotonic, TLS, keys, lambda worker: None).running(),
                owner.running(listen()),
            ):
                owner.asked(Question(1, "m", None, None, text=b'{"prompt": "x"}'), asker)
                assert (await heard.get()).length == 2
                while not (worker.up and worker.cards and worker.metrics):
                    await asyncio.sleep(0.01)
        finally:
            await runner.cleanup()

    asyncio.run(main())
