"""One request, whatever happens in whatever order: it is answered once, and everything it held is given back."""

from __future__ import annotations

import json
from typing import cast

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from helios.config import FallbackRule, FallbackTarget, RetrySettings
from router import errors
from router.kv.asking import Lookups
from router.kv.dialogue import Answer
from router.membership import CONFIGURATION
from router.resilience.breaker import State
from router.resilience.outcome import Outcome
from router.scheduling.request import OUTPUT_USUAL
from router.workers import parse_worker
from tests.support.relaying import BODY, CHAT, EMBED, EVENT, EVENTS, LAST, TRACEPARENT, FakeConnection, Scene


def test_a_request_and_its_answer() -> None:
    scene = Scene().started()
    connection = scene.connected()
    assert connection.asked == (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: a:1\r\ncontent-length: %d\r\nx-request-id: id-1\r\n%b"
        b"content-type: application/json\r\n\r\n%b" % (len(BODY), TRACEPARENT, BODY)
    )
    assert scene.in_flight == 1
    connection.comes(EVENTS + EVENT)
    assert scene.relay.budget.used == 0
    connection.comes(EVENT + LAST)
    assert scene.text.partition(b"\r\n\r\n")[2] == EVENT + EVENT + LAST
    assert connection.ended == "kept"
    assert scene.client.over == [scene.exchange]
    scene.settled()


def test_a_request_goes_on_with_what_the_index_says_or_without() -> None:
    for answer in (Answer(1, 7, {"http://a:1": 5}), None):
        scene = Scene()
        scene.relay.lookups = cast(Lookups, scene.index)
        scene.started()
        assert (scene.in_flight, scene.pool.connecting) == (0, [])
        scene.index.says(answer)
        scene.connected().comes(EVENTS + LAST)
        scene.settled()


def test_what_the_index_says_to_a_client_that_left_is_nothing() -> None:
    for ends in (lambda scene: scene.exchange.gone(), lambda scene: scene.relay.cut()):
        scene = Scene()
        scene.relay.lookups = cast(Lookups, scene.index)
        ends(scene.started())
        scene.settled()
        scene.index.says(Answer(1, 7, {}))
        scene.settled()
        assert scene.pool.connecting == []


def test_a_base_path_and_a_query_are_kept() -> None:
    scene = Scene()
    scene.exchange._said.query = b"a=1"
    next(iter(scene.workers.all)).health.failed("down")
    scene.started()
    assert scene.connected().asked.startswith(b"POST /base/v1/chat/completions?a=1 HTTP/1.1\r\nhost: b:1\r\n")


@pytest.mark.parametrize("tail", [EVENTS, EVENTS + EVENT, EVENTS + EVENT + EVENT])
def test_a_stream_that_breaks_between_events_gets_one_more(tail: bytes) -> None:
    scene = Scene().started()
    connection = scene.connected()
    connection.comes(tail)
    connection.breaks(stale=False)
    sent = scene.text.partition(b"\r\n\r\n")[2].removeprefix(tail.removeprefix(EVENTS))
    size, _, event = sent.partition(b"\r\n")
    assert int(size, 16) == len(event) - 2
    assert event.startswith(b'data: {"error":{')
    assert event.endswith(b"\n\n\r\n")
    assert scene.client.transport.ended == "closed"
    scene.settled()


@pytest.mark.parametrize(
    "tail",
    [
        EVENTS + EVENT[:9],
        EVENTS + EVENT + EVENT[:1],
        EVENTS + EVENT + b"5\r\ndata:\r\n",
        EVENTS.replace(b"text/event-stream", b"text/plain") + EVENT,
        EVENTS.replace(b"\r\n\r\n", b"\r\ncontent-encoding: gzip\r\n\r\n") + EVENT,
    ],
)
def test_a_stream_that_breaks_elsewhere_is_cut(tail: bytes) -> None:
    scene = Scene().started()
    connection = scene.connected()
    connection.comes(tail)
    connection.breaks(stale=False)
    assert b"worker_lost" not in scene.text
    assert not scene.text.endswith(LAST)
    assert scene.client.transport.ended == "closed"
    scene.settled()


def test_an_old_client_gets_its_event_without_a_chunk() -> None:
    scene = Scene(http11=False, keep_alive=False).started()
    connection = scene.connected()
    connection.comes(EVENTS + EVENT)
    connection.breaks(stale=False)
    assert b"\r\n\r\ndata: hello\n\ndata: {" in scene.text
    assert b"connection: close" in scene.text
    scene.settled()


def test_a_stale_connection_is_replaced_by_a_new_one_once() -> None:
    """Not by another kept one: a worker that ends closes all of them, and no request may be lost to that."""
    scene = Scene().started(idle=True)
    scene.pool.made[0].breaks(stale=True)
    assert not scene.text
    assert len(scene.pool.made) == 1
    scene.connected().breaks(stale=True)
    assert b"HTTP/1.1 502" in scene.text
    scene.settled()


def test_workers_that_can_not_be_reached_are_tried_one_after_the_other() -> None:
    scene = Scene().started()
    for _ in range(2):
        scene.connecting().not_connected("connection refused")
    assert len(scene.pool.connecting) == 2
    assert b"HTTP/1.1 503" in scene.text
    assert b"connection refused" in scene.text
    scene.settled()


def test_an_early_refusal_waits_for_its_turn() -> None:
    scene = Scene()
    scene.exchange.refuse(errors.shutting_down())
    assert not scene.text
    scene.exchange.begin()
    assert scene.text.startswith(b"HTTP/1.1 503")
    scene.settled()


def test_who_expects_100_is_told_to_go_on() -> None:
    scene = Scene(expects=True)
    assert not scene.text
    scene.exchange.begin()
    assert scene.text == b"HTTP/1.1 100 Continue\r\n\r\n"


def test_a_request_counts_with_its_tokens_until_it_ends() -> None:
    scene = Scene().started()
    (worker,) = [worker for worker in scene.workers.all if worker.in_flight]
    assert worker.load.tokens == len(BODY) // 4 + 1 + OUTPUT_USUAL
    scene.connected().comes(EVENTS + EVENT + LAST)
    assert worker.load.tokens == 0
    scene.settled()


def test_a_worker_that_left_finishes_its_answer_and_nothing_of_it_stays() -> None:
    scene = Scene().started()
    connection = scene.connected()
    connection.comes(EVENTS + EVENT)
    (worker,) = [worker for worker in scene.workers.all if worker.in_flight]
    scene.workers.apply(CONFIGURATION, [])
    assert list(scene.workers.draining) == [worker]
    connection.comes(EVENT + LAST)
    assert scene.text.endswith(EVENT + EVENT + LAST)
    assert scene.pool.forgotten[-1] is worker  # once more, after its connection was given back
    assert connection.ended == "kept"
    assert not scene.workers.draining
    scene.settled()


def test_a_model_whose_workers_have_just_gone_is_not_unknown() -> None:
    scene = Scene()
    scene.workers.apply(CONFIGURATION, [])
    scene.started()
    assert scene.text.startswith(b"HTTP/1.1 503")
    assert b"it has none now" in scene.text
    scene.settled()


@pytest.mark.parametrize(("status", "told"), [(b"200 OK", 3.0), (b"500 No", 0.0), (b"429 No", 0.0)])
def test_the_worker_s_time_to_the_first_byte_is_noted_for_good_answers(status: bytes, told: float) -> None:
    scene = Scene().started()
    connection = scene.connected()
    (worker,) = [worker for worker in scene.workers.all if worker.in_flight]
    scene.now += 3
    connection.comes(EVENTS.replace(b"200 OK", status))
    assert worker.first_byte[False].value(scene.now) == 0  # a head is no byte of the answer
    connection.comes(EVENT)
    assert worker.first_byte[False].value(scene.now) == told
    assert worker.first_byte[True].value(scene.now) == 0


# --- retries and fallbacks ---

UNAVAILABLE = b"HTTP/1.1 503 No\r\ncontent-length: 4\r\n\r\n"
GATEWAY = b"HTTP/1.1 502 No\r\ncontent-length: 4\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"


def test_an_answer_that_says_not_taken_goes_no_further_than_its_head() -> None:
    scene = Scene().started()
    first = scene.connected()
    first.comes(UNAVAILABLE[:20])
    assert len(scene.pool.connecting) == 1
    first.comes(UNAVAILABLE[20:])
    assert first.ended == "aborted"
    assert not scene.text
    second = scene.connected()
    assert second.asked.startswith(b"POST /base/v1/chat/completions")
    assert second.asked.endswith(BODY)
    second.comes(OK)
    assert scene.text.startswith(b"HTTP/1.1 200")
    scene.settled()


def test_an_answer_goes_on_when_there_is_nobody_else() -> None:
    scene = Scene().started()
    for _ in range(2):
        connection = scene.connected()
        connection.comes(UNAVAILABLE)
    assert scene.text.startswith(b"HTTP/1.1 503 ")
    connection.comes(b"oops")
    assert scene.text.endswith(b"oops")
    scene.settled()


@pytest.mark.parametrize(
    ("path", "answer", "retries", "again"),
    [
        (CHAT, GATEWAY, RetrySettings(), False),
        (CHAT, GATEWAY, RetrySettings(retry_generation=True), True),
        (EMBED, GATEWAY, RetrySettings(), True),
        (EMBED, GATEWAY, RetrySettings(most=0), False),
        (EMBED, GATEWAY, RetrySettings(budget_floor_per_s=0), False),
        (CHAT, UNAVAILABLE.replace(b"503", b"429"), RetrySettings(), False),
        (CHAT, UNAVAILABLE.replace(b"503", b"429"), RetrySettings(retry_429=True), True),
        (EMBED, UNAVAILABLE.replace(b"503", b"500"), RetrySettings(), False),
    ],
)
def test_which_answers_are_retried(path: bytes, answer: bytes, retries: RetrySettings, again: bool) -> None:
    scene = Scene(path=path, retries=retries).started()
    scene.connected().comes(answer)
    assert (len(scene.pool.connecting) == 2) == again
    assert bool(scene.text) != again


@pytest.mark.parametrize(
    ("path", "retries", "again"),
    [
        (CHAT, RetrySettings(), False),
        (CHAT, RetrySettings(retry_generation=True), True),
        (EMBED, RetrySettings(), True),
    ],
)
@pytest.mark.parametrize("how", ["breaks", "garbage", "hung"])
def test_what_may_have_begun_is_repeated_only_where_that_is_harmless(
    path: bytes, retries: RetrySettings, again: bool, how: str
) -> None:
    scene = Scene(path=path, retries=retries).started()
    connection = scene.connected()
    if how == "breaks":
        connection.breaks(stale=False)
    elif how == "garbage":
        connection.comes(b"NONSENSE\r\n\r\n")
    else:
        (worker,) = (worker for worker in scene.workers.all if worker.in_flight)
        scene.relay.hung(worker)
    assert (len(scene.pool.connecting) == 2) == again
    assert (b"HTTP/1.1 502" in scene.text) == (not again and how != "hung")


def test_nothing_is_repeated_once_something_was_passed_on() -> None:
    scene = Scene(path=EMBED).started()
    connection = scene.connected()
    connection.comes(OK[:-2])
    connection.breaks(stale=False)
    assert len(scene.pool.connecting) == 1
    assert scene.client.transport.ended == "closed"
    scene.settled()


def test_another_model_serves_when_no_worker_can() -> None:
    scene = Scene(fallbacks=[FallbackRule(model="m", to=[FallbackTarget(model="n")])]).started()
    for _ in range(2):
        scene.connecting().not_connected("connection refused")
    connection = scene.connected()
    head, _, body = connection.asked.partition(b"\r\n\r\n")
    assert b"host: c:1\r\ncontent-length: %d\r\n" % len(body) in head
    assert json.loads(body) == {"model": "n", "messages": []}
    connection.comes(OK)
    assert b"x-helios-fallback: n\r\n" in scene.text
    scene.settled()


def test_endpoints_follow_each_other_and_then_the_client_is_told() -> None:
    to = [FallbackTarget(model=f"g{n}", url=f"https://cloud{n}/v1") for n in (1, 2)]
    scene = Scene(fallbacks=[FallbackRule(model="m", to=to)]).started()
    for _ in range(2):
        scene.connecting().not_connected("connection refused")
    first = scene.connected()
    assert b"host: cloud1\r\n" in first.asked
    first.comes(UNAVAILABLE)
    second = scene.connected()
    assert second.asked.startswith(b"POST /v1/chat/completions HTTP/1.1\r\nhost: cloud2\r\n")
    assert json.loads(second.asked.partition(b"\r\n\r\n")[2])["model"] == "g2"
    second.comes(b"HTTP/1.1 429 No\r\nx-request-id: theirs\r\nset-cookie: a=b\r\ncontent-length: 0\r\n\r\n")
    assert scene.text.startswith(b"HTTP/1.1 429")
    assert b"x-helios-fallback: g2\r\nx-request-id: id-1\r\n" in scene.text
    assert b"theirs" not in scene.text
    assert b"cookie" not in scene.text
    scene.settled()
    scene = Scene(fallbacks=[FallbackRule(model="m", to=to)]).started()
    for _ in range(4):
        scene.connecting().not_connected("connection refused")
    assert b"HTTP/1.1 503" in scene.text
    scene.settled()


def test_what_becomes_of_a_request_is_held_against_its_worker_once() -> None:
    scene = Scene().started()
    connection = scene.connected()
    connection.comes(EVENTS + EVENT)
    connection.breaks(stale=False)
    assert (scene.guards[0].asked, scene.guards[0].failed) == (1, 1)
    scene = Scene().started()
    scene.connected()
    scene.exchange.gone()
    assert scene.guards[0].asked == 0


def test_a_comment_that_keeps_a_stream_alive_is_no_sign_of_life() -> None:
    scene = Scene().started()
    connection, life = scene.connected(), scene.guards[0].life
    since = life.unheard_since
    for piece in (EVENTS + b"e\r\n: keep-alive\n\n\r\n", b"e\r\n: keep-alive\n\n\r\n"):
        scene.now += 5
        connection.comes(piece)
        assert life.unheard_since == since
    connection.comes(EVENT)
    assert life.unheard_since == scene.now


def test_when_all_are_failing_the_least_bad_is_asked_and_the_error_says_so() -> None:
    scene = Scene()
    for guard in scene.guards:
        for _ in range(5):
            guard.ended(guard.breaker.enter(), Outcome.FAILED)
        assert guard.breaker.state is State.OPEN
    scene.started()
    scene.connected().breaks(stale=False)
    assert b"this one was the least bad" in scene.text
    scene.settled()


# --- the model's name ---

NAMED = b'{"model":"served","data":[]}'
NAMED_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nContent-Length: %d\r\n\r\n" % len(NAMED)


def test_an_answer_names_the_model_as_the_client_did_where_that_is_asked_for() -> None:
    scene = Scene(renames=True).started()
    connection = scene.connected()
    assert b"accept-encoding" not in connection.asked
    connection.comes(NAMED_HEAD + NAMED[:9])
    assert not scene.text  # how long it is, is not known
    connection.comes(NAMED[9:])
    assert scene.text.endswith(b'\r\n\r\n{"model":"m","data":[]}')
    assert b"Content-Length: 23\r\n" in scene.text
    assert connection.ended == "kept"
    scene.settled()


def test_a_stream_that_breaks_has_its_error_behind_what_was_renamed() -> None:
    scene = Scene(renames=True).started()
    connection = scene.connected()
    event = b"data: " + NAMED + b"\n\n"
    connection.comes(EVENTS + b"%x\r\n%b\r\n" % (len(event) + 6, event + b"data: "))
    connection.breaks(stale=False)
    sent = scene.text.partition(b"\r\n\r\n")[2]
    assert sent.startswith(b'1f\r\ndata: {"model":"m","data":[]}\n\n\r\n')
    assert b'data: {"error":{' in sent
    scene.settled()


def test_an_answer_that_breaks_before_its_name_was_found_is_none() -> None:
    scene = Scene(renames=True, path=EMBED).started()
    scene.connected().comes(NAMED_HEAD + NAMED[:5])
    scene.pool.made[0].breaks(stale=False)
    assert not scene.text
    scene.connected().comes(NAMED_HEAD + NAMED)
    assert scene.text.endswith(b'{"model":"m","data":[]}')
    scene.settled()


def test_a_fallback_s_answer_names_the_model_that_made_it() -> None:
    scene = Scene(renames=True, fallbacks=[FallbackRule(model="m", to=[FallbackTarget(model="n")])]).started()
    for _ in range(2):
        scene.connecting().not_connected("connection refused")
    scene.connected().comes(NAMED_HEAD + NAMED)
    assert scene.text.endswith(NAMED)
    scene.settled()


class ExchangeModel(RuleBasedStateMachine):
    """Anything may happen at any time."""

    scene: Scene
    turn = whole = False
    tries = 0

    @initialize(
        http11=st.booleans(), keep_alive=st.booleans(), expects=st.booleans(), idle=st.booleans(),
        path=st.sampled_from([CHAT, EMBED]), generation=st.booleans(), falls_back=st.booleans(),
        renames=st.booleans(), asks=st.booleans(),
    )  # fmt: skip
    def start(
        self, http11: bool, keep_alive: bool, expects: bool, idle: bool, path: bytes, generation: bool,
        falls_back: bool, renames: bool, asks: bool,
    ) -> None:  # fmt: skip
        to = [FallbackTarget(model="n"), FallbackTarget(model="g", url="http://cloud/v1")]
        self.scene = Scene(
            http11=http11, keep_alive=http11 and keep_alive, expects=expects, path=path,
            retries=RetrySettings(retry_generation=generation, most=3),
            fallbacks=[FallbackRule(model="m", to=to)] if falls_back else [], renames=renames,
        )  # fmt: skip
        self.scene.pool.has_idle = idle
        if asks:
            self.scene.relay.lookups = cast(Lookups, self.scene.index)

    @precondition(lambda self: self.scene.index.told)
    @rule(answer=st.sampled_from([None, Answer(1, 7, {"http://a:1": 5}), Answer(1, 7, {"http://gone:1": 5})]))
    def index_says(self, answer: Answer | None) -> None:
        self.scene.index.says(answer)

    @property
    def asked(self) -> FakeConnection | None:
        made = self.scene.pool.made
        return made[-1] if made and made[-1].asker is not None else None

    @precondition(lambda self: not self.turn)
    @rule()
    def has_its_turn(self) -> None:
        self.turn = True
        if not self.scene.exchange.response_complete:
            self.scene.exchange.begin()

    @precondition(lambda self: not self.whole)
    @rule(body=st.sampled_from([BODY, b'{"model":"other"}', b"nonsense"]))
    def body_comes(self, body: bytes) -> None:
        self.whole = True
        self.scene.exchange.feed(body[:5])
        self.scene.exchange.feed(body[5:])
        if not self.scene.exchange.response_complete:
            self.scene.exchange.complete()

    @precondition(lambda self: any(one.asker for one in self.scene.pool.connecting[-1:]))
    @rule(well=st.booleans())
    def connects(self, well: bool) -> None:
        if well:
            self.scene.connected()
        else:
            self.scene.connecting().not_connected("connection refused")

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def answer_comes(self, data: st.DataObject) -> None:
        connection = self.asked
        assert connection is not None
        if connection.framing.head is None:
            piece = data.draw(
                st.sampled_from(
                    [EVENTS, EVENTS + EVENT, b"NONSENSE\r\n\r\n", b"HTTP/1.1 204 No\r\n\r\n", UNAVAILABLE, GATEWAY]
                )
            )
        else:
            piece = data.draw(st.sampled_from([EVENT, EVENT + LAST, LAST, b"garbage"]))
        connection.comes(piece)

    @precondition(lambda self: self.asked)
    @rule(stale=st.booleans())
    def connection_breaks(self, stale: bool) -> None:
        connection = self.asked
        assert connection is not None
        connection.breaks(stale)

    @rule()
    def workers_are_found_to_hang(self) -> None:
        for worker in self.scene.workers.all:
            self.scene.relay.hung(worker)

    @rule(paused=st.booleans())
    def client_is_slow(self, paused: bool) -> None:
        if not self.scene.exchange.response_complete:
            self.scene.exchange.pause() if paused else self.scene.exchange.resume()

    @rule(seconds=st.sampled_from([1, 11, 70]))
    def time_passes(self, seconds: float) -> None:
        self.scene.now += seconds
        self.scene.relay.look(self.scene.now)

    @rule(there=st.booleans())
    def workers_change(self, there: bool) -> None:
        texts = ["m=http://a:1", "m=http://c:1"] if there else ["m=http://c:1"]
        self.scene.workers.apply(CONFIGURATION, [parse_worker(text) for text in texts])

    @rule()
    def router_stops(self) -> None:
        self.scene.relay.cut()

    @rule()
    def client_leaves(self) -> None:
        if not self.scene.exchange.response_complete:
            self.scene.exchange.gone()

    @invariant()
    def nothing_is_held_afterwards(self) -> None:
        scene = getattr(self, "scene", None)
        if scene is None:
            return
        assert scene.in_flight <= 1
        assert len(scene.client.over) <= 1
        if scene.exchange.response_complete:
            scene.settled()
        else:
            assert scene.exchange in scene.relay.active
            assert not scene.client.transport.ended

    @invariant()
    def one_worker_has_it_and_no_other_once_something_was_passed_on(self) -> None:
        scene = getattr(self, "scene", None)
        if scene is None:
            return
        connecting = sum(one.asker is not None for one in scene.pool.connecting)
        assert connecting + sum(one.asker is not None for one in scene.pool.made) <= 1
        if scene.text.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n"):
            assert connecting == 0
            self.tries = self.tries or len(scene.pool.connecting) + len(scene.pool.made)
            assert self.tries == len(scene.pool.connecting) + len(scene.pool.made)

    @invariant()
    def at_most_one_answer(self) -> None:
        scene = getattr(self, "scene", None)
        if scene is not None:
            assert scene.text.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n").count(b"HTTP/1.1 ") <= 1
            if not self.turn:
                assert not scene.text


TestExchange = ExchangeModel.TestCase
