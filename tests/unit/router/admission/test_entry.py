"""Requests on their way in, through real exchanges: limits, the queue, waking, aliases; nothing is held afterwards."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from helios.config import AdmissionSettings, LimitSettings, QueueSettings, RouterSettings, WorkerSettings
from helios.metrics import RouterMetrics
from router.admission.admission import Admission
from router.admission.buckets import LocalLimits
from router.admission.waking import RETRY_S, Report, Waker, Waking
from router.relay.exchange import Exchange
from router.relay.protocol import RelayProtocol
from router.relay.relay import Relay
from router.relay.upstream import Asker, Connection
from router.resilience.resilience import Resilience
from router.routes import RAW_ROUTES
from router.scheduling.configured import policy_of
from router.workers import Workers

WHOLE = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
EVENTS = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\nx-own: 1\r\n\r\n"
EVENT = b"d\r\ndata: hello\n\n\r\n"
LAST = b"0\r\n\r\n"
CHAT = "/v1/chat/completions"


class Transport:
    def __init__(self) -> None:
        self.written, self.ended = b"", ""

    def write(self, data: bytes) -> None:
        assert not self.ended
        self.written += data

    def abort(self) -> None:
        self.ended = self.ended or "aborted"


class Client:
    def __init__(self) -> None:
        self.transport = Transport()
        self.over = 0

    def close_soon(self) -> None:
        self.transport.ended = self.transport.ended or "closed"

    def answered(self, exchange: Exchange) -> None:
        self.over += 1


class Worker:
    """The worker's side of one dispatch: a connection that is being made, then answers."""

    def __init__(self, asker: Asker) -> None:
        from router.relay.framing import Framing

        self.waiting: Asker | None = asker
        self.framing = Framing()
        self.asked, self.asker, self.told = b"", cast(Asker | None, None), False

    def cancel(self) -> None:
        self.waiting = None

    def connects(self) -> None:
        asker, self.waiting = self.waiting, None
        assert asker is not None
        asker.connected(cast(Connection, self))

    def refuses(self) -> None:
        asker, self.waiting = self.waiting, None
        assert asker is not None
        asker.not_connected("connection refused")

    def ask(self, asker: Asker, head: bytes, body: bytes, spool: object, http11: bool) -> None:
        self.asker, self.asked = asker, head + body
        self.framing.begin(http11)

    def free(self) -> None:
        self.asker = None

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def answers(self, data: bytes) -> None:
        assert self.asker is not None
        piece = self.framing.feed(data)
        if self.framing.head is not None:
            head, self.told = (None if self.told else self.framing.head), True
            self.asker.came(head, piece, self.framing.ended)

    def answers_whole(self, document: Any = None) -> None:
        content = json.dumps(document or {}).encode()
        self.answers(WHOLE % (len(content), content))


class Sleeper(Waker):
    """Never done by itself: models come up when the test says so."""

    async def wake(self, model: str, report: Report) -> None: ...


class Scene:
    def __init__(
        self, *, waker: bool = False, workers: int = 1, aliases: dict[str, str] | None = None, **ours: Any
    ) -> None:
        self.now = 100.0
        self.made: list[Worker] = []
        self.refused: list[str] = []
        told = {name: ours.pop(name) for name in ("max_in_flight", "max_queued") if name in ours}
        urls = [WorkerSettings(model="m", url=f"http://w{i}:1", **told) for i in range(workers)]
        wake_url = "http://wake:1" if waker else ""
        admission = AdmissionSettings(wake_url=wake_url, **ours)
        settings = RouterSettings(workers=urls, aliases=aliases or {}, admission=admission)
        metrics = RouterMetrics()
        clock = lambda: self.now  # noqa: E731
        resilience = Resilience(settings, metrics)
        self.workers = Workers(settings.workers, clock, guard=resilience.guard)
        self.woken: list[str] = []
        waking = Waking(Sleeper(), self.spawn, clock, admission.queue.waking_s) if waker else None
        self.waking = waking
        self.admission = Admission(settings, self.workers, metrics, waking=waking, clock=clock, now=clock)
        policy = policy_of("least-requests")
        self.relay = Relay(settings, self.workers, policy, metrics, resilience, self.admission)
        self.relay.now = clock
        self.relay.pool = cast(Any, self)
        for worker in self.workers.all:
            worker.health.succeeded()

    @property
    def tokens_left(self) -> float:
        """Of the model's limit."""
        limits = self.admission.limits
        assert isinstance(limits, LocalLimits)
        return min((bucket.level(self.now) for bucket in limits._buckets.values()), default=math.inf)

    def spawn(self, model: str) -> Any:
        self.woken.append(model)
        return type("Task", (), {"cancel": lambda _: None})()

    # --- as a pool ---

    def idle(self, worker: object) -> None: ...

    def forget(self, worker: object) -> None: ...

    def connect(self, worker: object, asker: Asker) -> Worker:
        self.made.append(Worker(asker))
        return self.made[-1]

    # --- requests ---

    def request(self, body: dict[str, Any] | None = None, path: str = CHAT, headers: Any = (), **how: Any) -> Request:
        return Request(self, {"model": "m", **(body or {})}, path, headers, **how)

    def later(self, seconds: float) -> None:
        self.now += seconds
        self.relay.look(self.now)
        self.admission.tick()

    def health(self, up: bool) -> None:
        for worker in self.workers.all:
            for _ in range(2):
                worker.health.succeeded() if up else worker.health.failed("connection refused")

    @property
    def in_flight(self) -> int:
        return sum(worker.in_flight for worker in self.workers.all)

    def settled(self) -> None:
        assert not self.relay.active
        assert not self.relay.dispatches
        assert self.in_flight == 0
        assert (self.admission.room.requests, self.admission.room.bytes, self.relay.budget.used) == (0, 0, 0)


class Request:
    def __init__(self, scene: Scene, body: dict[str, Any], path: str, headers: Any, http11: bool = True) -> None:
        self.client = Client()
        raw = [(b"content-type", b"application/json"), (b"x-request-id", b"id-1"), *headers]
        self.exchange = Exchange(
            scene.relay, cast(RelayProtocol, self.client), RAW_ROUTES[path.encode()], b"", raw,
            http11=http11, keep_alive=http11, expects=False,
        )  # fmt: skip
        self.exchange.begin()
        if not self.exchange.response_complete:
            self.exchange.feed(json.dumps(body).encode())
            self.exchange.complete()

    @property
    def text(self) -> bytes:
        return self.client.transport.written

    @property
    def status(self) -> int:
        return int(self.text[9:12] or 0)

    @property
    def error(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.text.partition(b"\r\n\r\n")[2])["error"]
        return found

    def header(self, name: str) -> str | None:
        head = self.text.partition(b"\r\n\r\n")[0].decode()
        return next((line.partition(": ")[2] for line in head.split("\r\n") if line.startswith(name + ":")), None)


def limits(**per_minute: float) -> dict[str, LimitSettings]:
    return {"m": LimitSettings(**per_minute)}


def test_a_limit_of_requests_is_429_with_retry_after() -> None:
    scene = Scene(models=limits(requests_per_minute=2))
    asked = [scene.request() for _ in range(3)]
    assert [one.status for one in asked] == [0, 0, 429]
    assert asked[2].error["code"] == "rate_limit_exceeded"
    assert asked[2].header("retry-after") == "30"
    for worker in scene.made:
        worker.connects()
        worker.answers_whole()
    scene.settled()


@pytest.mark.parametrize(
    ("answer", "used"),
    [({"usage": {"total_tokens": 15}}, 15), ({}, 112), ({"usage": {"total_tokens": 500}}, 500)],
)
def test_tokens_are_reserved_and_settled_with_what_was_used(answer: dict[str, Any], used: int) -> None:
    scene = Scene(models=limits(tokens_per_minute=600))
    scene.request({"max_tokens": 100, "x": "y" * 8})
    assert scene.tokens_left == 600 - 112
    scene.made[0].connects()
    scene.made[0].answers_whole(answer)
    assert scene.tokens_left == pytest.approx(600 - used, abs=1)
    scene.settled()


@pytest.mark.parametrize("how", ["worker's error", "no worker", "gone before an answer"])
def test_tokens_come_back_when_nothing_was_answered(how: str) -> None:
    scene = Scene(models=limits(tokens_per_minute=600))
    request = scene.request({"max_tokens": 100})
    if how == "worker's error":
        scene.made[0].connects()
        scene.made[0].answers(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")
    elif how == "no worker":
        scene.made[0].refuses()
    else:
        request.exchange.gone()
    assert scene.tokens_left == 600
    scene.settled()


def test_more_tokens_than_a_limit_ever_gives_is_400() -> None:
    request = Scene(models=limits(tokens_per_minute=600)).request({"max_tokens": 601})
    assert request.status == 400
    assert request.error["param"] == "max_tokens"


def test_an_alias_is_replaced_in_the_body_alone() -> None:
    scene = Scene(aliases={"fast": "m"})
    scene.request({"model": "fast", "metadata": {"model": "fast"}})
    scene.made[0].connects()
    head, _, body = scene.made[0].asked.partition(b"\r\n\r\n")
    assert body == b'{"model": "m", "metadata": {"model": "fast"}}'
    assert b"content-length: %d\r\n" % len(body) in head
    scene.made[0].answers_whole()
    scene.settled()


def test_who_waits_is_served_when_an_answer_ends() -> None:
    scene = Scene(queue=QueueSettings(per_worker=1))
    first, second, third = (scene.request() for _ in range(3))
    assert (len(scene.made), scene.admission.room.requests) == (1, 2)
    scene.made[0].connects()
    scene.made[0].answers_whole()
    assert first.status == 200
    assert len(scene.made) == 2
    second.exchange.gone()
    assert len(scene.made) == 3
    scene.made[2].connects()
    scene.made[2].answers_whole()
    assert third.status == 200
    scene.settled()


def test_who_was_called_goes_where_the_place_is() -> None:
    """Whatever the policy would rather have."""
    scene = Scene(queue=QueueSettings(per_worker=1), workers=2)
    requests = [scene.request() for _ in range(3)]
    scene.relay.policy = cast(Any, SimpleNamespace(choose=lambda request, candidates: candidates[0]))
    scene.made[1].connects()
    scene.made[1].answers_whole()
    assert len(scene.made) == 3
    assert [worker.in_flight for worker in scene.workers.all] == [1, 1]
    for request in requests:
        request.exchange.gone()
    scene.settled()


def test_nobody_overtakes_those_who_wait() -> None:
    """Room that came without an answer's end is theirs, too, and found within a tick."""
    scene = Scene(queue=QueueSettings(per_worker=1), workers=2)
    (scene.workers.all and next(iter(scene.workers.all)).health.failed("x")) or None
    next(iter(scene.workers.all)).health.failed("x")
    busy, waits = scene.request(), scene.request()
    scene.health(up=True)
    later = scene.request()
    assert len(scene.made) == 1
    scene.later(0.1)
    assert len(scene.made) == 2
    for request in (busy, waits, later):
        request.exchange.gone()
    scene.settled()


def test_who_waited_in_vain_is_told_so() -> None:
    scene = Scene(queue=QueueSettings(per_worker=1, saturated_s=30))
    scene.request()
    waits = [scene.request() for _ in range(2)]
    scene.later(29)
    assert [one.status for one in waits] == [0, 0]
    scene.later(1)
    assert [one.status for one in waits] == [429, 429]
    assert waits[0].error["code"] == "saturated"
    assert int(waits[0].header("retry-after") or 0) > 0
    assert "0 requests were still ahead" in waits[0].error["message"]


def test_a_full_queue_is_429_at_once() -> None:
    scene = Scene(queue=QueueSettings(per_worker=1, max_requests=1))
    requests = [scene.request() for _ in range(3)]
    assert [one.status for one in requests] == [0, 0, 429]
    assert requests[2].error["code"] == "queue_full"


def test_a_limit_of_requests_in_flight_is_that_of_all_workers_and_more_wait() -> None:
    scene = Scene(workers=2, max_in_flight=3, max_queued=1)
    requests = [scene.request() for _ in range(5)]
    assert [one.status for one in requests] == [0, 0, 0, 0, 429]
    assert (len(scene.made), scene.in_flight, scene.admission.room.requests) == (3, 3, 1)
    assert requests[4].error["code"] == "model_limit_reached"
    assert "no more than 1 wait" in requests[4].error["message"]
    assert int(requests[4].header("retry-after") or 0) > 0
    requests[0].exchange.gone()
    assert (len(scene.made), scene.in_flight, scene.admission.room.requests) == (4, 3, 0)
    for request in requests[1:4]:
        request.exchange.gone()
    scene.settled()


def test_nobody_waits_where_none_may() -> None:
    scene = Scene(max_in_flight=1, max_queued=0)
    requests = [scene.request() for _ in range(3)]
    assert [one.status for one in requests] == [0, 429, 429]
    scene.made[0].connects()
    scene.made[0].answers_whole()
    after = scene.request()
    assert after.status == 0
    after.exchange.gone()
    scene.settled()


def test_who_waits_in_vain_below_the_model_s_limit_is_told_of_it() -> None:
    scene = Scene(max_in_flight=1, queue=QueueSettings(saturated_s=30))
    scene.request()
    waits = scene.request()
    scene.later(30)
    assert (waits.status, waits.error["code"]) == (429, "model_limit_reached")
    assert "answers 1 requests at the same time" in waits.error["message"]


def test_a_limit_that_is_raised_or_taken_back_counts_at_once_for_those_who_wait() -> None:
    scene = Scene(max_in_flight=1)
    requests = [scene.request() for _ in range(4)]
    assert scene.in_flight == 1
    for most, expected in ((2, 2), (None, 4)):
        scene.workers.apply("configuration", [WorkerSettings(model="m", url="http://w0:1", max_in_flight=most)])
        scene.later(0.1)
        assert scene.in_flight == expected
    for request in requests:
        request.exchange.gone()
    scene.settled()


def test_a_sleeping_model_keeps_the_limit_that_its_workers_said() -> None:
    scene = Scene(waker=True, max_queued=2)
    scene.workers.apply("configuration", [])
    assert scene.workers.known("m")
    requests = [scene.request() for _ in range(3)]
    assert [one.status for one in requests] == [0, 0, 429]
    assert scene.woken == ["m"]
    for request in requests:
        request.exchange.gone()
    scene.settled()


def test_a_model_that_is_not_up_is_woken_once_and_then_serves_all() -> None:
    scene = Scene(waker=True)
    scene.health(up=False)
    waits = [scene.request() for _ in range(3)]
    scene.later(500)
    assert scene.woken == ["m"]
    assert [one.status for one in waits] == [0, 0, 0]
    scene.health(up=True)
    scene.later(0.1)
    assert len(scene.made) == 3
    assert scene.waking is not None
    assert scene.waking.models() == []
    for worker in scene.made:
        worker.connects()
        worker.answers_whole()
    assert [one.status for one in waits] == [200, 200, 200]
    scene.settled()


def test_a_model_that_does_not_come_up_is_503_with_its_progress() -> None:
    scene = Scene(waker=True, queue=QueueSettings(waking_s=60))
    scene.health(up=False)
    request = scene.request()
    assert scene.waking is not None
    scene.waking._wakes["m"].progress = "loading weights, 40%"
    scene.later(60)
    assert request.status == 503
    assert request.error["code"] == "model_waking"
    assert "40%" in request.error["message"]
    assert request.header("retry-after")
    scene.settled()


def test_a_model_that_can_not_be_woken_sends_all_away() -> None:
    scene = Scene(waker=True)
    scene.health(up=False)
    request = scene.request()
    waking = scene.waking
    assert waking is not None
    waking._failed("m", waking._wakes["m"], "no GPU is free")
    scene.later(0.1)
    assert request.status == 503
    assert "no GPU is free" in request.error["message"]
    assert scene.request().error["code"] == "no_healthy_worker"
    scene.later(RETRY_S)
    assert scene.request().status == 0
    assert scene.woken == ["m", "m"]


def test_after_waking_the_patience_for_busy_workers_begins() -> None:
    scene = Scene(waker=True, queue=QueueSettings(per_worker=1, waking_s=600, saturated_s=30))
    scene.health(up=False)
    requests = [scene.request() for _ in range(2)]
    scene.later(100)
    scene.health(up=True)
    scene.later(0.1)
    assert len(scene.made) == 1
    scene.later(29)
    assert requests[1].status == 0
    scene.later(2)
    assert requests[1].status == 429


def test_workers_that_go_down_without_a_waker_send_all_away() -> None:
    scene = Scene(queue=QueueSettings(per_worker=1))
    scene.request()
    waits = scene.request()
    scene.health(up=False)
    scene.later(0.1)
    assert waits.status == 503
    assert waits.error["code"] == "no_healthy_worker"


def test_a_worker_that_refuses_while_it_comes_up_is_waited_for() -> None:
    scene = Scene(waker=True)
    scene.health(up=False)
    request = scene.request()
    scene.health(up=True)
    scene.later(0.1)
    scene.made[0].refuses()
    scene.later(0.1)
    scene.made[1].refuses()  # it is down by that
    scene.later(0.1)
    assert (request.status, len(scene.made), scene.admission.room.requests) == (0, 2, 1)
    scene.health(up=True)
    scene.later(0.1)
    scene.made[2].connects()
    scene.made[2].answers_whole()
    assert request.status == 200
    scene.settled()


class Streams:
    """A stream that waits for a busy worker, until comments have begun."""

    def __init__(self, http11: bool = True) -> None:
        self.scene = Scene(queue=QueueSettings(per_worker=1, comment_after_s=5, saturated_s=60))
        self.busy = self.scene.request()
        self.request = self.scene.request({"stream": True}, headers=[(b"accept-encoding", b"gzip")], http11=http11)
        self.scene.later(4.9)
        assert not self.request.text
        self.scene.later(0.1)
        self.scene.later(5)

    def served(self) -> Worker:
        self.busy.exchange.gone()
        self.scene.made[-1].connects()
        return self.scene.made[-1]


def test_a_stream_that_waits_gets_comments_and_then_its_answer() -> None:
    streams = Streams()
    head, _, body = streams.request.text.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream")
    assert body == b"13\r\n: queued, 0 ahead\n\n\r\n" * 2
    worker = streams.served()
    assert b"accept-encoding" not in worker.asked
    worker.answers(EVENTS + EVENT)
    worker.answers(EVENT + LAST)
    assert streams.request.text == head + b"\r\n\r\n" + body + EVENT + EVENT + LAST
    assert streams.request.client.over == 1
    streams.scene.settled()


def test_a_client_of_http10_gets_comments_without_chunks() -> None:
    streams = Streams(http11=False)
    assert streams.request.text.endswith(b"connection: close\r\n\r\n: queued, 0 ahead\n\n: queued, 0 ahead\n\n")
    worker = streams.served()
    worker.answers(EVENTS + EVENT + LAST)
    assert streams.request.text.endswith(b"ahead\n\ndata: hello\n\n")
    streams.scene.settled()


@pytest.mark.parametrize(
    ("answer", "told"),
    [(b'HTTP/1.1 400 Bad\r\ncontent-length: 43\r\n\r\n{"error": {"message": "max_tokens is wrong"}}'[:-2], "400"),
     (b'HTTP/1.1 400 Bad\r\ncontent-length: 45\r\n\r\n{"error": {"message": "max_tokens is wrong"}}', "is wrong"),
     (WHOLE % (2, b"{}"), "no stream")],
)  # fmt: skip
def test_an_error_after_comments_is_an_event(answer: bytes, told: str) -> None:
    streams = Streams()
    streams.served().answers(answer)
    event = streams.request.text.rpartition(b"data: ")[2]
    assert told in json.loads(event.partition(b"\n")[0])["error"]["message"]
    assert streams.request.client.transport.ended == "closed"
    assert not streams.request.text.endswith(LAST)
    streams.scene.settled()


def test_a_stream_that_waits_in_vain_is_told_in_an_event() -> None:
    streams = Streams()
    streams.scene.later(60)
    assert b'"code":"saturated"' in streams.request.text
    assert streams.request.text.count(b"HTTP/1.1") == 1
    assert streams.request.client.transport.ended == "closed"


def test_who_does_not_stream_gets_nothing_before_the_answer() -> None:
    scene = Scene(queue=QueueSettings(per_worker=1, comment_after_s=1))
    scene.request()
    waits = scene.request()
    scene.later(10)
    assert waits.text == b""


class AdmissionModel(RuleBasedStateMachine):
    """Many requests, and anything may happen: each is answered once, and in the end nothing is held."""

    @initialize(per_worker=st.integers(0, 2), waker=st.booleans(), room=st.integers(1, 4))
    def begin(self, per_worker: int, waker: bool, room: int) -> None:
        queue = QueueSettings(per_worker=per_worker, max_requests=room, saturated_s=20, waking_s=40, comment_after_s=3)
        self.scene = Scene(waker=waker, workers=2, queue=queue, models=limits(tokens_per_minute=100_000))
        self.requests: list[Request] = []
        self.per_worker = per_worker

    @rule(stream=st.booleans())
    def comes(self, stream: bool) -> None:
        self.requests.append(self.scene.request({"stream": stream, "max_tokens": 10}))

    def _live(self) -> list[Request]:
        return [one for one in self.requests if not one.exchange.response_complete]

    @precondition(lambda self: self._live())
    @rule(data=st.data())
    def leaves(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self._live())).exchange.gone()

    @rule(well=st.booleans())
    def connection(self, well: bool) -> None:
        for worker in self.scene.made:
            if worker.waiting is not None:
                worker.connects() if well else worker.refuses()
                return

    @rule(answer=st.sampled_from([EVENTS + EVENT, EVENTS + EVENT + LAST, WHOLE % (2, b"{}"), EVENT + LAST]))
    def answer(self, answer: bytes) -> None:
        for worker in self.scene.made:
            if worker.asker is not None and worker.told is not answer.startswith(b"HTTP"):
                worker.answers(answer)
                return

    @rule(seconds=st.sampled_from([0.1, 3, 25, 700]))
    def time(self, seconds: float) -> None:
        self.scene.later(seconds)

    @rule(slow=st.booleans())
    def clients_are_slow(self, slow: bool) -> None:
        for request in self._live()[:1]:
            request.exchange.pause() if slow else request.exchange.resume()

    @precondition(lambda self: len(self.requests) > 3)
    @rule()
    def router_stops(self) -> None:
        self.scene.relay.cut()
        assert not self._live()

    @rule(up=st.booleans())
    def health(self, up: bool) -> None:
        self.scene.health(up)

    @rule()
    def wake_fails(self) -> None:
        waking = self.scene.waking
        if waking is not None and (wake := waking._wakes.get("m")) is not None and wake.failed_at is None:
            waking._failed("m", wake, "no")

    @invariant()
    def everybody_is_somewhere(self) -> None:
        if not hasattr(self, "scene"):
            return
        live = self._live()
        assert len(self.scene.relay.active) == len(live)
        assert self.scene.in_flight + self.scene.admission.room.requests == len(live)
        for request in self.requests:
            assert request.text.count(b"HTTP/1.1 ") <= 1
            assert request.client.over <= 1
        if not live:
            self.scene.settled()

    def teardown(self) -> None:
        if hasattr(self, "scene"):
            for request in self._live():
                request.exchange.gone()
            self.scene.settled()
            if self.requests:
                assert 100_000 - self.scene.tokens_left <= 20 * len(self.requests)


TestAdmission = AdmissionModel.TestCase
TestAdmission.settings = hypothesis_settings(max_examples=60, stateful_step_count=40)
