"""What one process owns for all that relay: models are woken once, and there is one queue, whoever dies."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.vllm.fixtures import allowed_violations, fake_vllm
from tests.support.routing import CHAT, Response, RouterProcess, StartRouter, start_router
from tests.support.wake_hook import Hook, hook

__all__ = ["allowed_violations", "fake_vllm", "hook", "start_router"]
ROUTE = "/v1/chat/completions"


@contextmanager
def only(router: RouterProcess, pid: int) -> Iterator[None]:
    """Connections that are made meanwhile come to one process: the others are stopped."""
    others = [one for one in router.pids() if one != pid]
    for one in others:
        os.kill(one, signal.SIGSTOP)
        while " T " not in Path(f"/proc/{one}/stat").read_text():
            time.sleep(0.001)
    try:
        yield
    finally:
        for one in others:
            os.kill(one, signal.SIGCONT)


class Clients:
    """Requests under way, each at the process that is meant."""

    def __init__(self, router: RouterProcess, pool: ThreadPoolExecutor, wait_for: Any) -> None:
        self._router, self._pool, self._wait_for = router, pool, wait_for

    def ask(
        self, pid: int, count: int = 1, headers: dict[str, str] | None = None, **fields: Any
    ) -> list[Future[Response]]:
        """Requests at a process, in this order, on connections that it has."""
        connections = [self._router.connection(60) for _ in range(count)]
        with only(self._router, pid):
            for connection in connections:
                connection.request("GET", "/healthz")
                connection.getresponse().read()
        body = json.dumps({"model": "tiny", "max_tokens": 4, **CHAT, **fields}).encode()
        for connection in connections:
            connection.request("POST", ROUTE, body, {"content-type": "application/json", **(headers or {})})
        return [self._pool.submit(_answer, connection) for connection in connections]

    def queued(self, count: int) -> None:
        self._wait_for(lambda: self._router.metric("helios_router_queued") == count, what=f"{count} who wait")


def _answer(connection: http.client.HTTPConnection) -> Response:
    with closing(connection):
        answer = connection.getresponse()
        return Response(answer.status, [(k.lower(), v) for k, v in answer.getheaders()], answer.read())


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(40) as pool:
        yield pool


def test_a_model_is_woken_once_for_requests_at_every_process_and_by_the_successor_too(
    fake_vllm: Any, start_router: StartRouter, hook: Hook, wait_for: Any, pool: ThreadPoolExecutor
) -> None:
    fake = fake_vllm("tiny")
    fake.refuse()
    router = start_router(fake, admission=json.dumps({"wake_url": hook.url}), processes=2, wait_up=False)
    clients = Clients(router, pool, wait_for)
    asked = [one for pid in router.pids() for one in clients.ask(pid, 3)]
    clients.queued(6)
    (control,) = router.pids("control")
    os.kill(control, signal.SIGKILL)
    woken = lambda: [m for m in router.messages() if m["message"] == "a model is woken"]  # noqa: E731
    wait_for(lambda: len(woken()) == 2, what="its successor to wake it, too")
    fake.accept()
    assert [one.result(30).status for one in asked] == [200] * 6
    wait_for(lambda: router.metric("helios_router_wakes_total", result="up") == 1)
    assert len(woken()) == 2, "once by each control process"


def test_all_processes_hear_why_a_model_can_not_be_woken(
    fake_vllm: Any, start_router: StartRouter, hook: Hook, wait_for: Any, pool: ThreadPoolExecutor
) -> None:
    fake = fake_vllm("tiny")
    fake.refuse()
    hook.says = 409, {"message": "no GPU is free"}
    router = start_router(fake, admission=json.dumps({"wake_url": hook.url}), processes=2, wait_up=False)
    clients = Clients(router, pool, wait_for)
    for pid in router.pids():
        (answer,) = clients.ask(pid)
        assert answer.result(30).status == 503
        assert "no GPU is free" in answer.result().json()["error"]["message"]
    assert len(hook.asked) == 1, "the second process was told of what the first one had asked for"
    assert router.metric("helios_router_wakes_total", result="failed") == 1


# --- the queue ---


class Busy:
    """A router of two processes before one worker that has one request at a time, the first of which stalls."""

    def __init__(self, fake: Any, router: RouterProcess, clients: Clients, wait_for: Any, key: str = "") -> None:
        self.fake, self.router, self.clients, self.wait_for = fake, router, clients, wait_for
        body = json.dumps({"model": "tiny", "max_tokens": 4, "stream": True, **CHAT}).encode()
        head = f"POST {ROUTE} HTTP/1.1\r\nhost: h\r\nx-api-key: {key}\r\ncontent-length: {len(body)}\r\n\r\n"
        self._stalled = socket.create_connection(router.address)
        self._stalled.sendall(head.encode() + body)
        wait_for(lambda: len(fake.journal()) == 1, what="the request that stalls")

    def goes_on(self) -> None:
        """The client whose request stalls leaves."""
        self._stalled.close()

    def settled(self) -> None:
        """Counters return to zero."""
        router = self.router
        for name in ("queued", "queued_bytes", "in_flight", "in_flight_tokens"):
            self.wait_for(lambda name=name: router.metric(f"helios_router_{name}") == 0, what=f"no {name}")

    def served(self) -> list[str]:
        """The ids of what came to the worker after the request that stalled, in order."""
        return [dict(record["headers"])["x-request-id"] for record in self.fake.journal()[1:]]


MakeBusy = Callable[..., Busy]


@pytest.fixture
def make_busy(fake_vllm: Any, start_router: StartRouter, wait_for: Any, pool: ThreadPoolExecutor) -> Iterator[MakeBusy]:
    made: list[Busy] = []

    def make(key: str = "", queue: dict[str, Any] | None = None, **admission: Any) -> Busy:
        fake = fake_vllm("tiny")
        fake.fault("stall", times=1)
        ours = json.dumps({"queue": {"per_worker": 1, **(queue or {})}, **admission})
        router = start_router(fake, processes=2, admission=ours)
        made.append(Busy(fake, router, Clients(router, pool, wait_for), wait_for, key))
        return made[-1]

    yield make
    for one in made:
        one.goes_on()


def test_two_processes_have_one_queue_in_the_order_in_which_they_came(make_busy: MakeBusy) -> None:
    busy = make_busy(queue={"max_requests": 4})
    one, two = busy.router.pids()
    asked = []
    for number, pid in enumerate((one, two, one, two)):
        asked += busy.clients.ask(pid, headers={"x-request-id": str(number)})
        busy.clients.queued(number + 1)
    for pid in (one, two):  # the bound is that of both together
        (refused,) = busy.clients.ask(pid)
        assert refused.result(30).status == 429
        assert refused.result().json()["error"]["code"] == "queue_full"
        assert "4 requests" in refused.result().json()["error"]["message"]
    busy.goes_on()
    assert [one.result(60).status for one in asked] == [200] * 4
    assert busy.served() == ["0", "1", "2", "3"]
    busy.settled()


def test_tenants_share_whichever_process_they_come_to(make_busy: MakeBusy, helios: Any, tmp_path: Path) -> None:
    keys = str(tmp_path / "keys")
    a, b, c = (str(helios("router", "keys", "create", name, "--file", keys).out).strip() for name in "abc")
    high = str(helios("router", "keys", "create", "d", "--file", keys, "--priority", "high").out).strip()
    busy = make_busy(c, keys=keys)
    one, two = busy.router.pids()
    asked = []
    for pid, key, names in ((one, a, "a0 a1 a2"), (two, b, "b0 b1 b2"), (two, high, "d0")):
        for name in names.split():
            asked += busy.clients.ask(pid, headers={"x-request-id": name, "x-api-key": key})
            busy.clients.queued(len(asked))
    busy.goes_on()
    assert [one.result(60).status for one in asked] == [200] * 7
    assert busy.served() == ["d0", "a0", "b0", "a1", "b1", "a2", "b2"]
    busy.settled()


def test_a_killed_process_leaves_no_place_in_the_queue(make_busy: MakeBusy, wait_for: Any) -> None:
    busy = make_busy(queue={"max_requests": 4})
    pids = busy.router.pids()
    lost = busy.clients.ask(pids[0], 2) + busy.clients.ask(pids[1], 2)
    busy.clients.queued(4)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: len(busy.router.pids()) == 2 and not {*pids} & {*busy.router.pids()}, what="others")
    for one in lost:
        with pytest.raises((OSError, http.client.HTTPException)):
            one.result(30)
    # The one that stalled is gone with its process: a place is free, and there is room in the queue.
    assert [one.result(60).status for pid in busy.router.pids() for one in busy.clients.ask(pid, 4)] == [200] * 8
    busy.settled()


def test_who_waits_outlives_the_control_process(make_busy: MakeBusy, wait_for: Any) -> None:
    busy = make_busy()
    one, two = busy.router.pids()
    asked = busy.clients.ask(one, 3) + busy.clients.ask(two, 3)
    busy.clients.queued(6)
    (control,) = busy.router.pids("control")
    os.kill(control, signal.SIGKILL)
    busy.goes_on()
    assert [one.result(60).status for one in asked] == [200] * 6
    wait_for(lambda: busy.router.pids("control") not in ([], [control]), what="another control process")
    busy.settled()


def test_who_waits_in_processes_that_are_replaced_is_served(make_busy: MakeBusy, wait_for: Any) -> None:
    busy = make_busy()
    router = busy.router
    old = {*router.pids(), *router.pids("control")}
    asked = [one for pid in router.pids() for one in busy.clients.ask(pid, 2)]
    busy.clients.queued(4)
    router.process.send_signal(signal.SIGHUP)
    wait_for(lambda: len({*router.pids()} - old) == 2 and not old & {*router.pids("control")}, timeout_s=40)
    new = [pid for pid in router.pids() if pid not in old]
    asked += [one for pid in new for one in busy.clients.ask(pid, 2)]
    busy.clients.queued(8)
    busy.goes_on()
    assert [one.result(60).status for one in asked] == [200] * 8
    wait_for(lambda: not old & {*router.pids()}, timeout_s=40, what="the old ones to end")
    busy.settled()
