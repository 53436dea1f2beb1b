"""The administration over HTTP: who may do what, and what it says and does. The workers behind it are stand-ins."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
from pathlib import Path

import aiohttp
import jsonschema_rs
import pytest

from helios.demand import Held, Line, Waiting, read_line
from helios.errors import NotFound
from helios.http.server import listen_tcp, listen_unix
from helios.metrics import RouterMetrics
from router.admin import MOST_WATCHES, OPERATIONS, Admin
from router.admin_access import Access, Right
from router.admin_server import MOST, serving
from router.demand.book import Book
from router.demand.counts import ModelCounts, Queued
from router.demand.shown import Shown
from router.discovery.registration import RegistrationSource
from router.discovery.source import Teller
from router.health import Health
from router.resilience.guard import Guard
from router.scheduling.configured import explained
from router.workers import Workers, parse_worker

ADMIN, REGISTRAR, SCALER = "the administrator's token", "the registrar's", "the scaler's"
POLICY = {
    "filters": [{"name": "unsaturated", "queue": 9}],
    "scorers": [{"name": "prefix-cache", "weight": 2}, "least-requests"],
}


class Worker:
    def __init__(self, settings) -> None:
        self.url, self.role, self.revision = settings.url, settings.role, settings.revision
        self.weight, self.adapters, self.models = settings.weight, settings.adapters, [settings.model]
        self.health, self.in_flight, self.cordoned = Health(lambda: 0.0), 0, False
        self.unready = settings.cordoned
        self.guard = Guard(self.url, clock=lambda: 0.0)


class Fleet:
    """Workers as they are told, without anything behind them."""

    def __init__(self) -> None:
        self.by_url: dict[str, Worker] = {}
        self.draining: list[Worker] = []

    @property
    def all(self):
        return self.by_url.values()

    def apply(self, source, workers) -> None:
        urls = {one.url for one in workers}
        self.draining += [worker for url, worker in self.by_url.items() if url not in urls and worker.in_flight]
        self.by_url = {one.url: self.by_url.get(one.url) or Worker(one) for one in workers}

    def _set(self, url: str, cordoned: bool) -> None:
        if url not in self.by_url:
            raise NotFound(url)
        self.by_url[url].cordoned = cordoned

    def cordon(self, url: str) -> None:
        self._set(url, True)

    def uncordon(self, url: str) -> None:
        self._set(url, False)


def tokens(path: Path, token: str) -> str:
    path.write_text(f"{hashlib.sha256(token.encode()).hexdigest()} somebody\n")
    return str(path)


class Site:
    url: str

    def __init__(self, socket: Path, fleet: Fleet) -> None:
        self.socket, self.fleet = socket, fleet
        self.deaf = 0
        """How often the other processes of the router are yet silent."""

    async def heard(self) -> bool:
        self.deaf -= 1
        return self.deaf < 0

    async def call(self, method: str, path: str, body=None, *, token: str | None = ADMIN, unix=False):
        connector = aiohttp.UnixConnector(str(self.socket)) if unix else None
        headers = {} if token is None else {"authorization": f"Bearer {token}"}
        content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        async with aiohttp.ClientSession(connector=connector, headers=headers) as session:
            base = "http://unix" if unix else self.url
            async with session.request(method, base + path, data=content) as answer:
                return answer.status, await answer.json()

    async def register(self, who: str, **more):
        body = {"url": f"http://{who}:8000", "models": ["m"], **more}
        return await self.call("PUT", f"/workers/{who}", body, token=REGISTRAR)


def scenario(run, most: int = MOST):
    async def whole(root: Path) -> None:
        fleet = Fleet()
        source = RegistrationSource(300, Teller("registration", fleet.apply, RouterMetrics()))
        access = Access(tokens(root / "a", ADMIN), tokens(root / "r", REGISTRAR), tokens(root / "d", SCALER))
        site = Site(root / "s", fleet)
        workers = Workers([parse_worker("m=http://w0:8000")], lambda: 7.0)
        demand = Shown(Book(1, lambda: 7.0), workers, 6.0, lambda: 7.0, lambda: False)
        app = Admin(fleet, source, access, explained(POLICY), demand, heard=site.heard, clock=lambda: 7.0).app
        tcp, unix = listen_tcp("127.0.0.1", 0), listen_unix(root / "s")
        async with serving(app, [tcp, unix], most):
            site.url = f"http://127.0.0.1:{tcp.getsockname()[1]}"
            await run(site)

    def test(tmp_path):
        asyncio.run(whole(tmp_path))

    test.__name__ = run.__name__
    return test


@scenario
async def test_the_policy_is_shown_with_all_that_it_goes_by(site: Site):
    status, found = await site.call("GET", "/policies")
    assert status == 200
    assert found["policy"] == {
        "name": None,
        "filters": [{"name": "unsaturated", "queue": 9, "kv_usage": 0.95}],
        "scorers": [
            {"name": "prefix-cache", "weight": 2.0, "entries": 1 << 17, "slack": 0.3},
            {"name": "least-requests", "weight": 1.0},
        ],
        "picker": {"name": "max-score"},
    }
    assert (await site.call("GET", "/state"))[1]["policy"] == found["policy"]
    assert "prefix-cache" in found["known"]["policies"]
    assert found["known"]["pickers"] == ["max-score", "power-of-two", "random", "round-robin"]
    assert (await site.call("GET", "/policies", token=REGISTRAR))[0] == 403


@functools.partial(scenario, most=3)
async def test_connections_have_a_bound_at_each_address(site: Site):
    at, ask = site.url.removeprefix("http://").split(":"), b"GET /openapi.json HTTP/1.1\r\nhost: h\r\n\r\n"
    held = [await asyncio.open_connection(*at) for _ in range(3)]
    for reader, writer in held:
        writer.write(ask)
        assert b" 200 " in await reader.readline()
    reader, writer = await asyncio.open_connection(*at)
    writer.write(ask)
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    assert b" 503 " in head.splitlines()[0]
    assert b"retry-after: 1" in head
    assert json.loads(body)["error"]["code"] == "Unavailable"
    assert (await site.call("GET", "/workers"))[0] == 503
    assert (await site.call("GET", "/workers", token=None, unix=True))[0] == 200
    silent, unheard = await asyncio.open_connection(*at)
    assert await silent.read() == b"", "it is not kept either"
    held[0][1].close()
    while (await site.call("GET", "/workers"))[0] == 503:
        pass
    for one in (*(each for _, each in held), writer, unheard):
        one.close()
        await one.wait_closed()


@scenario
async def test_a_worker_registers_is_shown_cordoned_and_taken_back(site: Site):
    assert await site.register("w1", role="decode", revision="abc", weight=2, adapters=["a"]) == (
        200, {"id": "w1", "url": "http://w1:8000", "lease_s": 30.0},
    )  # fmt: skip
    status, worker = await site.call("GET", "/workers/w1")
    assert status == 200
    assert 29 < worker.pop("lease_s") <= 30
    assert worker == {
        "id": "w1", "url": "http://w1:8000", "models": ["m"], "adapters": ["a"], "role": "decode", "revision": "abc",
        "weight": 2.0, "health": "unknown", "reason": "not checked yet", "since_s": 7.0, "in_flight": 0,
        "cordoned": False, "unready": False, "draining": False, "breaker": "closed", "ejected_s": None,
    }  # fmt: skip
    assert await site.call("POST", "/workers/w1/cordon") == (200, {"in_flight": 0, "everywhere": True})
    assert (await site.call("GET", "/workers"))[1]["workers"][0]["cordoned"] is True
    assert await site.call("POST", "/workers/w1/uncordon") == (200, {"in_flight": 0, "everywhere": True})
    assert not site.fleet.by_url["http://w1:8000"].cordoned
    site.fleet.by_url["http://w1:8000"].in_flight = 3
    assert await site.call("DELETE", "/workers/w1", token=REGISTRAR) == (200, {"everywhere": True})
    state = (await site.call("GET", "/state"))[1]
    assert [(w["id"], w["draining"], w["in_flight"], w["lease_s"]) for w in state["workers"]] == [
        ("w1:8000", True, 3, None)
    ]
    assert (state["models"], state["status"], state["index"]) == ([], "ready", None)


@scenario
async def test_draining_waits_until_the_worker_has_no_requests(site: Site):
    await site.register("w1")
    worker = site.fleet.by_url["http://w1:8000"]
    worker.in_flight = 1
    assert await site.call("POST", "/workers/w1/drain") == (200, {"in_flight": 1, "drained": False, "everywhere": True})
    waiting = asyncio.create_task(site.call("POST", "/workers/w1/drain?wait_s=20"))
    await asyncio.sleep(0.1)
    assert worker.cordoned
    assert not waiting.done()
    worker.in_flight = 0
    assert await waiting == (200, {"in_flight": 0, "drained": True, "everywhere": True})
    site.fleet.by_url["http://w1:8000"].in_flight, site.deaf = 0, 1
    deaf = {"in_flight": 0, "drained": False, "everywhere": False}
    assert await site.call("POST", "/workers/w1/drain") == (200, deaf), "a process may give it requests still"
    site.deaf = 3
    assert (await site.call("POST", "/workers/w1/drain?wait_s=20"))[1]["drained"] is True
    for wrong in ("-1", "601", "nan", "x"):
        assert (await site.call("POST", f"/workers/w1/drain?wait_s={wrong}"))[0] == 400


@scenario
async def test_workers_that_other_sources_know_go_by_their_address(site: Site):
    await site.register("w1")
    site.fleet.by_url["http://10.0.0.1:8000/sub"] = site.fleet.by_url.pop("http://w1:8000")
    site.fleet.by_url["http://10.0.0.1:8000/sub"].url = "http://10.0.0.1:8000/sub"
    assert await site.call("POST", "/workers/10.0.0.1:8000/sub/cordon") == (200, {"in_flight": 0, "everywhere": True})
    assert (await site.call("GET", "/workers/10.0.0.1:8000/sub"))[1]["cordoned"] is True
    assert (await site.call("DELETE", "/workers/10.0.0.1:8000/sub"))[0] == 404, "it is not registered"


@scenario
async def test_who_may_do_what(site: Site):
    for operation in OPERATIONS:
        path = operation.path.replace("{id}", "w1")
        if operation.name == "watch":
            continue
        callers = ((None, Right.NONE), ("wrong", Right.NONE), (REGISTRAR, Right.REGISTER), (SCALER, Right.SCALE))
        for token, right in callers:
            status, body = await site.call(operation.method, path, b"{}", token=token)
            allowed = operation.needs in (right, Right.NONE)
            assert (status not in (401, 403)) == allowed, (operation, token, body)
            if not allowed:
                assert status == (403 if right else 401)
                assert body["error"]["message"]
        status, _ = await site.call(operation.method, path, b"{}", token=None, unix=True)
        assert status not in (401, 403), "the router's own user needs none"


@scenario
async def test_what_is_wrong_is_said(site: Site):
    for body, named in (
        (b"", "truncated"), (b"{", "truncated"), ({"url": "http://h"}, "models"),
        ({"url": "http://h", "models": ["m"], "x": 1}, "`x`"), ({"url": "ftp://h", "models": ["m"]}, "ftp://h"),
        ({"url": "http://h", "models": ["m"], "lease_s": 1e9}, "lease_s"), (b" " * 300_000, "256 KiB"),
        (b"\xff", "malformed"),
    ):  # fmt: skip
        status, answer = await site.call("PUT", "/workers/w1", body)
        assert (status, answer["error"]["code"]) == (400, "InvalidInput"), body
        assert named in answer["error"]["message"]
    await site.register("w1")
    status, answer = await site.call("PUT", "/workers/w2", {"url": "http://W1:8000/", "models": ["n"]})
    assert (status, answer["error"]["code"]) == (409, "Conflict")
    assert "'w1'" in answer["error"]["message"]
    assert (await site.call("POST", "/workers/w3/cordon"))[0] == 404
    assert (await site.call("GET", "/nowhere"))[0] == 404
    assert (await site.call("PATCH", "/workers/w1"))[0] == 405


@scenario
async def test_the_document_describes_what_is_answered(site: Site):
    _, document = await site.call("GET", "/openapi.json", token=None)
    described = {(m.upper(), path) for path, calls in document["paths"].items() for m in calls}
    assert described == {(one.method, one.path) for one in OPERATIONS}
    await site.register("w1")
    bodies = {"register": {"url": "http://h:1", "models": ["m"]}}
    for one in sorted(OPERATIONS, key=lambda one: one.name == "deregister"):
        if one.name == "watch":  # it goes on
            continue
        path = one.path.replace("{id}", "w1")
        status, answer = await site.call(one.method, path, bodies.get(one.name, b"{}"))
        assert status == 200, one
        check(document, one, "200", answer)
        status, answer = await site.call(one.method, path, token="wrong")
        if one.needs is not Right.NONE:
            check(document, one, str(status), answer)


def check(document, operation, status: str, answer) -> None:
    call = document["paths"][operation.path][operation.method.lower()]
    schema = call["responses"][status]["content"]["application/json"]["schema"]
    jsonschema_rs.validator_for({**schema, "components": document["components"]}).validate(answer)


def test_nobody_has_a_token_unless_somebody_is_given_one(tmp_path):
    assert not Access("", "").over_tcp
    assert Access("", tokens(tmp_path / "r", REGISTRAR)).over_tcp
    with pytest.raises(Exception, match="needs a token"):
        Access("", "").demand({"headers": []}, Right.REGISTER)


def test_a_watch_ends_with_its_token_and_leaves_its_place(tmp_path):
    """``MOST_WATCHES`` may look at a time, and who has gone is not one of them."""

    async def run() -> None:
        book = Book(1, lambda: 7.0)
        demand = Shown(book, Workers([], lambda: 7.0), 6.0, lambda: 7.0, lambda: False)
        file = tmp_path / "d"
        access = Access("", "", tokens(file, SCALER))
        source = RegistrationSource(300, Teller("registration", lambda *told: [], RouterMetrics()))
        app = Admin(Fleet(), source, access, explained(POLICY), demand, heard=None).app  # type: ignore[arg-type]
        tcp = listen_tcp("127.0.0.1", 0)
        url = f"http://127.0.0.1:{tcp.getsockname()[1]}/demand/watch"
        session = aiohttp.ClientSession(
            headers={"authorization": f"Bearer {SCALER}"}, connector=aiohttp.TCPConnector(limit=0)
        )
        async with serving(app, [tcp]), session:
            watches = [await session.get(url) for _ in range(MOST_WATCHES)]
            async with session.get(url) as refused:
                assert refused.status == 503
                assert "watch the demand" in (await refused.json())["error"]["message"]
            for one in watches[1:]:
                one.close()
            first = read_line(await watches[0].content.readline())
            assert not first.complete, "no process has said anything"
            book.counted(1, [ModelCounts("m", 3, 6.5, Queued(2, 90, 5.0, waking=True), [])])
            while not (told := read_line(await watches[0].content.readline())).held:
                pass  # said again before
            assert told == Line(book.epoch, True, (Held("m", Waiting(2, 90, 2.0, "worker")),))
            async with asyncio.timeout(5):
                while (again := await session.get(url)).status == 503:
                    await asyncio.sleep(0.01)
            again.close()
            tokens(file, "another")
            async with asyncio.timeout(30):
                while await watches[0].content.readline():
                    book.pulse.beat()

    asyncio.run(run())
