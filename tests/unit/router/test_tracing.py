"""Which requests are recorded, what their attempts' spans say, and what settings may say."""

from __future__ import annotations

from typing import Any

import pytest

from helios.config import HedgeSettings, HedgingSettings, RetrySettings, TracingSettings
from helios.errors import UsageError
from router.relay.request_head import RequestHead
from router.routes import ROUTES
from router.tracing.recorder import Recorder
from router.tracing.settings import check, endpoint_of
from router.tracing.spans import envelope, spans_of
from tests.support.otlp import Collector, Span, take
from tests.support.relaying import CHAT, EMBED, EVENT, EVENTS, LAST, FakeConnection, Scene


class Bits:
    """Ids in a row, from the lowest to the highest."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, bits: int) -> int:
        self.count += 1
        return (self.count * 0x9E3779B97F4A7C15F39CC0605CEDC835) % (1 << bits)


def head(flags: bytes | None = None, bits: Any = None) -> RequestHead:
    given = [] if flags is None else [(b"traceparent", b"00-%032x-%016x-%b" % (7, 8, flags))]
    return RequestHead(ROUTES[0], b"", given, bits or Bits())


@pytest.mark.parametrize(("ratio", "least", "most"), [(0.0, 0, 0), (0.25, 200, 300), (1.0, 1000, 1000)])
def test_a_share_of_the_routers_own_traces_is_recorded_and_workers_are_told(
    ratio: float, least: int, most: int
) -> None:
    bits = Bits()
    recorder = Recorder(ratio, 1, bits, lambda count: None)
    heads = [head(bits=bits) for _ in range(1000)]
    recorded = [recorder.begin(one) is not None for one in heads]
    assert least <= sum(recorded) <= most
    assert [one.trace.parent.endswith(b"-01") for one in heads] == recorded


@pytest.mark.parametrize(("flags", "recorded"), [(b"00", False), (b"01", True), (b"02", False), (b"03", True)])
def test_a_clients_trace_is_recorded_if_it_says_so(flags: bytes, recorded: bool) -> None:
    recorder, one = Recorder(0.0, 1, Bits(), lambda count: None), head(flags)
    spans = recorder.begin(one)
    assert (spans is not None) == recorded
    assert one.trace.parent.endswith(b"-" + flags)
    if spans is not None:
        assert (spans.trace, spans.caller) == (b"%032x" % 7, b"%016x" % 8)


def test_what_finds_the_queue_full_is_counted() -> None:
    dropped: list[float] = []
    recorder = Recorder(1.0, 2, Bits(), dropped.append)
    for _ in range(5):
        spans = recorder.begin(head())
        assert spans is not None
        recorder.put(spans)
    assert (len(recorder), dropped) == (2, [1, 1, 1])
    assert len(recorder.take(10)) == 2
    assert recorder.take(10) == []


class To:
    """A worker, or an endpoint that is none."""

    def __init__(self, url: str, ours: bool = True) -> None:
        self.url, self.ours = url, ours


class Answer:
    """A head, and a delivery of it."""

    def __init__(self, status: int, events: bool = False) -> None:
        self.status, self.events, self.chunked, self.mode, self.head = status, events, False, None, self


class Nothing:
    """A delivery of nothing."""

    head, status = None, 0


def seen(recorder: Recorder) -> list[Span]:
    """The spans of the one request that waits, as a collector sees them."""
    (request,) = recorder.take(2)
    collector = Collector()
    take(collector, envelope().of(spans_of(request, "https")))
    assert collector.problems == []
    return collector.spans


def kinds(found: list[Span]) -> list[Any]:
    return [(span.failed, span.attributes.get("error.type")) for span in found]


A, B = To("http://a:1"), To("https://b/v1", ours=False)


def test_times_are_those_of_the_wall_and_a_fallback_is_no_vllm() -> None:
    answer: Any = Answer(200)
    recorder = Recorder(1.0, 1, Bits(), lambda count: None, lambda: 106.0, lambda: 10**18)
    request: Any = recorder.begin(head(b"01"))
    request.whole(100.0)
    first, second = request.sends(A, b"%016x" % 1, 101.0), request.sends(B, b"%016x" % 2, 104.0)
    first.error, second.head = "not_sent", answer
    first.left(103.0, 0.0, False)
    second.left(106.0, 105.0, True)
    request.end(answer, second, True, False, "m", 99.0)
    found = seen(recorder)
    server, first, second = found
    assert [(span.began - 10**18, span.ended - 10**18) for span in found] == [
        (-7 * 10**9, 0), (-5 * 10**9, -3 * 10**9), (-2 * 10**9, 0),
    ]  # fmt: skip
    assert (server.attributes["helios.queue_wait"], server.attributes["url.scheme"]) == (1.0, "https")
    assert kinds(found) == [(False, None), (True, "not_sent"), (False, None)]
    assert (first.attributes["server.port"], second.attributes["server.port"]) == (1, 443)
    assert ["gen_ai.provider.name" in span.attributes for span in found] == [False, True, False]


@pytest.mark.parametrize(
    ("end", "whole", "gone", "expected"),
    [
        (Answer(200), False, False, [(True, "broken_off")] * 2),
        (Answer(200), False, True, [(True, "client_gone")] * 2),
        (Nothing, False, True, [(True, "client_gone")] * 2),
        (Answer(400), True, False, [(False, None), (True, "400")]),
        (Answer(500), True, False, [(True, "500")] * 2),
    ],
)
def test_what_went_wrong_is_said(end: Any, whole: bool, gone: bool, expected: list[Any]) -> None:
    recorder = Recorder(1.0, 1, Bits(), lambda count: None)
    request: Any = recorder.begin(head(b"01"))
    now = recorder.now()
    attempt = request.sends(A, b"%016x" % 1, now)
    attempt.head = end.head
    attempt.left(now, 0.0, whole)
    request.end(end, attempt, whole, gone, "m", now)
    assert kinds(seen(recorder)) == expected


# --- attempts, as a relay makes them ---

GENERATION = RetrySettings(retry_generation=True, budget_floor_per_s=10)
HEDGING = HedgingSettings(models={"m": HedgeSettings(after_s=0.5)}, budget_floor_per_s=1)
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"
ERROR = b"HTTP/1.1 503 No\r\ncontent-length: 2\r\n\r\n{}"
FINE: Any = (False, None, None)
OVERTAKEN: Any = (False, None, True)


def traced(path: bytes = EMBED, **more: Any) -> tuple[Scene, Recorder]:
    """A request that is recorded, with its body here."""
    bits = Bits()
    recorder = Recorder(1.0, 1, bits, lambda count: None, lambda: scene.now, lambda: 10**18)
    scene = Scene(path=path, bits=bits, tracing=recorder, retries=GENERATION, **more)
    return scene, recorder


def attempts(scene: Scene, recorder: Recorder) -> list[Any]:
    """What became of each attempt: whether it failed, with which error, and whether it was overtaken.

    All that was sent has a span, with the id that its worker got, under the one of the request."""
    scene.settled()
    server, *found = seen(recorder)
    assert (server.kind, server.attributes["helios.attempts"]) == ("server", len(found))
    assert {(span.kind, span.parent, span.trace) for span in found} == {("client", server.id, server.trace)}
    ids = [span.id for span in found]
    assert len({server.id, *ids}) == 1 + len(found)
    for one in scene.pool.made:
        given = one.asked.partition(b"traceparent: ")[2][:55].decode().split("-")
        assert not given[0] or (given[1] == server.trace and given[2] in ids)
    said = (span.attributes for span in found)
    return [(span.failed, a.get("error.type"), a.get("helios.overtaken")) for span, a in zip(found, said, strict=True)]


def late(scene: Scene) -> tuple[FakeConnection, FakeConnection]:
    first = scene.started().connected()
    scene.later(0.5)
    return first, scene.connected()


@pytest.mark.parametrize("winner", [0, 1])
def test_the_two_attempts_of_a_hedged_request_are_two_spans(winner: int) -> None:
    scene, recorder = traced(hedging=HEDGING)
    legs = late(scene)
    scene.later(1)
    legs[winner].comes(OK)
    assert attempts(scene, recorder) == ([FINE, OVERTAKEN] if winner == 0 else [OVERTAKEN, FINE])


def test_a_hedged_stream_says_when_its_answer_began_and_what_it_used() -> None:
    scene, recorder = traced(CHAT, hedging=HEDGING)
    first, second = late(scene)
    first.comes(EVENTS)  # a head, and nothing of an answer
    scene.later(2)
    usage = b'data: {"usage": {"prompt_tokens": 3, "completion_tokens": 4}}\n\n'
    second.comes(EVENTS + b"%x\r\n%b\r\n" % (len(usage), usage) + LAST)
    scene.settled()
    server, lost, won = seen(recorder)
    assert lost.attributes["helios.overtaken"]
    assert "gen_ai.response.time_to_first_chunk" not in lost.attributes
    assert "gen_ai.usage.output_tokens" not in lost.attributes
    assert won.attributes["gen_ai.response.time_to_first_chunk"] == pytest.approx(2.0)
    assert server.attributes["helios.time_to_first_byte"] == pytest.approx(2.5)
    for span in (server, won):
        assert (span.attributes["gen_ai.usage.input_tokens"], span.attributes["gen_ai.usage.output_tokens"]) == (3, 4)


@pytest.mark.parametrize(
    ("how", "why"), [("breaks", "broke"), ("503", "503"), ("hangs", "hung"), ("is silent", "first_byte_timeout")]
)
def test_one_attempt_that_fails_while_the_other_goes_on_is_the_one_that_failed(how: str, why: str) -> None:
    scene, recorder = traced(hedging=HEDGING)
    first, second = late(scene)
    if how == "breaks":
        first.breaks(stale=False)
    elif how == "503":
        first.comes(ERROR)
    elif how == "hangs":
        scene.relay.hung(next(iter(scene.workers.all)))
    else:
        scene.later(59.5)
    second.comes(OK)
    assert attempts(scene, recorder) == [(True, why, None), FINE]


def test_a_client_that_leaves_ends_both_attempts() -> None:
    scene, recorder = traced(hedging=HEDGING)
    late(scene)
    scene.exchange.gone()
    assert attempts(scene, recorder) == [(True, "client_gone", None)] * 2


@pytest.mark.parametrize(
    ("how", "why"), [("connects not", "not_sent"), ("breaks", "broke"), ("503", "503"), ("hangs", "hung")]
)
def test_a_request_that_is_sent_again_has_a_span_for_each_attempt(how: str, why: str) -> None:
    scene, recorder = traced(CHAT)
    scene.started()
    if how == "connects not":
        scene.connecting().not_connected("connection refused")
    elif how == "breaks":
        scene.connected().breaks(stale=False)
    elif how == "503":
        scene.connected().comes(ERROR)
    else:
        scene.connected()
        scene.relay.hung(next(iter(scene.workers.all)))
    scene.connected().comes(OK)
    assert attempts(scene, recorder) == [(True, why, None), FINE]


def test_a_worker_that_hangs_and_answers_after_all_has_not_failed() -> None:
    scene, recorder = traced(CHAT, workers=["m=http://a:1"])
    connection = scene.started().connected()
    scene.relay.hung(next(iter(scene.workers.all)))
    connection.comes(OK)
    assert attempts(scene, recorder) == [FINE]


def test_a_stale_connection_is_an_event_of_its_attempt() -> None:
    scene, recorder = traced()
    scene.started(idle=True)
    scene.now += 1
    scene.pool.made[0].breaks(stale=True)
    scene.now += 1
    scene.connected().comes(OK)
    scene.settled()
    _, client = seen(recorder)
    assert (client.failed, client.events) == (False, (("stale_connection", client.began + 10**9),))
    assert client.ended == client.began + 2 * 10**9
    assert scene.pool.made[0].asked == scene.pool.made[1].asked


@pytest.mark.parametrize(("began", "why"), [(False, "first_byte_timeout"), (True, "idle_timeout")])
def test_an_attempt_that_ends_the_request_says_what_the_client_was_told(began: bool, why: str) -> None:
    scene, recorder = traced(CHAT)
    connection = scene.started().connected()
    if began:
        connection.comes(EVENTS + EVENT)
    scene.later(60)
    assert attempts(scene, recorder) == [(True, why, None)]


@pytest.mark.parametrize(("began", "why"), [(False, "_OTHER"), (True, "broken_off")])
def test_an_attempt_that_the_router_cut_has_failed(began: bool, why: str) -> None:
    scene, recorder = traced(CHAT)
    connection = scene.started().connected()
    if began:
        connection.comes(EVENTS + EVENT)
    scene.relay.cut()
    assert attempts(scene, recorder) == [(True, why, None)]


@pytest.mark.parametrize(
    ("endpoint", "url"),
    [
        ("http://c:4318", "http://c:4318/v1/traces"),
        ("http://c:4318/", "http://c:4318/v1/traces"),
        ("https://c/otlp/v1/traces", "https://c/otlp/v1/traces"),
    ],
)
def test_endpoints(endpoint: str, url: str) -> None:
    assert endpoint_of(TracingSettings(endpoint=endpoint)) == url
    check(TracingSettings(endpoint=endpoint))


@pytest.mark.parametrize(
    ("wrong", "part"),
    [
        ({"endpoint": "c:4317"}, "no URL of a collector"),
        ({"ratio": 1.5}, "ratio must be between 0 and 1"),
        ({"queue": 0}, "queue must be more than 0"),
        ({"timeout_s": -1}, "timeout_s must be more than 0"),
    ],
)
def test_settings_that_can_not_work(wrong: dict[str, Any], part: str) -> None:
    with pytest.raises(UsageError, match=part):
        check(TracingSettings(**{"endpoint": "http://c:4318", **wrong}))
